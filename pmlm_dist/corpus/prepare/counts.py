"""What a preparation counted, and what it says at the end: refusals, manifest, summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.input.documents import Skips
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.prepare.settings import PrepareConfig
from pmlm_dist.corpus.shards import SPLITS, TRAIN, Manifest, Shard, Split, token_dtype
from pmlm_dist.vocab import Vocabulary


@dataclass
class UnitCounts:
    """Counts of one piece of work, of one rank, or of all."""

    documents: Counter[str] = field(default_factory=Counter)
    """By split."""
    content_tokens: Counter[str] = field(default_factory=Counter)
    """By split."""
    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    digests: Counter[str] = field(default_factory=Counter)
    """By split: see proof.py; modulo 2**64."""
    changed: Counter[str] = field(default_factory=Counter)
    """Documents, by what changed them."""
    characters: int = 0
    skips: Skips = field(default_factory=Skips)

    def merge(self, other: UnitCounts) -> None:
        """Add another's counts."""
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        self.characters += other.characters
        self.skips.merge(other.skips)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        counters = {name: dict(getattr(self, name)) for name in _COUNTERS}
        skips = {"records": self.skips.records, "counts": dict(self.skips.counts), "first": self.skips.first}
        return {**counters, "characters": self.characters, "skips": skips}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> UnitCounts:
        """What `as_json` gave."""
        first = {reason: (unit, place) for reason, (unit, place) in plain["skips"]["first"].items()}
        return cls(
            **{name: Counter(plain[name]) for name in _COUNTERS},
            characters=plain["characters"],
            skips=Skips(plain["skips"]["records"], Counter(plain["skips"]["counts"]), first),
        )


_COUNTERS = ("documents", "content_tokens", "samples", "digests", "changed")


def merged(tallies: Iterable[UnitCounts]) -> UnitCounts:
    """The sum."""
    total = UnitCounts()
    for tally in tallies:
        total.merge(tally)
    return total


def raise_if_empty(config: PrepareConfig, found: UnitCounts) -> None:
    """Raise ConfigError if the scan found no document, saying why."""
    skips = found.skips
    if skips.records == skips.counts.total():
        found_only = "; ".join(_skip_lines(skips)) or "the files are empty"
        raise_if_any(
            [f"source {' '.join(config.source)} holds no usable document ({found_only}): check the files, --text-field"]
        )


def raise_if_too_small(config: PrepareConfig, totals: UnitCounts) -> None:
    """Raise ConfigError if a split has no sample, or fewer than shards are wanted."""
    for split in SPLITS:
        if totals.samples[split] == 0:
            raise_if_any(
                [
                    f"no sample is left for {split}: {totals.documents.total()} usable documents are too few for a "
                    f"validation_fraction of {config.validation_fraction}: give more text or another fraction"
                ]
            )
    if config.shards is not None and totals.samples[TRAIN] < config.shards:
        raise_if_any([f"shards ({config.shards}) exceeds the {totals.samples[TRAIN]} training samples: use fewer"])


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` are drawn from, by their frequencies."""
    seen = counts[counts > 0].astype(np.float64)
    shares = seen / seen.sum()
    return float(-(shares * np.log(shares)).sum())


def build_manifest(
    settings: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    totals: UnitCounts,
    shards: Mapping[str, list[Shard]],
    unigram_entropy: float,
) -> Manifest:
    """The manifest of a finished corpus; `settings` are the recorded ones."""
    tokens = {
        split: totals.content_tokens[split] + SPECIAL_TOKENS_PER_SAMPLE * totals.samples[split] for split in SPLITS
    }
    return Manifest(
        sequence_length=settings["sequence_length"],
        token_dtype=token_dtype(vocabulary.size),
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=settings["seed"],
        splits={split: Split(tuple(shards[split]), totals.samples[split], tokens[split]) for split in SPLITS},
        unigram_entropy=unigram_entropy,
        counts={
            "records": totals.skips.records,
            "documents": {split: totals.documents[split] for split in SPLITS},
            "content_tokens": {split: totals.content_tokens[split] for split in SPLITS},
            "characters": totals.characters,
            "skipped": dict(sorted(totals.skips.counts.items())),
            "changed": {what: count for what, count in sorted(totals.changed.items()) if count},
            "digests": {split: f"{totals.digests[split] % (1 << 64):016x}" for split in SPLITS},
        },
        settings=settings,
    )


def summary(config: PrepareConfig, manifest: Manifest, totals: UnitCounts, seconds: Mapping[str, float]) -> str:
    """What the user reads at the end; `seconds` by phase."""
    lines = [
        f"corpus {config.output}: vocabulary {manifest.vocabulary['size']}, sequence length {config.sequence_length}"
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name:10} {totals.documents[name]:>12,} documents {split.samples:>12,} samples "
            f"{split.tokens:>16,} tokens {len(split.shards):>7,} shards"
        )
    lines.append(f"  unigram entropy {manifest.unigram_entropy:.4f} nats")
    lines += [f"  changed {count:,} x {what}" for what, count in manifest.counts["changed"].items()]
    lines += [f"  skipped {line}" for line in _skip_lines(totals.skips)]
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    return "\n".join([*lines, f"  seconds {sum(seconds.values()):.1f} ({phases})"])


def _skip_lines(skips: Skips) -> list[str]:
    return [f"{count:,} x {reason} (first: {skips.first[reason][1]})" for reason, count in sorted(skips.counts.items())]
