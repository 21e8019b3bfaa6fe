"""A corpus of random tokens, whose content does not affect timings."""

from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import Manifest, Split, shard_name, write_shard
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SHARDS = 8
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def random_corpus(
    folder: Path, *, vocabulary_size: int, samples: int, sequence_length: int, shards: int = SHARDS
) -> Path:
    """Write `samples` full-length training samples in `shards` shards, and one validation shard, to `folder`."""
    vocabulary = Vocabulary.from_tokens([*_SPECIAL, *(f"w{i}" for i in range(vocabulary_size - len(_SPECIAL)))])
    random = np.random.default_rng(0)

    def sample() -> np.ndarray:
        ids = random.integers(len(_SPECIAL), vocabulary_size, size=sequence_length).astype(np.uint16)
        ids[[0, sequence_length // 2, sequence_length - 1]] = vocabulary.cls_id, vocabulary.sep_id, vocabulary.sep_id
        return ids

    splits, per_shard = {}, -(-samples // shards)
    for name, count in (("train", shards), ("validation", 1)):
        written = tuple(
            write_shard(
                folder, shard_name(name, i), [sample() for _ in range(per_shard)], first=i * per_shard, dtype="uint16"
            )
            for i in range(count)
        )
        splits[name] = Split(written, count * per_shard, count * per_shard * sequence_length)
    vocabulary.save(folder)
    Manifest(
        sequence_length=sequence_length,
        token_dtype="uint16",
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=0,
        splits=splits,
        token_counts=" ".join(["1"] * vocabulary_size),
        counts={},
    ).save(folder)
    return folder
