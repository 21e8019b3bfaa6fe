"""A corpus with shards of different sizes, whose samples are a function of their number."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import TRAIN, VALIDATION, Manifest, Split, shard_name, write_shard
from pmlm_dist.masking.blockwise import SpecialIds

SEQUENCE_LENGTH = 32
SHARD_SIZES = {TRAIN: (5, 1, 8, 3, 4, 9, 2, 6), VALIDATION: (4, 3)}
SPECIAL = SpecialIds(pad=0, cls=2, sep=3, mask=4, vocab_size=1000, special=(0, 1, 2, 3, 4))


def tokens_of(split: str, number: int) -> np.ndarray:
    """Return sample `number` of `split`, a function of both; some are shorter than the sequence length."""
    random = np.random.default_rng([split == TRAIN, number])
    words = random.integers(5, 1000, int(random.integers(12, SEQUENCE_LENGTH - 2)))
    return np.array([2, *words[:6], 3, *words[6:], 3], dtype=np.uint16)


def write_corpus(folder: Path, sizes: dict[str, Sequence[int]]) -> Path:
    """Write a corpus with `sizes` samples per shard of each split; return its folder."""
    splits = {}
    for split, shard_sizes in sizes.items():
        shards, first = [], 0
        for number, size in enumerate(shard_sizes):
            samples: Iterator[np.ndarray] = (tokens_of(split, first + index) for index in range(size))
            shards.append(write_shard(folder, shard_name(split, number), samples, first=first, dtype="uint16"))
            first += size
        splits[split] = Split(tuple(shards), samples=first, tokens=0)
    manifest = Manifest(
        sequence_length=SEQUENCE_LENGTH,
        token_dtype="uint16",
        vocabulary={"size": 1000, "fingerprint": "none"},
        seed=0,
        splits=splits,
        token_counts=" ".join(["1"] * 1000),
        counts={},
    )
    manifest.save(folder)
    return folder
