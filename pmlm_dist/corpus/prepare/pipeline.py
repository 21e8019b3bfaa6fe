"""The distributed program of `pmlm prepare-corpus`: raw text to shuffled shards, on any number of MPI ranks.

    sources -> units, assigned round-robin to the ranks
      1 scan        clean; a row and, if enabled, a MinHash signature for every document      (cleaning.py, sampling.py)
      2 duplicates  rows partitioned by digest; all but the first of a group are skipped                (duplicates.py)
      3 vocabulary  loaded, or trained by rank 0 on a sample of the kept documents; broadcast
      4 pack        tokenize, split, pack; samples by pseudo-random key into sorted runs                   (shuffle.py)
      5 write       merge all runs into even shards, each by one rank; rank 0 writes the manifest last

The output depends on the settings and the input only, not on the number of ranks. All ranks see one file system.
Finished units, runs and shards are recorded in a journal (journal.py). An interrupted preparation resumes from it with
any number of ranks. There is no manifest before the end. Without mpirun the program runs as rank 0 of 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.arrays import save_array
from pmlm_dist.corpus.filters.cleaning import normalize
from pmlm_dist.corpus.input.documents import read_unit
from pmlm_dist.corpus.input.records import SkippedRecords
from pmlm_dist.corpus.input.units import Unit, list_units
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.packing.shuffle import BUCKET_BYTES, BUFFER_BYTES, MergedRuns, SortedRun, count_per_bucket
from pmlm_dist.corpus.packing.stream_digest import UNIT_SAMPLES
from pmlm_dist.corpus.prepare.counts import (
    UnitCounts,
    build_manifest,
    raise_if_empty,
    raise_if_too_small,
    sum_counts,
    summary,
)
from pmlm_dist.corpus.prepare.journal import FOLDER, RUNS, SCAN, SHARDS, Journal
from pmlm_dist.corpus.prepare.mpi import barrier, compute_on_rank_zero, track, world
from pmlm_dist.corpus.prepare.sampling import (
    HASH_BINS,
    piece_text,
    sampled_pieces,
    vocabulary_pieces,
    vocabulary_threshold,
)
from pmlm_dist.corpus.prepare.scan import Scan
from pmlm_dist.corpus.prepare.settings import (
    MIN_SHARDS,
    SAMPLES_PER_SHARD,
    PrepareConfig,
    existing_corpus,
    given_vocabulary,
    raise_if_different,
    recorded_settings,
)
from pmlm_dist.corpus.prepare.sorted_runs import RunPacker
from pmlm_dist.corpus.prepare.source_files import raise_if_changed, source_files, unsplittable_warnings
from pmlm_dist.corpus.shards import (
    MANIFEST,
    SPLITS,
    TRAIN,
    VALIDATION,
    Manifest,
    Shard,
    TokenDtype,
    shard_name,
    token_dtype,
    write_shard,
)
from pmlm_dist.folder_lock import FolderLock
from pmlm_dist.vocabulary.vocabulary import VOCABULARY_FILES, Vocabulary

if TYPE_CHECKING:
    from pmlm_dist.corpus.prepare.mpi import Intracomm

_VOCABULARY = "vocabulary"


def prepare_corpus(config: PrepareConfig) -> Manifest:
    """Prepare the corpus on all ranks of the MPI world together; every rank returns the manifest.

    Resumes an interrupted preparation with the same settings and input. Does nothing if the corpus exists with the same
    settings. Raises ConfigError for invalid settings, unusable input, and a folder with other contents; `FolderInUse`
    while another preparation writes into the folder.
    """
    comm = world()
    with ExitStack() as stack:
        existing, lock = None, None
        if comm.rank == 0:
            existing = existing_corpus(config)
            if existing is None or (config.output / FOLDER).exists():
                lock = stack.enter_context(FolderLock.acquire(config.output))
                existing = existing_corpus(config) if (config.output / MANIFEST).exists() else None
            if existing is not None:
                if lock is not None:
                    Journal(config.output).remove()  # left by a run that was killed right after it wrote the manifest
                print(f"{config.output} exists already with these settings; nothing to do", flush=True)
        existing = compute_on_rank_zero(comm, lambda: existing)
        if existing is not None:
            return existing
        return _Preparation(config, comm, check_lock=lock.check if lock else lambda: None).run()


class _Preparation:
    """One run of the program; the phases are those of the module's picture."""

    def __init__(self, config: PrepareConfig, comm: Intracomm, *, check_lock: Callable[[], None]):
        self.config = config
        self.comm = comm
        self.check_lock = check_lock
        self.journal = Journal(config.output)
        self.scan = Scan(config, comm, self.journal)
        self.seconds: dict[str, float] = {}

    def run(self) -> Manifest:
        with self._phase("sources"):
            units, settings = compute_on_rank_zero(self.comm, self._begin)
            self._raise_if_not_shared(settings)
        with self._phase("scan"):
            scanned = self.scan.run(units)
        self._check(raise_if_empty, scanned)
        with self._phase("duplicates"):
            self.scan.find_duplicates(units)
            self.lengths = self.scan.document_lengths(units)
        with self._phase("vocabulary"):
            vocabulary = self._vocabulary(units)
        with self._phase("pack"):
            runs = self._pack(units, vocabulary)
        totals = sum_counts(UnitCounts.from_json(record["counts"]) for record in runs.values())
        self._check(raise_if_too_small, totals)
        with self._phase("write"):
            shards = self._write(runs, totals, vocabulary)
        totals.merge(scanned)
        counts = self._token_counts(runs, vocabulary_size=vocabulary.size)
        manifest = build_manifest(settings, vocabulary, totals=totals, shards=shards, token_counts=counts)
        if self.comm.rank == 0:
            vocabulary.save(self.config.output)
            save_array(self.config.output / UNIT_SAMPLES, _unit_samples(runs, units=len(units)))
            self.check_lock()
            manifest.save(self.config.output)
            self.journal.remove()
            report = summary(self.config, manifest, totals, self.seconds, vocabulary, lengths=self.lengths)
            print(report, flush=True)
        barrier(self.comm)
        return manifest

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase; wait for all ranks at its end."""
        start = time.perf_counter()
        yield
        self.check_lock()
        barrier(self.comm)
        self.seconds[name] = time.perf_counter() - start

    def _check(self, check: Callable[[PrepareConfig, UnitCounts], None], counts: UnitCounts) -> None:
        """Check the counts on rank 0 while the others wait."""
        with self._journal_removed_on_error():
            compute_on_rank_zero(self.comm, lambda: check(self.config, counts))

    @contextmanager
    def _journal_removed_on_error(self) -> Iterator[None]:
        """On rank 0: delete the work of unusable settings. Otherwise corrected settings would not match the journal."""
        try:
            yield
        except ConfigError:
            self.journal.discard()
            raise

    # 0

    def _begin(self) -> tuple[list[Unit], dict[str, Any]]:
        """On rank 0: start a journal, or resume one of the same settings and input; return units and settings."""
        settings, identity = recorded_settings(self.config), self.journal.identity()
        if identity is not None:
            raise_if_different(self.journal.folder, identity["settings"], settings, content="an unfinished corpus")
        else:
            self.journal.raise_if_not_alone()
        files = source_files(self.config, self.journal)
        listing = [list(dataclasses.astuple(file)) for file in files]
        units = list_units(files, unit_bytes=self.config.unit_bytes)
        for line in unsplittable_warnings(files, ranks=self.comm.size, unit_bytes=self.config.unit_bytes):
            print(line, flush=True)
        self.journal.remove_temporary_files()
        if identity is None:
            self.journal.begin({"settings": settings, "files": listing})
        else:
            raise_if_changed(self.journal.folder, identity["files"], listing)
            self._print_resumed(units)
        return units, settings

    def _raise_if_not_shared(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError on rank 0 if a rank does not see its journal: that rank's documents would be missing."""
        identity = self.journal.identity()
        seen = self.comm.gather(identity is not None and identity["settings"] == settings)
        raise_if_any(
            [
                f"--output: rank {rank} does not see in {self.config.output} what rank 0 writes there: give a folder "
                "of a file system that all nodes share"
                for rank, is_seen in enumerate(seen or ())
                if not is_seen
            ]
        )
        barrier(self.comm)

    def _print_resumed(self, units: Sequence[Unit]) -> None:
        packed = sum(len(record["units"]) for record in self.journal.committed(RUNS).values())
        print(
            f"resuming an interrupted run: of {len(units)} units of the input {len(self.journal.committed(SCAN))} are "
            f"scanned and {packed} packed; {len(self.journal.committed(SHARDS))} shards are written",
            flush=True,
        )

    # 3

    def _vocabulary(self, units: Sequence[Unit]) -> Vocabulary:
        folder = self.journal.path(_VOCABULARY, "")
        is_trained = compute_on_rank_zero(self.comm, folder.is_dir)
        needs_training = not is_trained and self.config.vocabulary is None
        texts = self._vocabulary_texts(units) if needs_training else []

        def load_or_train() -> Vocabulary:
            if needs_training:
                with self._journal_removed_on_error():
                    vocabulary = Vocabulary.train(
                        texts,
                        self.config.vocabulary_size or 0,
                        cased=self.config.cased,
                        keep_accents=self.config.keep_accents,
                        coverage=self.config.character_coverage,
                    )
                vocabulary.save(temporary := folder.with_name(f".{_VOCABULARY}"))
                temporary.replace(folder)  # a folder of two files appears at once
            else:
                vocabulary = Vocabulary.load(folder) if is_trained else given_vocabulary(self.config)
            for note in vocabulary.notes:
                print(f"vocabulary: {note}", flush=True)
            return vocabulary

        return compute_on_rank_zero(self.comm, load_or_train)

    def _vocabulary_texts(self, units: Sequence[Unit]) -> list[str]:
        """Return a pseudo-random sample of the kept text on rank 0; an empty list on other ranks."""
        bins = np.zeros(HASH_BINS, np.int64)
        for _, pieces in self.scan.pieces(units, vocabulary_pieces):
            pieces.add_to(bins)
        below = vocabulary_threshold(self.comm.allreduce(bins), budget=self.config.vocabulary_sample_bytes)
        texts: list[str] = []
        for unit in track(self.comm, self.scan.assigned(units), label="vocabulary"):
            rows = self.scan.kept(unit)
            pieces = vocabulary_pieces(rows, seed=self.config.seed, unit=unit.number)
            sampled = sampled_pieces(rows, pieces, below=below)
            documents = read_unit(unit, text_field=self.config.text_field, skipped=SkippedRecords()) if sampled else ()
            for document in documents:
                text = normalize(document, self.config.unicode).text if document.number in sampled else ""
                texts += [piece_text(text, piece) for piece in sampled.get(document.number, ())]
        barrier(self.comm)
        gathered = self.comm.gather(texts)
        return [text for texts in gathered or () for text in texts]

    # 4

    def _pack(self, units: Sequence[Unit], vocabulary: Vocabulary) -> dict[str, Any]:
        """Pack the units that are not in the journal; return the records of all runs."""
        packed = {int(number) for record in self._committed(RUNS).values() for number in record["units"]}
        missing = [unit for unit in units if unit.number not in packed]
        packer = RunPacker(
            self.scan, vocabulary, held_out=self.scan.validation_sample(units, self.lengths), buffer_bytes=BUFFER_BYTES
        )
        for unit in track(self.comm, self.scan.assigned(missing), label="pack"):
            packer.add(unit)
        packer.commit()
        barrier(self.comm)
        runs = self._committed(RUNS)
        packed = Counter(int(number) for record in runs.values() for number in record["units"])
        if packed != Counter(unit.number for unit in units):
            raise RuntimeError(f"{self.journal.folder}: {len(packed)} of {len(units)} units are packed exactly once")
        return runs

    def _committed(self, kind: str) -> dict[str, Any]:
        return compute_on_rank_zero(self.comm, lambda: self.journal.committed(kind))

    def _token_counts(self, runs: Mapping[str, Any], *, vocabulary_size: int) -> np.ndarray:
        """Count each token in the training split, shape [vocabulary_size]."""
        counts = np.zeros(vocabulary_size, np.int64)
        for name in list(runs)[self.comm.rank :: self.comm.size]:
            counts += np.load(self.journal.path(RUNS, f"{name}.npy"))
        return self.comm.allreduce(counts)

    # 5

    def _write(self, runs: Mapping[str, Any], totals: UnitCounts, vocabulary: Vocabulary) -> dict[str, list[Shard]]:
        """Write all shards; return them by split, in order. A rank writes consecutive ones, which share buckets."""
        dtype = token_dtype(vocabulary.size)
        shards_per_split = _shards_per_split(self.config, totals.samples)
        if self.comm.rank == 0:
            names = [shard_name(split, number) for split, count in shards_per_split.items() for number in range(count)]
            self.journal.add_outputs([*names, UNIT_SAMPLES, MANIFEST, *VOCABULARY_FILES])
        barrier(self.comm)
        for split, shards in shards_per_split.items():
            merged = self._merged_runs(runs, split, totals, dtype)
            written = self._committed(SHARDS)
            ranges = even_ranges(totals.samples[split], shards)
            missing = [
                (number, each) for number, each in enumerate(ranges) if _shard_stem(split, number) not in written
            ]
            first, last = even_ranges(len(missing), self.comm.size)[self.comm.rank]
            for number, (start, stop) in track(self.comm, missing[first:last], label=f"write {split}"):
                samples = merged.read(start, stop)
                shard = write_shard(self.config.output, shard_name(split, number), samples, first=start, dtype=dtype)
                self.journal.commit(SHARDS, _shard_stem(split, number), dataclasses.asdict(shard))
            barrier(self.comm)
        written = self._committed(SHARDS)
        return {
            split: [Shard(**record) for stem, record in written.items() if stem.startswith(f"{split}-")]
            for split in SPLITS
        }

    def _merged_runs(self, runs: Mapping[str, Any], split: str, totals: UnitCounts, dtype: TokenDtype) -> MergedRuns:
        names = [name for record in runs.values() for name in record["runs"][split]]
        sorted_runs = [SortedRun(self.journal.path(RUNS, ""), name, dtype) for name in names]
        tokens = totals.content_tokens[split] + SPECIAL_TOKENS_PER_SAMPLE * totals.samples[split]
        buckets = max(1, math.ceil(tokens * np.dtype(dtype).itemsize / BUCKET_BYTES))
        own = (count_per_bucket(run, buckets) for run in sorted_runs[self.comm.rank :: self.comm.size])
        return MergedRuns(sorted_runs, self.comm.allreduce(sum(own, np.zeros(buckets, np.int64))).tolist())


# ---------------------------------------------------------------------------------------------------- files and ranges


def _unit_samples(runs: Mapping[str, Any], *, units: int) -> np.ndarray:
    """Return the number of samples of every unit, shape [units, splits]."""
    table = np.zeros((units, len(SPLITS)), np.int64)
    for record in runs.values():
        for unit, samples in record["units"].items():
            table[int(unit)] = samples
    return table


def even_ranges(total: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, stop) of `parts` consecutive ranges of 0 .. total - 1 whose sizes differ by at most one."""
    ends = [number * total // parts for number in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _shard_stem(split: str, number: int) -> str:
    """Name of a shard in the journal."""
    return f"{split}-{number:06d}"


def _shards_per_split(config: PrepareConfig, samples: Mapping[str, int]) -> dict[str, int]:
    """Return the number of shards of each split; validation shards are about as large as training shards."""
    shards = config.shards
    if shards is None and config.samples_per_shard is not None:
        shards = math.ceil(samples[TRAIN] / config.samples_per_shard)
    elif shards is None:
        shards = max(math.ceil(samples[TRAIN] / SAMPLES_PER_SHARD), min(MIN_SHARDS, samples[TRAIN]))
    return {TRAIN: shards, VALIDATION: math.ceil(samples[VALIDATION] * shards / max(1, samples[TRAIN]))}
