"""Tokenization of documents in bounded memory, for any length of a document.

    documents -> batches of a million characters -> pieces, cut at sentence ends -> ids of each document

WordPiece tokenizes each word independently of its neighbors. `CachedEncoder` therefore caches the ids of words, and
calls the tokenizer for new words only.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.segmentation import split_text
from pmlm_dist.vocabulary.vocabulary import Vocabulary

T = TypeVar("T")

BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 16
SENTENCE_CHARACTERS = 256
_CACHED_WORDS = 1 << 18
_MAX_CACHED_LENGTH = 32
_MAX_MEAN_WORD_LENGTH = 16
_PARTS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")
_REMOVED_BY_TOKENIZER = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
"""Characters that `str.split` treats as spaces and the tokenizer removes."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids."""

    document: Document
    ids: np.ndarray
    """Shape [tokens], uint32."""
    sentence_starts: np.ndarray
    """Sorted positions at which a sentence begins: about one in 300 characters, not all of them."""


class CachedEncoder:
    """Tokenizer with a cache of words; the cache is cleared when it has more than `_CACHED_WORDS`."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._cache: dict[str, tuple[int, ...]] = {}
        words = [r"\s+".join(map(re.escape, word.split())) for word in vocabulary.words if len(word.split()) > 1]
        self.unbroken = re.compile("|".join(words), re.IGNORECASE) if words else None
        """Added words with spaces: no cut of a text may be in them."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one after another, [tokens] uint32, and the number of ids of each, [texts]."""
        if not self._vocabulary.tokenizes_words_independently:
            return _flatten(self._vocabulary.encode_batch(texts))
        words_of_texts = [_words(text) for text in texts]
        words = list(itertools.chain.from_iterable(words_of_texts))
        new = [word for word in dict.fromkeys(words) if word not in self._cache]
        added = self._add(new)
        ids, lengths = _flatten([self._cache[word] for word in words])
        self._evict(added)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return ids, np.diff(ends[np.cumsum([0, *map(len, words_of_texts)])])

    def _add(self, words: list[str]) -> list[str]:
        """Cache words and their parts (often cached already: `word` of `word,`); return all entries added."""
        parts = [_parts(word) for word in words]
        cache = self._cache
        new = [part for part in dict.fromkeys(itertools.chain.from_iterable(parts)) if part not in cache]
        cache.update(zip(new, map(tuple, self._vocabulary.encode_batch(new)), strict=True))
        for word, parts_of_word in zip(words, parts, strict=True):
            cache[word] = tuple(itertools.chain.from_iterable(map(cache.__getitem__, parts_of_word)))
        return words + new

    def _evict(self, added: list[str]) -> None:
        """Remove long words, which seldom occur again, and everything if the cache is full."""
        for word in added:
            if len(word) > _MAX_CACHED_LENGTH:
                self._cache.pop(word, None)
        if len(self._cache) > _CACHED_WORDS:
            self._cache.clear()


def _words(text: str) -> list[str]:
    """Split at spaces. A text with few spaces, or with a character that is no space to the tokenizer, is one word."""
    words = text.split()
    has_spaces = len(text) <= _MAX_MEAN_WORD_LENGTH * len(words)
    return words if has_spaces and not any(character in text for character in _REMOVED_BY_TOKENIZER) else [text]


def _parts(word: str) -> list[str]:
    """Parts that the tokenizer treats independently: it splits off punctuation. Only ASCII words are split here."""
    return _PARTS.findall(word) if word.isascii() and word.isprintable() else [word]


def _flatten(encoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(itertools.chain.from_iterable(encoded), np.uint32, lengths.sum()), lengths


def tokenize(documents: Iterable[Document], encoder: CachedEncoder) -> Iterator[TokenizedDocument]:
    """Yield documents with their token ids; the tokenizer is called with about a million characters at a time."""
    for batch in _batches(documents, length=lambda document: len(document.text)):
        pieces = [_pieces(document.text, encoder.unbroken) for document in batch]
        # A second batching: a single document can have many millions of characters.
        encoded = [encoder.encode(texts) for texts in _batches(itertools.chain.from_iterable(pieces), length=len)]
        ids = np.concatenate([ids for ids, _ in encoded])
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in encoded)]))
        stops = itertools.accumulate(map(len, pieces), initial=0)
        for document, (first, last) in zip(batch, itertools.pairwise(stops), strict=True):
            start, stop = ends[first], ends[last]
            yield TokenizedDocument(document, ids[start:stop], ends[first + 1 : last] - start)


def _pieces(text: str, unbroken: re.Pattern[str] | None) -> list[str]:
    """Cut a text at sentence ends, but not within a match of `unbroken`."""
    pieces = list(split_text(text, min_length=SENTENCE_CHARACTERS, max_length=PIECE_CHARACTERS))
    if unbroken is None:
        return pieces
    cuts = np.cumsum([0, *map(len, pieces)])
    for match in unbroken.finditer(text):
        cuts = cuts[(cuts <= match.start()) | (cuts >= match.end())]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _batches(items: Iterable[T], *, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield lists of consecutive items with at least a million characters together."""
    batch: list[T] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += length(item)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
