"""The distributed program behind `pmlm prepare-corpus`: raw text to shuffled shards, on any number of MPI ranks.

    sources -> units, dealt round-robin to the ranks
      1 scan        clean; a row and, if asked for, a MinHash signature for every document   (cleaning.py, selection.py)
      2 duplicates  rows by digest; all but the first of a group are dropped                            (duplicates.py)
      3 vocabulary  loaded, or trained on rank 0 on a sample of the kept documents; sent to all
      4 pack        tokenise, split, pack; samples by pseudo-random key into sorted runs                   (shuffle.py)
      5 write       even shards of all runs merged, each by one rank; the manifest last, by rank 0

What is written depends on the settings and the input alone: not on the number of ranks. All ranks see one file system.
Units, runs and shards are each finished by themselves (unfinished.py): a run that was interrupted, whatever by, goes on
there with any number of ranks, and leaves no manifest before. Run alone, it is rank 0 of 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.corpus.filters.cleaning import normalized
from pmlm_dist.corpus.input.documents import Skips, Unit, list_units, read_unit
from pmlm_dist.corpus.input.sources import SourceFile, find_files, local_file
from pmlm_dist.corpus.packing.packer import SPECIAL_TOKENS_PER_SAMPLE
from pmlm_dist.corpus.packing.shuffle import BUCKET_BYTES, BUFFER_BYTES, Run, Shuffled, bucket_counts
from pmlm_dist.corpus.packing.sorted_runs import RunPacker
from pmlm_dist.corpus.packing.stream_digest import ORIGINS
from pmlm_dist.corpus.prepare.counts import (
    UnitCounts,
    build_manifest,
    entropy,
    merged,
    raise_if_empty,
    raise_if_too_small,
    summary,
)
from pmlm_dist.corpus.prepare.journal import RUNS, SCAN, SHARDS, Journal
from pmlm_dist.corpus.prepare.mpi import abort_on_failure, barrier, broadcast_from_root, print_once, track, world
from pmlm_dist.corpus.prepare.sampling import (
    VOCABULARY_BINS,
    chosen,
    cutoff,
    held_out_below,
    lowest_draw,
    vocabulary_bins,
    vocabulary_text,
)
from pmlm_dist.corpus.prepare.scan import Scan
from pmlm_dist.corpus.prepare.settings import (
    FEWEST_SHARDS,
    PYTHON_DOCS,
    SAMPLES_PER_SHARD,
    PrepareConfig,
    patterns,
    raise_if_different,
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
    TokenDtype,
    shard_name,
    token_dtype,
    write_shard,
)
from pmlm_dist.vocab import Vocabulary

if TYPE_CHECKING:
    from pmlm_dist.corpus.prepare.mpi import Intracomm

_VOCABULARY = "vocabulary"


def prepare_corpus(config: PrepareConfig) -> Manifest:
    """Prepare the corpus, on all ranks of the MPI world together; every rank returns the manifest.

    Goes on where an interrupted run with the same settings and input stopped. Does nothing if the corpus stands already
    with the same settings. Raises ConfigError for wrong settings, unusable input, and a folder that holds another
    corpus. With several ranks any error ends them all.
    """
    comm = world()
    with abort_on_failure(comm):
        found = broadcast_from_root(comm, standing(config) if comm.rank == 0 else None)
        if found is not None:
            if comm.rank == 0:
                Journal(config.output).remove()  # of a run that ended just after its manifest
            print_once(comm, f"{config.output} stands already with these settings; nothing to do")
            return found
        return _Preparation(config, comm).run()


class _Preparation:
    """One run; the phases in the order of the module's picture."""

    def __init__(self, config: PrepareConfig, comm: Intracomm):
        self.config = config
        self.comm = comm
        self.work = Journal(config.output)
        self.scan = Scan(config, comm, self.work)
        self.seconds: dict[str, float] = {}

    def run(self) -> Manifest:
        with self._phase("sources"):
            units, settings = self._begin()
        with self._phase("scan"):
            found = self.scan.run(units)
        self._judge(raise_if_empty, found)
        with self._phase("duplicates"):
            self.scan.find_duplicates(units)
        with self._phase("vocabulary"):
            vocabulary = self._vocabulary(units)
        with self._phase("pack"):
            runs = self._pack(units, vocabulary)
        totals = merged([UnitCounts.from_json(run["tally"]) for run in runs.values()])
        self._judge(raise_if_too_small, totals)
        with self._phase("write"):
            shards = self._write(runs, totals, vocabulary)
        totals.merge(found)
        counts = self._token_counts(runs, vocabulary_size=vocabulary.size)
        manifest = build_manifest(settings, vocabulary, totals=totals, shards=shards, unigram_entropy=entropy(counts))
        if self.comm.rank == 0:
            vocabulary.save(self.config.output)
            np.save(self.config.output / ORIGINS, _samples_of_units(runs, units=len(units)))
            manifest.save(self.config.output)
            self.work.remove()
            print(summary(self.config, manifest, totals, self.seconds), flush=True)
        barrier(self.comm)
        return manifest

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase and end it on all ranks together."""
        began = time.perf_counter()
        yield
        barrier(self.comm)
        self.seconds[name] = time.perf_counter() - began

    def _judge(self, check: Callable[[PrepareConfig, UnitCounts], None], counts: UnitCounts) -> None:
        """Let rank 0 judge while the others wait."""
        if self.comm.rank == 0:
            with self._useless_if_refused():
                check(self.config, counts)
        barrier(self.comm)

    @contextmanager
    def _useless_if_refused(self) -> Iterator[None]:
        """On rank 0: what is done under settings that cannot be goes, so that better ones are not refused for it."""
        try:
            yield
        except ConfigError:
            self.work.remove()
            raise

    # 0

    def _begin(self) -> tuple[list[Unit], dict[str, Any]]:
        """The units and the recorded settings; what lies unfinished is kept if it comes from the same."""
        found = None
        if self.comm.rank == 0:
            settings, before = recorded(self.config), self.work.identity()
            if before is not None:
                raise_if_different(self.work.folder, before["settings"], settings, holds="an unfinished corpus")
            files = _source_files(self.config, goes_on=before is not None)
            listing = [list(dataclasses.astuple(file)) for file in files]
            units = list_units(files, unit_bytes=self.config.unit_bytes)
            for line in uneven_files(files, ranks=self.comm.size, unit_bytes=self.config.unit_bytes):
                print(line, flush=True)
            if before is None:
                _clear(self.config.output)
                self.work.begin({"settings": settings, "files": listing})
            else:
                _refuse_changed(self.work.folder, before["files"], listing)
                self._say_what_is_done(units)
            found = units, settings
        found = broadcast_from_root(self.comm, found)
        assert found is not None
        return found

    def _say_what_is_done(self, units: Sequence[Unit]) -> None:
        packed = sum(len(run["units"]) for run in self.work.done(RUNS).values())
        print(
            f"going on with an interrupted run: of {len(units)} parts of the input {len(self.work.done(SCAN))} are "
            f"scanned and {packed} packed; {len(self.work.done(SHARDS))} shards are written",
            flush=True,
        )

    # 3

    def _vocabulary(self, units: Sequence[Unit]) -> Vocabulary:
        folder = self.work.path(_VOCABULARY, "")
        stands = broadcast_from_root(self.comm, folder.is_dir() if self.comm.rank == 0 else False)
        trains = not stands and self.config.vocabulary is None
        texts = self._vocabulary_texts(units) if trains else []
        vocabulary = None
        if self.comm.rank == 0:
            if trains:
                with self._useless_if_refused():
                    vocabulary = Vocabulary.train(texts, self.config.vocabulary_size or 0)
                vocabulary.save(temporary := folder.with_name(f".{_VOCABULARY}"))
                temporary.replace(folder)
            else:
                vocabulary = Vocabulary.load(folder if stands else self.config.vocabulary or folder)
        vocabulary = broadcast_from_root(self.comm, vocabulary)
        assert vocabulary is not None
        return vocabulary

    def _vocabulary_texts(self, units: Sequence[Unit]) -> list[str]:
        """On rank 0 a pseudo-random sample of the kept documents; elsewhere nothing."""
        seed, bins = self.config.seed, np.zeros(VOCABULARY_BINS, np.int64)
        for unit in self.scan.own(units):
            bins += vocabulary_bins(self.scan.kept(unit), seed=seed, unit=unit.number)
        below = cutoff(self.comm.allreduce(bins), budget=self.config.vocabulary_sample_bytes)
        texts: list[str] = []
        for unit in track(self.comm, self.scan.own(units), label="vocabulary"):
            wanted = chosen(self.scan.kept(unit), seed=seed, unit=unit.number, below=below)
            documents = read_unit(unit, text_field=self.config.text_field, skips=Skips()) if wanted else ()
            texts += [
                vocabulary_text(normalized(document, self.config.unicode))
                for document in documents
                if document.number in wanted
            ]
        barrier(self.comm)
        gathered = self.comm.gather(texts)
        return [text for texts in gathered or () for text in texts]

    # 4

    def _pack(self, units: Sequence[Unit], vocabulary: Vocabulary) -> dict[str, Any]:
        """Pack what is not packed; the records of all pieces of work."""
        packed = {int(number) for run in self._packed().values() for number in run["units"]}
        missing = [unit for unit in units if unit.number not in packed]
        packing = RunPacker(
            self.scan, vocabulary, held_out_below=self._held_out_below(units), buffer_bytes=BUFFER_BYTES
        )
        for unit in track(self.comm, self.scan.own(missing), label="pack"):
            packing.add(unit)
        packing.finish()
        barrier(self.comm)
        return self._packed()

    def _packed(self) -> dict[str, Any]:
        return broadcast_from_root(self.comm, self.work.done(RUNS) if self.comm.rank == 0 else {})

    def _held_out_below(self, units: Sequence[Unit]) -> int:
        """Documents with a lower draw are held out."""
        lowest = [
            lowest_draw(self.scan.kept(unit), seed=self.config.seed, unit=unit.number) for unit in self.scan.own(units)
        ]
        own = min((draw for draw in lowest if draw is not None), default=None)
        return held_out_below(self.config.validation_fraction, self.comm.allgather(own))

    def _token_counts(self, runs: Mapping[str, Any], *, vocabulary_size: int) -> np.ndarray:
        """How often each token occurs in the training split."""
        counts = np.zeros(vocabulary_size, np.int64)
        for name in list(runs)[self.comm.rank :: self.comm.size]:
            counts += np.load(self.work.path(RUNS, f"{name}.npy"))
        return self.comm.allreduce(counts)

    # 5

    def _write(self, runs: Mapping[str, Any], totals: UnitCounts, vocabulary: Vocabulary) -> dict[str, list[Shard]]:
        """All shards by split, in order; each rank writes neighbours, which share what it has to read."""
        for split, shards in _shard_numbers(self.config, totals.samples).items():
            shuffled = self._shuffled(runs, split, totals, token_dtype(vocabulary.size))
            done = broadcast_from_root(self.comm, set(self.work.done(SHARDS)) if self.comm.rank == 0 else set())
            cuts = even_cuts(totals.samples[split], shards)
            work = [(number, cut) for number, cut in enumerate(cuts) if f"{split}-{number:06d}" not in done]
            first, last = even_cuts(len(work), self.comm.size)[self.comm.rank]
            for number, (start, stop) in track(self.comm, work[first:last], label=f"write {split}"):
                samples = shuffled.read(start, stop)
                name, dtype = shard_name(split, number), token_dtype(vocabulary.size)
                shard = write_shard(self.config.output, name, samples, first=start, dtype=dtype)
                self.work.finish(SHARDS, f"{split}-{number:06d}", dataclasses.asdict(shard))
            barrier(self.comm)
        written = broadcast_from_root(self.comm, self.work.done(SHARDS) if self.comm.rank == 0 else {})
        return {
            split: [Shard(**record) for name, record in written.items() if name.startswith(f"{split}-")]
            for split in SPLITS
        }

    def _shuffled(self, runs: Mapping[str, Any], split: str, totals: UnitCounts, dtype: TokenDtype) -> Shuffled:
        names = [name for record in runs.values() for name in record["runs"][split]]
        sorted_runs = [Run(self.work.path(RUNS, ""), name, dtype) for name in names]
        tokens = totals.content_tokens[split] + SPECIAL_TOKENS_PER_SAMPLE * totals.samples[split]
        buckets = max(1, math.ceil(tokens * np.dtype(dtype).itemsize / BUCKET_BYTES))
        own = (bucket_counts(run, buckets) for run in sorted_runs[self.comm.rank :: self.comm.size])
        return Shuffled(sorted_runs, self.comm.allreduce(sum(own, np.zeros(buckets, np.int64))).tolist())


# ------------------------------------------------------------------------------------------------------- pieces of work


def _source_files(config: PrepareConfig, *, goes_on: bool) -> list[SourceFile]:
    """The input; the docstrings are collected first if they are asked for, and not there from an interrupted run."""
    files = find_files(patterns(config))
    if PYTHON_DOCS not in config.source:
        return files
    from pmlm_dist.corpus.input.python_docs import write_python_docs

    path = config.output / f"{PYTHON_DOCS}.jsonl"
    if not (goes_on and path.is_file()):
        counts = write_python_docs(path)
        print(
            f"{counts.docstrings} docstrings in {counts.files} files, {counts.unparsable} files unreadable", flush=True
        )
    return [local_file(path), *files]


def uneven_files(files: Sequence[SourceFile], *, ranks: int, unit_bytes: int) -> list[str]:
    """A line if a file that cannot be cut into units is more than a rank's share of the input, so that others idle."""
    share = max(sum(file.size for file in files) / ranks, unit_bytes)
    whole = [file for file in files if file.kind[1] != "none" or not file.seekable]
    largest = max(whole, key=lambda file: file.size, default=None)
    if ranks == 1 or largest is None or largest.size <= share:
        return []
    return [
        f"{largest.name} ({largest.size:,} bytes) cannot be cut: it is compressed, or its server gives whole files "
        f"only. One of {ranks} ranks reads it while the others wait: unpack it, or split it into {ranks} files or more"
    ]


def _refuse_changed(folder: Path, before: list[list[Any]], now: list[list[Any]]) -> None:
    """Raise ConfigError if files were changed (in size or time) since the interrupted run listed them."""
    names = [file[0] for file in now if file not in before] or [file[0] for file in before if file not in now]
    if names:
        raise_if_any(
            [
                f"{folder} holds an unfinished corpus of other input: {len(names)} files changed since, {names[0]} for "
                "one: remove the folder or give another --output"
            ]
        )


def _clear(output: Path) -> None:
    """Remove what other settings left in `output`."""
    for leftover in [*output.glob(f".{MANIFEST}.*"), *output.glob("*/shard-*.tar"), output / ORIGINS]:
        leftover.unlink(missing_ok=True)


def _samples_of_units(runs: Mapping[str, Any], *, units: int) -> np.ndarray:
    table = np.zeros((units, len(SPLITS)), np.int64)
    for record in runs.values():
        for unit, samples in record["units"].items():
            table[int(unit)] = samples
    return table


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
