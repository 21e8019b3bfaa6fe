"""Where a text may be cut: after a sentence, else before a space, else anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n\s*(?=\n)")


def cut_text(text: str, *, least: int, most: int) -> Iterator[str]:
    """Pieces that together are `text`, each up to the first end of a sentence after `least` characters.

    Where none ends within `most` characters, the cut is before the last space or line end, or, where there is none,
    after `most` characters.
    """
    start = 0
    while len(text) - start > least:
        end = _SENTENCE_END.search(text, start + least, start + most)
        if end is None and len(text) - start <= most:
            break
        stop = end.end() if end else max(text.rfind(space, start + 1, start + most) for space in " \n")
        stop = stop if stop > start else start + most
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]
