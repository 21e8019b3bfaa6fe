"""Documents to token ids with bounded memory, whatever the length of a document.

    documents -> batches of a million characters -> pieces, cut where sentences end -> ids of each document

WordPiece reads every word by itself, so what stood between two spaces before need not be read again: an `Encoder`
remembers its ids, and the tokenizer gets what is new.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.sentences import cut_text
from pmlm_dist.vocab import Vocabulary

T = TypeVar("T")

BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 16
SENTENCES_CHARACTERS = 256
_REMEMBERED = 1 << 18
_LONGEST_WORD = 32
_MEAN_WORD = 16
_PARTS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")
_NO_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
"""What `str.split` takes for a space and the tokenizer removes."""


@dataclass(frozen=True)
class Tokenized:
    """A document as token ids."""

    document: Document
    ids: np.ndarray
    """Shape [tokens], uint32."""
    sentences: np.ndarray
    """Sorted positions at which a sentence begins: not all, but one in about 300 characters."""


class Encoder:
    """The tokenizer with a memory of words: `_REMEMBERED` of them, then it begins anew."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another, uint32, and the number of each text's."""
        if not self._vocabulary.reads_words_alone:
            return _flat(self._vocabulary.encode_batch(texts))
        words_of_texts = [_words(text) for text in texts]
        words = list(itertools.chain.from_iterable(words_of_texts))
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        learned = self._learn(new)
        ids, lengths = _flat([self._known[word] for word in words])
        self._forget(learned)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ids, np.diff(ends[np.cumsum([0, *map(len, words_of_texts)])])

    def _learn(self, words: list[str]) -> list[str]:
        """Remember words by their parts, of which many are known: `word` of `word,`. All that is remembered now."""
        parts = [_parts(word) for word in words]
        new = [part for part in dict.fromkeys(itertools.chain.from_iterable(parts)) if part not in self._known]
        known = self._known
        known.update(zip(new, map(tuple, self._vocabulary.encode_batch(new)), strict=True))
        for word, those in zip(words, parts, strict=True):
            known[word] = tuple(itertools.chain.from_iterable(map(known.__getitem__, those)))
        return words + new

    def _forget(self, learned: list[str]) -> None:
        """What is long is seldom seen again."""
        for word in learned:
            if len(word) > _LONGEST_WORD:
                self._known.pop(word, None)
        if len(self._known) > _REMEMBERED:
            self._known.clear()


def _words(text: str) -> list[str]:
    """What stands between spaces; a text that has few, or that holds what only looks like one, is a single word."""
    words = text.split()
    spaced = len(text) <= _MEAN_WORD * len(words) and not any(character in text for character in _NO_SPACES)
    return words if spaced else [text]


def _parts(word: str) -> list[str]:
    """What the tokenizer reads by itself in a word: it takes marks apart; other than ASCII is left to it."""
    return _PARTS.findall(word) if word.isascii() and word.isprintable() else [word]


def _flat(encoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(itertools.chain.from_iterable(encoded), np.uint32, lengths.sum()), lengths


def tokenized(documents: Iterable[Document], encoder: Encoder) -> Iterator[Tokenized]:
    """Documents with their token ids; the tokenizer gets about a million characters at a time."""
    for batch in _grouped(documents, length=lambda document: len(document.text)):
        pieces = [
            list(cut_text(document.text, least=SENTENCES_CHARACTERS, most=PIECE_CHARACTERS)) for document in batch
        ]
        calls = _grouped(itertools.chain.from_iterable(pieces), length=len)
        parts = [encoder.encode(call) for call in calls]
        ids = np.concatenate([ids for ids, _ in parts])
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in parts)]))
        stops = itertools.accumulate(map(len, pieces), initial=0)
        for document, (first, last) in zip(batch, itertools.pairwise(stops), strict=True):
            start, stop = ends[first], ends[last]
            yield Tokenized(document, ids[start:stop], ends[first + 1 : last] - start)


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
