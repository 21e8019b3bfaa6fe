"""Packing: tokenized documents to samples `[CLS] S1 [SEP] S2 [SEP]`. Pure functions of arrays.

    document  document  document            documents of one unit and one split, in order
    |--------------------------|
    | C tokens | C tokens | ...             C = sequence_length - 3 content tokens a sample
    [CLS] S1 [SEP] S2 [SEP]                 S1 ends at a document boundary if the sample has one, else at the end of a
                                            sentence if it has one, else anywhere

Every token of every document is in exactly one sample, in order. A sample has at least two content tokens, so both
segments have text. If a single token remained for the last sample, the sample before it is one token shorter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmlm_dist.corpus.hashing import hash64

SPECIAL_TOKENS_PER_SAMPLE = 3
MIN_CONTENT = 2
MIN_SEQUENCE_LENGTH = 8

Joined = Literal["join", "pad"]


@dataclass(frozen=True)
class PackingConfig:
    """Layout of samples."""

    sequence_length: int
    """Tokens of a full sample, the three special ones included."""
    cls_id: int
    sep_id: int
    joined: Joined = "join"
    """`join`: documents follow one another within a sample; `pad`: every document begins its own sample."""

    @property
    def capacity(self) -> int:
        """Content tokens of a full sample."""
        return self.sequence_length - SPECIAL_TOKENS_PER_SAMPLE


@dataclass(frozen=True)
class _Content:
    """Content tokens and the positions at which the second segment may begin."""

    tokens: np.ndarray
    document_starts: np.ndarray
    """Sorted positions, each above 0, at which another document begins."""
    sentence_starts: np.ndarray
    """Sorted positions, each above 0, at which another sentence of the same document begins."""


_NONE = np.empty(0, np.int64)


class Packer:
    """Pack the documents of one unit and one split, one after another.

    `seed` and the number of the sample decide where S1 ends. The buffer holds less than two samples. Raises ValueError
    for a sequence length below 8 and for a document of fewer than two tokens.
    """

    def __init__(self, config: PackingConfig, *, seed: tuple[int, ...]):
        if config.sequence_length < MIN_SEQUENCE_LENGTH:
            raise ValueError(f"sequence_length ({config.sequence_length}) must be at least {MIN_SEQUENCE_LENGTH}")
        self._config = config
        self._seed = seed
        self._buffer = _Content(_NONE, _NONE, _NONE)
        self._samples = 0

    def add(self, document: np.ndarray, *, sentence_starts: np.ndarray = _NONE) -> Iterator[np.ndarray]:
        """Add the ids of one document, shape [tokens]; yield the samples that are now full, with special tokens.

        `sentence_starts`: sorted positions at which another sentence begins, if known.
        """
        if len(document) < MIN_CONTENT:
            raise ValueError(f"a document of {len(document)} tokens cannot be packed: skip documents of less than two")
        self._buffer = _append(self._buffer, document, sentence_starts)
        # With at least capacity + 2 tokens in the buffer, two or more remain after a full sample.
        while len(self._buffer.tokens) >= self._config.capacity + MIN_CONTENT:
            yield self._take(self._config.capacity)
        if self._config.joined == "pad":
            yield from self.finish()

    def finish(self) -> Iterator[np.ndarray]:
        """Yield the samples of the remaining tokens: none, one, or two if one token too many remains for one."""
        if len(self._buffer.tokens) == self._config.capacity + 1:
            yield self._take(self._config.capacity - 1)
        if len(self._buffer.tokens):
            yield self._take(len(self._buffer.tokens))

    def _take(self, length: int) -> np.ndarray:
        content, self._buffer = _split(self._buffer, length)
        number, self._samples = self._samples, self._samples + 1
        return _sample(content, self._config, random=hash64(*self._seed, number))


def _append(content: _Content, document: np.ndarray, sentence_starts: np.ndarray) -> _Content:
    sentence_starts = sentence_starts[(sentence_starts > 0) & (sentence_starts < len(document))]
    length = len(content.tokens)
    if not length:
        return _Content(document, _NONE, sentence_starts)
    return _Content(
        np.concatenate([content.tokens, document]),
        np.append(content.document_starts, length),
        np.concatenate([content.sentence_starts, sentence_starts + length]),
    )


def _split(content: _Content, length: int) -> tuple[_Content, _Content]:
    documents, documents_after = _split_positions(content.document_starts, length)
    sentences, sentences_after = _split_positions(content.sentence_starts, length)
    return (
        _Content(content.tokens[:length], documents, sentences),
        _Content(content.tokens[length:], documents_after, sentences_after),
    )


def _split_positions(positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions below `length` and above it; a start at the cut itself is in neither."""
    before, after = np.searchsorted(positions, [length, length + 1])
    return positions[:before], positions[after:] - length


def _sample(content: _Content, config: PackingConfig, *, random: int) -> np.ndarray:
    tokens = content.tokens
    candidates = content.document_starts if len(content.document_starts) else content.sentence_starts
    split = int(candidates[random % len(candidates)]) if len(candidates) else 1 + random % (len(tokens) - 1)
    sample = np.empty(len(tokens) + SPECIAL_TOKENS_PER_SAMPLE, tokens.dtype)
    sample[0] = config.cls_id
    sample[1 : split + 1] = tokens[:split]
    sample[split + 1] = config.sep_id
    sample[split + 2 : -1] = tokens[split:]
    sample[-1] = config.sep_id
    return sample
