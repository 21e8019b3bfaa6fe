"""Counts of a preparation, checks on them, and the manifest and summary made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.input.records import SkippedRecords
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.prepare.settings import PrepareConfig
from pmlm_dist.corpus.shards import SPLITS, TRAIN, VALIDATION, Manifest, Shard, Split, token_dtype
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_MAX_UNKNOWN = 0.01
"""Share of [UNK] above which the summary warns."""


@dataclass
class UnitCounts:
    """Counts of one or more units; counters are by split unless noted."""

    documents: Counter[str] = field(default_factory=Counter)
    content_tokens: Counter[str] = field(default_factory=Counter)
    unknown_tokens: Counter[str] = field(default_factory=Counter)
    """[UNK] among the content tokens."""
    samples: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)
    """See stream_digest.py; modulo 2**64."""
    changed: Counter[str] = field(default_factory=Counter)
    """Documents, by kind of change."""
    characters: int = 0
    skipped: SkippedRecords = field(default_factory=SkippedRecords)

    def merge(self, other: UnitCounts) -> None:
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        self.characters += other.characters
        self.skipped.merge(other.skipped)

    def as_json(self) -> dict[str, Any]:
        """Return values for `json.dumps`."""
        return {**vars(self), "skipped": vars(self.skipped)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> UnitCounts:
        skipped = plain["skipped"]
        first = {reason: (unit, location) for reason, (unit, location) in skipped["first"].items()}
        return cls(
            **{name: Counter(plain[name]) for name in _COUNTERS},
            characters=plain["characters"],
            skipped=SkippedRecords(skipped["records_read"], Counter(skipped["counts"]), first),
        )


_TOTALS = ("documents", "content_tokens", "unknown_tokens")
"""By split, in the manifest."""
_COUNTERS = (*_TOTALS, "samples", "digests", "changed")


def sum_counts(counts: Iterable[UnitCounts]) -> UnitCounts:
    """Merge `counts`."""
    total = UnitCounts()
    for each in counts:
        total.merge(each)
    return total


def raise_if_empty(config: PrepareConfig, counts: UnitCounts) -> None:
    """Raise ConfigError if the scan kept no document, with the reasons."""
    skipped = counts.skipped
    if skipped.records_read == skipped.counts.total():
        reasons = "; ".join(_skipped_lines(skipped)) or "the files are empty"
        raise_if_any(
            [f"source {' '.join(config.source)} holds no usable document ({reasons}): check the files, --text-field"]
        )


def raise_if_too_small(config: PrepareConfig, totals: UnitCounts) -> None:
    """Raise ConfigError if a split has no sample, or fewer samples than shards."""
    raise_if_any(
        [
            f"no sample is left for {split}: {totals.documents.total()} usable documents are too few for a "
            f"validation_fraction of {config.validation_fraction}: give more text or another fraction"
            for split in SPLITS
            if totals.samples[split] == 0
        ]
    )
    if config.shards is not None and totals.samples[TRAIN] < config.shards:
        raise_if_any([f"shards ({config.shards}) exceeds the {totals.samples[TRAIN]} training samples: use fewer"])


def build_manifest(
    settings: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    totals: UnitCounts,
    shards: Mapping[str, list[Shard]],
    token_counts: np.ndarray,
) -> Manifest:
    """Return the manifest of a finished corpus; `settings`: those of `recorded_settings`."""
    samples, content = totals.samples, totals.content_tokens
    tokens = {split: content[split] + SPECIAL_TOKENS_PER_SAMPLE * samples[split] for split in SPLITS}
    return Manifest(
        sequence_length=settings["sequence_length"],
        token_dtype=token_dtype(vocabulary.size),
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=settings["seed"],
        splits={split: Split(tuple(shards[split]), samples[split], tokens[split]) for split in SPLITS},
        token_counts=" ".join(map(str, token_counts.tolist())),
        counts={
            "records": totals.skipped.records_read,
            **{name: {split: getattr(totals, name)[split] for split in SPLITS} for name in _TOTALS},
            "characters": totals.characters,
            "skipped": dict(sorted(totals.skipped.counts.items())),
            "changed": {what: count for what, count in sorted(totals.changed.items()) if count},
            "digests": {split: f"{totals.digests[split] % (1 << 64):016x}" for split in SPLITS},
        },
        settings=settings,
    )


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """Count documents by length in characters: 64 bins for each power of two, shape [2048]."""
    return np.bincount((np.log2(np.maximum(1, lengths)) * _BINS).astype(np.int64), minlength=32 * _BINS)


@dataclass(frozen=True)
class DocumentLengths:
    """Lengths in characters of the documents that are not skipped as duplicates."""

    counts: np.ndarray
    """Of `length_histogram`."""
    characters: int

    def quantile(self, fraction: float) -> int:
        """Return about the length that `fraction` of the documents do not exceed, in two significant digits."""
        bin = int(np.searchsorted(np.cumsum(self.counts), max(1, fraction * self.counts.sum())))
        return round(float(f"{2 ** ((bin + 0.5) / _BINS):.2g}"))

    def warnings(self, config: PrepareConfig) -> list[str]:
        """Return warnings if the source is probably cut into documents in another way than was meant."""
        is_text = any(".txt" in source for source in config.source)
        median, longest = self.quantile(0.5), self.quantile(1)
        if median < (_SHORT if is_text else _VERY_SHORT):
            way_out = f"{_RULE}: write a book or an article as one line of .jsonl" if is_text else _OTHER_FIELD
            return [f"warning: half of the documents have at most about {median:,} characters; {way_out}"]
        if is_text and max(median, longest // 8) > _LONG:
            return [f"warning: the longest document has about {longest:,} characters; {_RULE}: add blank lines"]
        return []


_SHORT, _VERY_SHORT, _LONG = 600, 60, 1 << 19
_BINS = 64
_RULE = "in a .txt file a blank line ends a document, and nothing else does"
_OTHER_FIELD = "check that --text-field is the field with one whole text"


def summary(
    config: PrepareConfig,
    manifest: Manifest,
    totals: UnitCounts,
    seconds: Mapping[str, float],
    vocabulary: Vocabulary,
    *,
    lengths: DocumentLengths,
) -> str:
    """Return the report of a finished preparation; `seconds` by phase."""
    lines = [
        f"corpus {config.output}: vocabulary {vocabulary.size} ({vocabulary.description}), sequence length "
        f"{config.sequence_length}"
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name:10} {totals.documents[name]:>12,} documents {split.samples:>12,} samples "
            f"{split.tokens:>16,} tokens {len(split.shards):>7,} shards"
        )
    tokens = totals.content_tokens
    share = tokens[VALIDATION] / max(1, tokens.total())
    lines.append(
        f"  held out {share:.2%} of the tokens ({config.validation_fraction:.2%} asked for); median document "
        f"about {lengths.quantile(0.5):,} characters"
    )
    unknown = totals.unknown_tokens.total() / tokens.total()
    lines.append(f"  unigram entropy {manifest.unigram_entropy:.4f} nats; {unknown:.2%} of the tokens are [UNK]")
    if unknown > _MAX_UNKNOWN:
        lines.append(
            "  warning: words became [UNK], which teaches nothing: train a larger vocabulary, or one with a higher "
            "--character-coverage, or give one that was made for these texts"
        )
    lines += [f"  changed {count:,} x {what}" for what, count in manifest.counts["changed"].items()]
    lines += [f"  skipped {line}" for line in _skipped_lines(totals.skipped)]
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    lines += [f"  {warning}" for warning in lengths.warnings(config)]
    return "\n".join([*lines, f"  seconds {sum(seconds.values()):.1f} ({phases})"])


def _skipped_lines(skipped: SkippedRecords) -> list[str]:
    return [
        f"{count:,} x {reason} (first: {skipped.first[reason][1]})" for reason, count in sorted(skipped.counts.items())
    ]
