"""From tokenised documents to samples `[CLS] S1 [SEP] S2 [SEP]`. Pure: numbers in, numbers out.

    document  document  document            documents of one unit and one split, in order
    |--------------------------|
    | C tokens | C tokens | ...             C = sequence_length - 3 content tokens a sample
    [CLS] S1 [SEP] S2 [SEP]                 S1 ends at a document boundary if the sample has one, else anywhere

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

Joined = Literal["join", "pad"]


def draw(*numbers: int) -> int:
    """A pseudo-random number in 0 .. 2**64 - 1 that depends on `numbers` alone (splitmix64 chained over them)."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


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
    boundaries: list[int]
    """Positions, each above 0, at which another document begins."""


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
        self._rest = _Content(np.empty(0, np.int64), [])
        self._samples = 0

    def add(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """Take the ids of one document, shape [tokens]; the samples that are full now, special tokens included."""
        if len(document) < MIN_CONTENT:
            raise ValueError(f"a document of {len(document)} tokens cannot be packed: leave out what is below two")
        self._rest = _append(self._rest, document)
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


def _append(content: _Content, document: np.ndarray) -> _Content:
    if not len(content.tokens):
        return _Content(document, [])
    return _Content(
        np.concatenate([content.tokens, document]),
        [*content.boundaries, len(content.tokens)],
    )


def _cut(content: _Content, length: int) -> tuple[_Content, _Content]:
    before = [position for position in content.boundaries if position < length]
    after = [position - length for position in content.boundaries if position > length]
    return _Content(content.tokens[:length], before), _Content(content.tokens[length:], after)


def _sample(content: _Content, config: PackingConfig, *, random: int) -> np.ndarray:
    tokens, boundaries = content.tokens, content.boundaries
    split = boundaries[random % len(boundaries)] if boundaries else 1 + random % (len(tokens) - 1)
    sample = np.empty(len(tokens) + SPECIAL_TOKENS_PER_SAMPLE, tokens.dtype)
    sample[0] = config.cls_id
    sample[1 : split + 1] = tokens[:split]
    sample[split + 1] = config.sep_id
    sample[split + 2 : -1] = tokens[split:]
    sample[-1] = config.sep_id
    return sample
