"""A small synthetic corpus that a model of a few thousand parameters can learn, written in milliseconds."""

from pathlib import Path

import numpy as np

from pmlm_dist.corpus.shards import Manifest, Split, shard_name, write_shard
from pmlm_dist.vocabulary.vocabulary import Vocabulary

WORDS = 120
SEQUENCE_LENGTH = 32


def write_corpus(
    folder: Path,
    *,
    shards: int = 8,
    samples: int = 12,
    words: int = WORDS,
    seed: int = 0,
    sequence_length: int = SEQUENCE_LENGTH,
) -> Path:
    """Write `shards` training shards and one validation shard of `samples` samples each.

    The words of a sample are an arithmetic progression, so a model can predict them.
    """
    vocabulary = Vocabulary.from_tokens(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(words))]
    )
    random = np.random.default_rng(seed)
    splits, number = {}, 0
    for split, count in (("train", shards), ("validation", 1)):
        written = []
        for shard in range(count):
            ids = [_sample(random, vocabulary, words=words, length=sequence_length) for _ in range(samples)]
            first = 0 if split == "validation" else number
            written.append(write_shard(folder, shard_name(split, shard), ids, first=first, dtype="uint16"))
            number += samples
        tokens = sum(shard.samples for shard in written) * sequence_length
        splits[split] = Split(shards=tuple(written), samples=count * samples, tokens=tokens)
    vocabulary.save(folder)
    Manifest(
        sequence_length=sequence_length,
        token_dtype="uint16",
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=seed,
        splits=splits,
        token_counts=" ".join(["0"] * len(vocabulary.special_ids) + ["1"] * words),
        counts={"documents": 1},
    ).save(folder)
    return folder


def _sample(random: np.random.Generator, vocabulary: Vocabulary, *, words: int, length: int) -> np.ndarray:
    start, stride = random.integers(words), random.integers(1, 4)
    content = (start + stride * np.arange(length - 3)) % words + len(vocabulary.special_ids)
    cut = int(random.integers(1, length - 4))
    parts = [[vocabulary.cls_id], content[:cut], [vocabulary.sep_id], content[cut:], [vocabulary.sep_id]]
    return np.concatenate(parts).astype(np.uint16)
