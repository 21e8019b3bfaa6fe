"""Texts that a corpus must not hold, because models will be tested on them.

    held-out files -> every string in them -> words -> runs of N words -> 64-bit hashes, sorted: 8 bytes a run
    a document that has one of the runs is left out (cleaning.py)

A word is a run of letters, digits and underscores, in lower case and NFKC; what stands between words does not matter. A
text of fewer than N words is one run, so it meets a document of the same words, not one that quotes it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.input.documents import list_units, read_strings
from pmlm_dist.corpus.input.sources import find_files

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORDS_REMEMBERED = 1 << 20


@dataclass(frozen=True)
class HeldOut:
    """The runs of words of the texts that are held out."""

    runs: np.ndarray
    """(R,) uint64, sorted, each once."""
    words: int
    """Length of a run."""

    @classmethod
    def of(cls, texts: Iterable[str], *, words: int) -> HeldOut:
        """The runs of `words` words in `texts`."""
        return cls(np.unique(np.concatenate([np.empty(0, np.uint64), *(_runs(text, words) for text in texts)])), words)

    def overlaps(self, text: str) -> bool:
        """Whether `text` has one of the runs."""
        runs = _runs(text, self.words)
        first, last = (np.searchsorted(self.runs, runs, side=side) for side in ("left", "right"))
        return bool((first < last).any())

    @property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) of the runs."""
        return hashlib.sha256(self.runs.tobytes()).hexdigest()


def read_held_out(patterns: Sequence[str], *, words: int) -> HeldOut:
    """The texts of files: of any field and column. Raises ConfigError for none, and for what cannot be read."""
    try:
        units = list_units(find_files(patterns))
        held_out = HeldOut.of((text for unit in units for text in read_strings(unit)), words=words)
        raise_if_any([f"there is no text in {', '.join(patterns)}: give the held-out files"] * (not len(held_out.runs)))
    except ConfigError as error:
        raise ConfigError([f"decontaminate: {problem}" for problem in error.problems]) from error
    return held_out


def _runs(text: str, words: int) -> np.ndarray:
    """(max(1, W - words + 1),) uint64 for a text of W words, (0,) for one without any."""
    hashes = np.array([_hash(word) for word in _WORD.findall(_folded(text))], np.uint64)
    length = min(words, len(hashes))
    found = np.zeros(len(hashes) - length + 1 if length else 0, np.uint64)
    for offset in range(length):
        found = found * _MULTIPLIER + hashes[offset : offset + len(found)]
    return found


def _folded(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).lower()


@lru_cache(maxsize=_WORDS_REMEMBERED)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
