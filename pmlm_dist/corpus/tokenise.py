"""Documents to token ids with bounded memory, whatever the length of a document.

documents -> batches of a million characters -> pieces of 65,536 -> tokenizer -> one array of ids a document
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from pmlm_dist.corpus.documents import Document
from pmlm_dist.vocab import Vocabulary

T = TypeVar("T")

BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 16


def tokenised(documents: Iterable[Document], vocabulary: Vocabulary) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their token ids; the tokenizer gets about a million characters at a time."""
    for batch in _grouped(documents, length=lambda document: len(document.text)):
        pieces = ((number, piece) for number, document in enumerate(batch) for piece in cut_text(document.text))
        found: list[list[np.ndarray]] = [[] for _ in batch]
        for call in _grouped(pieces, length=lambda numbered: len(numbered[1])):
            encoded = vocabulary.encode_batch([piece for _, piece in call])
            for (number, _), ids in zip(call, encoded, strict=True):
                found[number].append(np.array(ids, np.uint32))
        for document, ids in zip(batch, found, strict=True):
            yield document, np.concatenate(ids)


def _grouped(items: Iterable[T], *, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of consecutive items that together reach a million characters."""
    group: list[T] = []
    characters = 0
    for item in items:
        group.append(item)
        characters += length(item)
        if characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def cut_text(text: str, *, most: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `most` characters that together are `text`, cut before a space or line end where there is one.

    A tokenizer's working memory is a hundred times its text, so a document of any length must come to it in pieces.
    """
    start = 0
    while len(text) - start > most:
        stop = max(text.rfind(space, start + 1, start + most) for space in " \n")
        stop = stop if stop > start else start + most
        yield text[start:stop]
        start = stop
    yield text[start:]
