"""From tokenised documents to samples `[CLS] S1 [SEP] S2 [SEP]`. Pure: numbers in, numbers out.

    document  document  document            documents of one unit and one split, in order
    |--------------------------|
    | C tokens | C tokens | ...             C = sequence_length - 3 content tokens a sample
    [CLS] S1 [SEP] S2 [SEP]                 S1 ends at a document boundary if the sample has one, else at the end of a
                                            sentence if it has one, else anywhere

Every token of every document is in exactly one sample, in order. A sample has at least two content tokens, so that both
segments hold text: where a single token would be left over at the end, the sample before gives up its last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

SPECIAL_TOKENS_PER_SAMPLE = 3
MIN_CONTENT = 2
MIN_SEQUENCE_LENGTH = 8
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

Joined = Literal["join", "pad"]


def draw(*numbers: int) -> int:
    """A pseudo-random number in 0 .. 2**64 - 1 that depends on `numbers` alone (splitmix64 chained over them)."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def draws(*numbers: int, last: np.ndarray) -> np.ndarray:
    """`draw(*numbers, n)` for every n of `last`, shape [n], uint64."""
    return continued(np.uint64(draw(*numbers)), last)


def continued(drawn: np.ndarray | np.uint64, last: np.ndarray) -> np.ndarray:
    """`draw(*numbers, n)` for every n of `last`, from `drawn` = `draw(*numbers)`: one number, or one for every n."""
    state = drawn + last.astype(np.uint64) + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True)
class PackingConfig:
    """How documents become samples."""

    sequence_length: int
    """Tokens of a full sample, the three special ones included."""
    cls_id: int
    """Id of [CLS]."""
    sep_id: int
    """Id of [SEP]."""
    joined: Joined = "join"
    """`join`: documents follow one another within a sample; `pad`: every document begins its own sample."""

    @property
    def capacity(self) -> int:
        """Content tokens of a full sample."""
        return self.sequence_length - SPECIAL_TOKENS_PER_SAMPLE


@dataclass(frozen=True)
class _Content:
    """The text of one sample."""

    tokens: np.ndarray
    documents: np.ndarray
    """Sorted positions, each above 0, at which another document begins."""
    sentences: np.ndarray
    """Sorted positions, each above 0, at which another sentence of the same document begins."""


_NOTHING = np.empty(0, np.int64)


class Packer:
    """Packs the documents of one unit and one split, one after another.

    `seed` and the sample's number decide where S1 ends. What is held back is less than two samples. Raises ValueError
    for a sequence length below 8 and for a document of fewer than two tokens.
    """

    def __init__(self, config: PackingConfig, *, seed: tuple[int, ...]):
        if config.sequence_length < MIN_SEQUENCE_LENGTH:
            raise ValueError(f"sequence_length ({config.sequence_length}) must be at least {MIN_SEQUENCE_LENGTH}")
        self._config = config
        self._seed = seed
        self._rest = _Content(_NOTHING, _NOTHING, _NOTHING)
        self._samples = 0

    def add(self, document: np.ndarray, *, sentences: np.ndarray = _NOTHING) -> Iterator[np.ndarray]:
        """Take the ids of one document, shape [tokens]; the samples that are full now, special tokens included.

        `sentences`: sorted positions at which another sentence begins, where that is known.
        """
        if len(document) < MIN_CONTENT:
            raise ValueError(f"a document of {len(document)} tokens cannot be packed: leave out what is below two")
        self._rest = _append(self._rest, document, sentences)
        # While at least capacity + 2 tokens wait, two or more are left after a full sample.
        while len(self._rest.tokens) >= self._config.capacity + MIN_CONTENT:
            yield self._take(self._config.capacity)
        if self._config.joined == "pad":
            yield from self.finish()

    def finish(self) -> Iterator[np.ndarray]:
        """The samples of what is left: none, one, or two if one token too many is left for one."""
        if len(self._rest.tokens) == self._config.capacity + 1:
            yield self._take(self._config.capacity - 1)
        if len(self._rest.tokens):
            yield self._take(len(self._rest.tokens))

    def _take(self, length: int) -> np.ndarray:
        content, self._rest = _cut(self._rest, length)
        number, self._samples = self._samples, self._samples + 1
        return _sample(content, self._config, random=draw(*self._seed, number))


def pack(documents: Iterable[np.ndarray], config: PackingConfig, *, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All samples of `documents`: see `Packer`."""
    packer = Packer(config, seed=seed)
    for document in documents:
        yield from packer.add(document)
    yield from packer.finish()


def _append(content: _Content, document: np.ndarray, sentences: np.ndarray) -> _Content:
    sentences = sentences[(sentences > 0) & (sentences < len(document))]
    length = len(content.tokens)
    if not length:
        return _Content(document, _NOTHING, sentences)
    return _Content(
        np.concatenate([content.tokens, document]),
        np.append(content.documents, length),
        np.concatenate([content.sentences, sentences + length]),
    )


def _cut(content: _Content, length: int) -> tuple[_Content, _Content]:
    documents, documents_after = _cut_positions(content.documents, length)
    sentences, sentences_after = _cut_positions(content.sentences, length)
    return (
        _Content(content.tokens[:length], documents, sentences),
        _Content(content.tokens[length:], documents_after, sentences_after),
    )


def _cut_positions(positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What lies within the first `length` tokens and behind them; a boundary where the cut is, is none."""
    before, after = np.searchsorted(positions, [length, length + 1])
    return positions[:before], positions[after:] - length


def _sample(content: _Content, config: PackingConfig, *, random: int) -> np.ndarray:
    tokens = content.tokens
    places = content.documents if len(content.documents) else content.sentences
    split = int(places[random % len(places)]) if len(places) else 1 + random % (len(tokens) - 1)
    sample = np.empty(len(tokens) + SPECIAL_TOKENS_PER_SAMPLE, tokens.dtype)
    sample[0] = config.cls_id
    sample[1 : split + 1] = tokens[:split]
    sample[split + 1] = config.sep_id
    sample[split + 2 : -1] = tokens[split:]
    sample[-1] = config.sep_id
    return sample
