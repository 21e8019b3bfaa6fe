"""`pmlm corpus verify DIR`: check that a corpus holds every token of every document exactly once, and nothing else.

    every shard   size, sha256, members in order, numbered through the split                    (shards.py)
    every sample  [CLS] S1 [SEP] S2 [SEP], both segments with text, not too long, ids of the vocabulary
    every split   samples and tokens match the manifest; the digest of the samples is that of the documents, computed
                  before packing                                                                (stream_digest.py)

The shards are read twice: the digest requires the lengths of all samples. Memory: some hundred samples, and about 50
bytes for each sample of a split.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.packing.stream_digest import UNIT_SAMPLES, locate_in_streams, stream_hash, token_digest
from pmlm_dist.corpus.shards import IN_BOTH_SPLITS, SPLITS, Manifest, Shard, ShardError, ShardReader, open_shard
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_BATCH_SAMPLES = 256
_MAX_PROBLEMS = 20


def verify(folder: Path, /) -> None:
    """Verify that a corpus holds every token of every document exactly once. Raises ConfigError with all problems.

    A corpus without digests of its documents (from another program, or an older one) gets all other checks.
    """
    corpus = _Corpus(folder, Manifest.load(folder), Vocabulary.load(folder))
    problems = corpus.check()
    more = [f"and {len(problems) - _MAX_PROBLEMS} more like these"] if len(problems) > _MAX_PROBLEMS else []
    raise_if_any([f"{folder}: {problem}" for problem in problems[:_MAX_PROBLEMS] + more])
    print(f"{folder}: {corpus.summary()}")


@dataclass
class _Corpus:
    folder: Path
    manifest: Manifest
    vocabulary: Vocabulary
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Split -> content tokens of every sample, shape [samples]."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Split -> number of [UNK]."""

    def check(self) -> list[str]:
        """Return all problems. Digests are compared only if there is no other problem."""
        problems = []
        if self.manifest.vocabulary["fingerprint"] != self.vocabulary.fingerprint:
            problems.append("the vocabulary differs from that of the manifest")
        for name in self.manifest.splits:
            problems += self._check_shards(name)
        problems = problems or self._check_counts()
        return problems or [problem for name in self._splits_with_digest() for problem in self._check_digest(name)]

    def _splits_with_digest(self) -> list[str]:
        has_digests = "digests" in self.manifest.counts and (self.folder / UNIT_SAMPLES).is_file()
        return [name for name in SPLITS if has_digests]

    def summary(self) -> str:
        samples = ", ".join(f"{split.samples:,} {name} samples" for name, split in self.manifest.splits.items())
        content = sum(int(lengths.sum()) for lengths in self.lengths.values())
        unknown = f"{self.unknown.total() / max(1, content):.2%} of the tokens are [UNK]"
        if self._splits_with_digest():
            return f"{samples}: every token of every document is in exactly one sample, at its position; {unknown}"
        return (
            f"{samples}: shards and samples are valid; without digests of the documents, their completeness is "
            f"unknown; {unknown}"
        )

    def _check_shards(self, name: str) -> list[str]:
        """Check all shards of a split; record the lengths of its samples."""
        problems, number, lengths = [], 0, [np.empty(0, np.int64)]
        for shard in self.manifest.splits[name].shards:
            try:
                problems += self._check_first_key(shard, number)
                for ids, sizes in self._samples(shard):
                    problems += [f"{shard.name}: {problem}" for problem in self._check_samples(ids, sizes, number)]
                    lengths.append(sizes - SPECIAL_TOKENS_PER_SAMPLE)
                    self.unknown[name] += int((ids == self.vocabulary.unk_id).sum())
                    number += len(sizes)
            except ShardError as error:
                problems.append(str(error))
                number += shard.samples
        self.lengths[name] = np.concatenate(lengths)
        return problems

    def _check_first_key(self, shard: Shard, number: int) -> list[str]:
        """Check that the first key of a shard follows the last of the previous shard: keys are unique in a split."""
        with open_shard(self.folder / shard.name, shard) as file:
            key = file.read(9)
        return [] if key == b"%09d" % number else [f"{shard.name} begins with key {key!r}, expected {number:09d}"]

    def _samples(self, shard: Shard) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches of samples: their concatenated ids, [tokens], and the length of each, [samples]."""
        longest = self.manifest.sequence_length
        with ShardReader(self.folder, shard, self.manifest.token_dtype, longest=longest) as reader:
            for start in range(0, len(reader), _BATCH_SAMPLES):
                samples = [reader[index] for index in range(start, min(start + _BATCH_SAMPLES, len(reader)))]
                yield np.concatenate(samples), np.array([len(sample) for sample in samples])

    def _check_samples(self, ids: np.ndarray, sizes: np.ndarray, number: int) -> list[str]:
        """Find the first sample that is not [CLS] S1 [SEP] S2 [SEP] over the vocabulary; `number`: of the first one."""
        stops = np.cumsum(sizes)
        starts = stops - sizes
        cls, sep = ids == self.vocabulary.cls_id, ids == self.vocabulary.sep_id
        inner_sep = sep.copy()
        inner_sep[np.concatenate([starts, starts + 1, stops - 2, stops - 1])] = False  # there, a segment would be empty
        is_valid = (sizes >= SPECIAL_TOKENS_PER_SAMPLE + 2) & cls[starts] & sep[stops - 1]
        is_valid &= (np.add.reduceat(cls, starts, dtype=int) == 1) & (np.add.reduceat(sep, starts, dtype=int) == 2)
        is_valid &= np.add.reduceat(inner_sep, starts, dtype=int) == 1
        is_valid &= np.maximum.reduceat(ids, starts) < self.vocabulary.size
        invalid = np.flatnonzero(~is_valid)
        return [f"sample {number + invalid[0]:09d} is not [CLS] S1 [SEP] S2 [SEP]"] if len(invalid) else []

    def _check_counts(self) -> list[str]:
        """Compare the counts of the manifest with those of the shards."""
        problems, counts = [], self.manifest.counts
        for name, split in self.manifest.splits.items():
            samples, content = len(self.lengths[name]), int(self.lengths[name].sum())
            compared = {
                "samples": (split.samples, samples),
                "tokens": (split.tokens, content + SPECIAL_TOKENS_PER_SAMPLE * samples),
                "content tokens": (counts.get("content_tokens", {}).get(name, content), content),
                "[UNK]": (counts.get("unknown_tokens", {}).get(name, self.unknown[name]), self.unknown[name]),
            }
            problems += [
                f"{name} holds {actual} {what}, the manifest says {expected}"
                for what, (expected, actual) in compared.items()
                if expected != actual
            ]
        if "records" in counts:
            in_both = counts.get("changed", {}).get(IN_BOTH_SPLITS, 0)
            kept, skipped = sum(counts["documents"].values()) - in_both, sum(counts["skipped"].values())
            if counts["records"] != kept + skipped:
                problems.append(f"{counts['records']} records were read, but {kept} are kept and {skipped} skipped")
        return problems

    def _check_digest(self, name: str) -> list[str]:
        """Compare the digest of the samples of a split with that of its documents."""
        stream = {"seed": self.manifest.seed, "split": SPLITS.index(name)}
        try:
            unit_samples = np.load(self.folder / UNIT_SAMPLES)[:, SPLITS.index(name)]
        except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            return [f"{UNIT_SAMPLES} cannot be read ({reason}): restore it, or prepare the corpus again"]
        lengths = self.lengths[name]
        if unit_samples.sum() != len(lengths):
            return [f"{UNIT_SAMPLES} lists {unit_samples.sum()} samples of {name}, the shards hold {len(lengths)}"]
        units, begins = locate_in_streams(unit_samples, lengths, **stream)
        hashes = np.array([stream_hash(**stream, unit=unit) for unit in range(len(unit_samples))], np.uint64)
        total, number = 0, 0
        for ids, sizes in itertools.chain.from_iterable(map(self._samples, self.manifest.splits[name].shards)):
            batch = slice(number, number := number + len(sizes))
            content = lengths[batch]
            is_content = (ids != self.vocabulary.cls_id) & (ids != self.vocabulary.sep_id)
            # Position in the sample, shifted by that of the sample in its stream.
            positions = np.arange(content.sum()) - np.repeat(np.cumsum(content) - content - begins[batch], content)
            total += token_digest(ids[is_content], np.repeat(hashes[units[batch]], content), positions)
        actual, expected = f"{total % (1 << 64):016x}", self.manifest.counts["digests"][name]
        if actual == expected:
            return []
        return [f"the samples of {name} have the digest {actual}, its documents have {expected}"]
