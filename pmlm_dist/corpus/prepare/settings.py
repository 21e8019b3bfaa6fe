"""The settings of `pmlm prepare-corpus`, their checks, and whether a corpus with them stands already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.filters.cleaning import Unicode, language_filter
from pmlm_dist.corpus.filters.contamination import read_held_out
from pmlm_dist.corpus.input.documents import UNIT_BYTES
from pmlm_dist.corpus.input.sources import find_files
from pmlm_dist.corpus.packing.packer import MIN_SEQUENCE_LENGTH, Joined
from pmlm_dist.corpus.shards import MANIFEST, Manifest
from pmlm_dist.vocab import Vocabulary

PYTHON_DOCS = "python-docs"
_ABSENT = {
    "unicode": "none",
    "min_characters": 0,
    "language_filter": None,
    "near_duplicates": None,
    "decontaminate": [],
    "decontaminate_words": 13,
}
"""What manifests stand for that were written before there were these settings."""
_SHORT = 200
SAMPLES_PER_SHARD = 8192
FEWEST_SHARDS = 64


@dataclass(frozen=True)
class PrepareConfig:
    """Raw text to a corpus of packed samples."""

    source: tuple[str, ...] = ()
    """Files or quoted globs of .txt (blank line between documents), .jsonl, either also .gz or .zst, and .parquet; also
    at http(s)://, s3://, gs://; `datasets://NAME?config=C&split=S`: a data set of Hugging Face's `datasets`; or
    `python-docs`: the docstrings of this Python installation."""
    output: Path = Path("data/corpus")
    """Folder of the corpus."""
    vocabulary: Path | None = None
    """WordPiece vocabulary to use: a tokenizer.json, its folder, or a BERT vocab.txt."""
    vocabulary_size: int | None = None
    """Train a vocabulary of this size on a sample of the text instead."""
    vocabulary_sample_bytes: int = 128 << 20
    """Text that a vocabulary is trained on, at most."""
    sequence_length: int = 512
    """Tokens of a sample, the three special tokens included."""
    joined: Joined = "join"
    """`join`: documents follow one another within a sample; `pad`: every document begins its own sample."""
    shards: int | None = None
    """Exact number of training shards."""
    samples_per_shard: int | None = None
    """Samples wanted in a shard. If neither this nor `shards` is given: 8192, or less so that there are 64 shards,
    enough for as many data-parallel ranks."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out; at least one is."""
    deduplicate: bool = True
    """Leave out documents whose text was there before."""
    near_duplicates: float | None = None
    """Leave out documents that share this much of their five-word sequences with an earlier one (Jaccard index,
    estimated by MinHash; 0.8 is usual). Needs the extra `near-duplicates`."""
    unicode: Unicode = "none"
    """Normal form of Unicode that texts are brought into before anything else."""
    min_characters: int = 0
    """Leave out shorter documents."""
    language_filter: str | None = None
    """`package.module:function` or `file.py:function` that takes a text and says whether to keep it."""
    decontaminate: tuple[str, ...] = ()
    """Held-out texts: files, globs or addresses of the kinds of `source`, every field of theirs. Documents that share a
    run of words with them are left out."""
    decontaminate_words: int = 13
    """Words of such a run."""
    text_field: str = "text"
    """Field of a JSON object, or column of a parquet file, that holds the text."""
    unit_bytes: int = UNIT_BYTES
    """Uncompressed files are cut into parts of this size, the grains of the distributed work."""
    seed: int = 0
    """Seed of the split into training and validation, of segments, and of the order of the samples."""


def problems(config: PrepareConfig) -> list[str]:
    """Everything that is wrong with `config` by itself, one sentence a problem."""
    found = []
    if not config.source:
        found.append("source: nothing to read: give --source 'texts/*.jsonl', or --source python-docs for a demo")
    if (config.vocabulary is None) == (config.vocabulary_size is None):
        found.append("vocabulary: give either --vocabulary PATH or --vocabulary-size N, for example 30522")
    if config.shards is not None and config.samples_per_shard is not None:
        found.append("shards and samples_per_shard exclude each other: give one of them")
    if config.sequence_length < MIN_SEQUENCE_LENGTH:
        found.append(f"sequence_length ({config.sequence_length}) must be at least {MIN_SEQUENCE_LENGTH}: use 512")
    if not 0.0 < config.validation_fraction < 1.0:
        found.append(f"validation_fraction ({config.validation_fraction}) must lie between 0 and 1: use 0.01")
    if config.near_duplicates is not None and not 0.0 < config.near_duplicates <= 1.0:
        found.append(f"near_duplicates ({config.near_duplicates}) must lie above 0 and at most at 1: use 0.8")
    if config.min_characters < 0:
        found.append(f"min_characters ({config.min_characters}) must not be negative: use 0")
    for name in (
        "decontaminate_words",
        "shards",
        "samples_per_shard",
        "vocabulary_size",
        "vocabulary_sample_bytes",
        "unit_bytes",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append(f"{name} ({value}) must be positive")
    return found


def standing(config: PrepareConfig) -> Manifest | None:
    """The corpus that is there, if it has these settings; None for none. Raises ConfigError for any other."""
    raise_if_any(problems(config))
    wanted = recorded(config)
    if not (config.output / MANIFEST).exists():
        return None
    manifest = Manifest.load(config.output)
    raise_if_different(config.output, {**_ABSENT, **manifest.settings}, wanted, holds="a corpus")
    return manifest


def raise_if_different(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], *, holds: str) -> None:
    """Raise ConfigError with everything in which what `folder` holds differs from what is wanted."""
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    raise_if_any(
        [
            f"{folder} holds {holds} with {name} {_short(found.get(name))}, not {_short(wanted.get(name))}: "
            "remove the folder or give another --output"
            for name in differing
        ]
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


def recorded(config: PrepareConfig) -> dict[str, Any]:
    """What the outcome depends on, as JSON values: settings, names and sizes of the files, the given vocabulary."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del plain["output"]
    files = find_files(patterns(config))
    listing = "".join(f"{file.name}\t{file.size}\n" for file in files)
    plain["input_files"] = hashlib.sha256(listing.encode()).hexdigest()
    if config.vocabulary is not None:
        plain["vocabulary_fingerprint"] = Vocabulary.load(config.vocabulary).fingerprint
    if config.language_filter is not None:
        plain["language_filter_fingerprint"] = language_filter(config.language_filter).fingerprint
    if config.decontaminate:
        held_out = read_held_out(config.decontaminate, words=config.decontaminate_words)
        plain["decontaminate_fingerprint"] = held_out.fingerprint
    return plain


def patterns(config: PrepareConfig) -> list[str]:
    """The sources that are files."""
    return [source for source in config.source if source != PYTHON_DOCS]
