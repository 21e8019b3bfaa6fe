"""Settings of `pmlm prepare-corpus`, their checks, and the comparison with an existing corpus."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.filters.cleaning import Unicode, language_filter
from pmlm_dist.corpus.filters.contamination import read_held_out
from pmlm_dist.corpus.input.sources import SourceFile, find_files, is_url
from pmlm_dist.corpus.input.units import UNIT_BYTES
from pmlm_dist.corpus.packing.packer import MIN_SEQUENCE_LENGTH, Joined
from pmlm_dist.corpus.shards import MANIFEST, Manifest
from pmlm_dist.ranges import NotNegative, Positive, Range, range_problems
from pmlm_dist.vocabulary.files import WORD_LIST
from pmlm_dist.vocabulary.vocabulary import CHARACTER_COVERAGE, Vocabulary

PYTHON_DOCS = "python-docs"
SAMPLES_PER_SHARD = 8192
MIN_SHARDS = 64
_DEFAULTS_OF_LATER_SETTINGS = {
    "unicode": "none",
    "min_characters": 0,
    "language_filter": None,
    "near_duplicates": None,
    "decontaminate": [],
    "decontaminate_words": 13,
}
"""Values for manifests that were written before these settings existed."""
_MAX_VALUE_LENGTH = 200
_SequenceLength = Range(f"be at least {MIN_SEQUENCE_LENGTH}: use 512", lambda length: length >= MIN_SEQUENCE_LENGTH)
_Fraction = Range("lie between 0 and 1: use 0.01", lambda fraction: 0 < fraction < 1)
_Coverage = Range("lie above 0 and at most at 1 (0.9995 is usual)", lambda coverage: 0 < coverage <= 1)
_Similarity = Range("lie above 0 and at most at 1 (0.8 is usual)", lambda similarity: 0 < similarity <= 1)


@dataclass(frozen=True)
class PrepareConfig:
    """Raw text to a corpus of packed samples."""

    source: tuple[str, ...] = ()
    """Files or quoted globs of .txt (blank line between documents), .jsonl, either also .gz, .bz2, .xz or .zst, and
    .parquet; also at http(s)://, s3://, gs://; `datasets://NAME?config=C&split=S`: a data set of Hugging Face's
    `datasets`; or `python-docs`: the docstrings of this Python installation."""
    output: Path = Path("data/corpus")
    """Folder of the corpus."""
    vocabulary: Path | None = None
    """WordPiece vocabulary to use: a tokenizer.json, a BERT vocab.txt, or the folder of one. Settings beside it
    (tokenizer_config.json, added_tokens.json) apply."""
    vocabulary_size: Annotated[int | None, Positive] = None
    """Train a vocabulary of this size on a sample of the text instead."""
    vocabulary_sample_bytes: Annotated[int, Positive] = 128 << 20
    """Maximum text to train a vocabulary on."""
    cased: bool = False
    """Keep capitals and accents: in a vocabulary to train, or as the meaning of a vocab.txt without settings."""
    keep_accents: bool = False
    """Keep accents in lower-case text. A vocabulary to train keeps them also where stripping them would change more
    than 1 % of the characters: Hindi, Thai, Korean, German, ..."""
    character_coverage: Annotated[float, _Coverage] = CHARACTER_COVERAGE
    """Share of the text whose characters are in the alphabet of a vocabulary to train. A word with any other character
    becomes [UNK]."""
    sequence_length: Annotated[int, _SequenceLength] = 512
    """Tokens of a sample, the three special tokens included."""
    joined: Joined = "join"
    """`join`: documents follow one another within a sample; `pad`: every document begins its own sample."""
    shards: Annotated[int | None, Positive] = None
    """Exact number of training shards."""
    samples_per_shard: Annotated[int | None, Positive] = None
    """Maximum samples of a shard. Without this and `shards`: 8192, or fewer for at least 64 shards, enough for as many
    data-parallel ranks."""
    validation_fraction: Annotated[float, _Fraction] = 0.01
    """Fraction of the text in the validation split, in whole documents; parts of documents that are too long for it."""
    deduplicate: bool = True
    """Skip documents with the same text as an earlier one."""
    near_duplicates: Annotated[float | None, _Similarity] = None
    """Skip documents that share this fraction of their five-word sequences with an earlier one (Jaccard index,
    estimated by MinHash; 0.8 is usual). Needs the extra `near-duplicates`."""
    unicode: Unicode = "none"
    """Unicode normal form, applied before all other steps."""
    min_characters: Annotated[int, NotNegative] = 0
    """Skip shorter documents."""
    language_filter: str | None = None
    """`package.module:function` or `file.py:function` that takes a text and returns whether to keep it."""
    decontaminate: tuple[str, ...] = ()
    """Held-out texts: files, globs or URLs of the same kinds as `source`, with all their fields. Documents that share a
    word n-gram with them are skipped."""
    decontaminate_words: Annotated[int, Positive] = 13
    """Words of such an n-gram."""
    text_field: str = "text"
    """Field of a JSON object, or column of a parquet file, with the text."""
    unit_bytes: Annotated[int, Positive] = UNIT_BYTES
    """Uncompressed files are cut into units of this size, the work items of the ranks."""
    seed: int = 0
    """Seed of the split into training and validation, of the segments, and of the order of the samples."""


def problems(config: PrepareConfig) -> list[str]:
    """Return one sentence for each invalid setting of `config`; files are not checked."""
    problems = []
    if not config.source:
        problems.append("source: nothing to read: give --source 'texts/*.jsonl', or --source python-docs for a demo")
    if (config.vocabulary is None) == (config.vocabulary_size is None):
        problems.append("vocabulary: give either --vocabulary PATH or --vocabulary-size N, for example 30522")
    if config.shards is not None and config.samples_per_shard is not None:
        problems.append("shards and samples_per_shard exclude each other: give one of them")
    return problems + range_problems(config)


def existing_corpus(config: PrepareConfig) -> Manifest | None:
    """Return the manifest of the corpus in `output` if it was prepared with these settings; None without a corpus.

    Raises ConfigError for invalid settings, and for a corpus with other settings.
    """
    raise_if_any(problems(config))
    settings = recorded_settings(config)
    if not (config.output / MANIFEST).exists():
        return None
    manifest = Manifest.load(config.output)
    existing = {**_DEFAULTS_OF_LATER_SETTINGS, **manifest.settings}
    raise_if_different(config.output, existing, settings, content="a corpus")
    return manifest


def raise_if_different(folder: Path, existing: Mapping[str, Any], settings: Mapping[str, Any], *, content: str) -> None:
    """Raise ConfigError with every setting in which the `existing` content of `folder` differs from `settings`."""
    names = [name for name in sorted({*settings, *existing}) if settings.get(name) != existing.get(name)]
    raise_if_any(
        [
            f"{folder} holds {content} with {name} {_shorten(existing.get(name))}, not "
            f"{_shorten(settings.get(name))}: remove the folder or give another --output"
            for name in names
        ]
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}..."


def recorded_settings(config: PrepareConfig) -> dict[str, Any]:
    """Return all inputs of the result as JSON values: settings, names and sizes of files, fingerprints."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del plain["output"]
    files = input_files(config)
    listing = "".join(f"{file.name}\t{file.size}\n" for file in files)
    plain["input_files"] = hashlib.sha256(listing.encode()).hexdigest()
    if config.vocabulary is not None:
        plain["vocabulary_fingerprint"] = given_vocabulary(config).fingerprint
    if config.language_filter is not None:
        plain["language_filter_fingerprint"] = language_filter(config.language_filter).fingerprint
    if config.decontaminate:
        held_out = read_held_out(config.decontaminate, words=config.decontaminate_words)
        plain["decontaminate_fingerprint"] = held_out.fingerprint
    return plain


def given_vocabulary(config: PrepareConfig) -> Vocabulary:
    """Return the vocabulary of `--vocabulary`, read as the settings say."""
    assert config.vocabulary is not None
    return Vocabulary.load(config.vocabulary, cased=config.cased, keep_accents=config.keep_accents)


def input_files(config: PrepareConfig) -> list[SourceFile]:
    """Return the files of the sources but `python-docs`, without the vocab.txt that the preparation writes."""
    own = (config.output / WORD_LIST).resolve()
    files = find_files([source for source in config.source if source != PYTHON_DOCS])
    return [file for file in files if is_url(file.name) or Path(file.name).resolve() != own]
