"""Cut points of a text: after a sentence, else before a space, else anywhere."""

import re
from collections.abc import Iterator

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n\s*(?=\n)")
_SPACE = re.compile(r"\s")


def next_cut(text: str, start: int, stop: int) -> int:
    """Return the first cut point in [start, stop]: the end of a sentence, else of a word, else `start`."""
    end = _SENTENCE_END.search(text, start, stop) or _SPACE.search(text, start, stop)
    return end.end() if end else start


def split_text(text: str, *, min_length: int, max_length: int) -> Iterator[str]:
    """Yield consecutive pieces of `text`, each up to the first sentence end after `min_length` characters.

    Without a sentence end within `max_length` characters, cut before the last space or line end. Without one of
    these, cut after `max_length` characters.
    """
    start = 0
    while len(text) - start > min_length:
        end = _SENTENCE_END.search(text, start + min_length, start + max_length)
        if end is None and len(text) - start <= max_length:
            break
        stop = end.end() if end else max(text.rfind(space, start + 1, start + max_length) for space in " \n")
        stop = stop if stop > start else start + max_length
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]
