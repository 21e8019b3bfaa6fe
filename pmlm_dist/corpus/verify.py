"""`pmlm corpus verify DIR`: does the corpus hold every token of every document exactly once, and nothing else?

    every shard   size, sha256, members in order, numbered through the split                    (shards.py)
    every sample  [CLS] S1 [SEP] S2 [SEP], both segments with text, not too long, ids of the vocabulary
    every split   samples and tokens as the manifest says; the digest of the documents, taken before they were packed,
                  is that of the samples                                                        (proof.py)

The shards are read twice, the second time for the digest, which needs to know how long every sample is. Memory: some
hundred samples, and about 50 bytes for each sample of a split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.packing.stream_digest import ORIGINS, base, digest, places_in_streams
from pmlm_dist.corpus.shards import SPLITS, Manifest, Shard, ShardError, ShardReader, open_shard
from pmlm_dist.vocab import Vocabulary

_SAMPLES_AT_ONCE = 256
_NAMED = 20


def verify(folder: Path, /) -> None:
    """Prove that a corpus holds every token of every document exactly once; says all that is wrong otherwise.

    A corpus without the digests of its documents (written by another program, or an older one) is checked in all else.
    """
    corpus = _Corpus(folder, Manifest.load(folder), Vocabulary.load(folder))
    found = corpus.check()
    more = [f"and {len(found) - _NAMED} more like these"] if len(found) > _NAMED else []
    raise_if_any([f"{folder}: {problem}" for problem in found[:_NAMED] + more])
    print(f"{folder}: {corpus.said()}")


@dataclass
class _Corpus:
    folder: Path
    manifest: Manifest
    vocabulary: Vocabulary
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Content tokens of every sample, by split."""

    def check(self) -> list[str]:
        """What is wrong; the digests are looked at if nothing else is."""
        found = []
        if self.manifest.vocabulary["fingerprint"] != self.vocabulary.fingerprint:
            found.append("the vocabulary is not the one that the manifest names")
        for name in self.manifest.splits:
            found += self._shards(name)
        found = found or self._counts()
        return found or [problem for name in self._proved() for problem in self._digest(name)]

    def _proved(self) -> list[str]:
        """Splits whose documents' digests are known."""
        known = "digests" in self.manifest.counts and (self.folder / ORIGINS).is_file()
        return [name for name in SPLITS if known]

    def said(self) -> str:
        samples = {name: f"{split.samples:,} {name} samples" for name, split in self.manifest.splits.items()}
        proof = "every token of every document is in exactly one sample, in its place"
        unproved = "checked in itself; that it holds every document cannot be proved: it has no digests of them"
        return f"{', '.join(samples.values())}: {proof if self._proved() else unproved}"

    def _shards(self, name: str) -> list[str]:
        """Check all shards of a split; note the lengths of its samples."""
        found, number, lengths = [], 0, [np.empty(0, np.int64)]
        for shard in self.manifest.splits[name].shards:
            try:
                found += self._numbered(shard, number)
                for ids, sizes in self._samples(shard):
                    found += [f"{shard.name}: {problem}" for problem in self._faults(ids, sizes, number)]
                    lengths.append(sizes - SPECIAL_TOKENS_PER_SAMPLE)
                    number += len(sizes)
            except ShardError as error:
                found.append(str(error))
                number += shard.samples
        self.lengths[name] = np.concatenate(lengths)
        return found

    def _numbered(self, shard: Shard, number: int) -> list[str]:
        """Whether the first key of a shard goes on where the last shard ended: keys are unique in a split."""
        with open_shard(self.folder / shard.name, shard) as file:
            key = file.read(9)
        return [] if key == b"%09d" % number else [f"{shard.name} begins with key {key!r}, expected {number:09d}"]

    def _samples(self, shard: Shard) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some hundred samples at a time: their ids one after another, and the length of each."""
        longest = self.manifest.sequence_length
        with ShardReader(self.folder, shard, self.manifest.token_dtype, longest=longest) as reader:
            for start in range(0, len(reader), _SAMPLES_AT_ONCE):
                samples = [reader[index] for index in range(start, min(start + _SAMPLES_AT_ONCE, len(reader)))]
                yield np.concatenate(samples), np.array([len(sample) for sample in samples])

    def _faults(self, ids: np.ndarray, sizes: np.ndarray, number: int) -> list[str]:
        """The first sample that is not [CLS] S1 [SEP] S2 [SEP] over the vocabulary; `number` is that of the first."""
        stops = np.cumsum(sizes)
        starts = stops - sizes
        cls, sep = ids == self.vocabulary.cls_id, ids == self.vocabulary.sep_id
        inside = sep.copy()
        inside[np.concatenate([starts, starts + 1, stops - 2, stops - 1])] = False  # where no first [SEP] may be
        right = (sizes >= SPECIAL_TOKENS_PER_SAMPLE + 2) & cls[starts] & sep[stops - 1]
        right &= (np.add.reduceat(cls, starts, dtype=int) == 1) & (np.add.reduceat(sep, starts, dtype=int) == 2)
        right &= np.add.reduceat(inside, starts, dtype=int) == 1
        right &= np.maximum.reduceat(ids, starts) < self.vocabulary.size
        wrong = np.flatnonzero(~right)
        return [f"sample {number + wrong[0]:09d} is not [CLS] S1 [SEP] S2 [SEP]"] if len(wrong) else []

    def _counts(self) -> list[str]:
        """Whether what was found is what the manifest counts."""
        found, counts = [], self.manifest.counts
        for name, split in self.manifest.splits.items():
            content = int(self.lengths[name].sum())
            expected = {
                "samples": (split.samples, len(self.lengths[name])),
                "tokens": (split.tokens, content + SPECIAL_TOKENS_PER_SAMPLE * len(self.lengths[name])),
                "content tokens": (counts.get("content_tokens", {}).get(name, content), content),
            }
            found += [
                f"{name} holds {had} {what}, the manifest says {said}"
                for what, (said, had) in expected.items()
                if said != had
            ]
        if "records" in counts:
            kept, skipped = sum(counts["documents"].values()), sum(counts["skipped"].values())
            if counts["records"] != kept + skipped:
                found.append(f"{counts['records']} records were read, but {kept} are kept and {skipped} left out")
        return found

    def _digest(self, name: str) -> list[str]:
        """Whether the digest of the samples is that of the documents."""
        place = {"seed": self.manifest.seed, "split": SPLITS.index(name)}
        try:
            origins = np.load(self.folder / ORIGINS)[:, SPLITS.index(name)]
        except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
            return [f"{ORIGINS} cannot be read ({type(error).__name__}: {error}): restore it, or prepare it anew"]
        if origins.sum() != len(self.lengths[name]):
            return [f"{ORIGINS} speaks of {origins.sum()} samples of {name}, there are {len(self.lengths[name])}"]
        units, begins = places_in_streams(origins, self.lengths[name], **place)
        bases = np.array([base(**place, unit=unit) for unit in range(len(origins))], np.uint64)
        total, number = 0, 0
        for ids, sizes in self._all_samples(name):
            here = slice(number, number := number + len(sizes))
            content = self.lengths[name][here]
            kept = (ids != self.vocabulary.cls_id) & (ids != self.vocabulary.sep_id)
            positions = np.arange(content.sum()) - np.repeat(np.cumsum(content) - content - begins[here], content)
            total += digest(ids[kept], np.repeat(bases[units[here]], content), positions)
        found, said = f"{total % (1 << 64):016x}", self.manifest.counts["digests"][name]
        return [] if found == said else [f"the samples of {name} have the digest {found}, its documents have {said}"]

    def _all_samples(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for shard in self.manifest.splits[name].shards:
            yield from self._samples(shard)
