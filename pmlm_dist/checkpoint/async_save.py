"""Asynchronous saving: training continues while a background thread writes.

    training             save | forward, backward | update | ...                              | next save
                           |                      ^ waits until copied                        ^ waits until written
    thread, each rank      +-> copy to host memory -> write, flush, read back -> rank-i.done
    thread, rank 0                                       all done -> manifest, rename, `latest` -> retention

Weights and moments change only in the optimizer's update, so the copy overlaps the next forward and backward passes.
Ranks report to rank 0 by small files. No collective runs outside the training thread, and any shared file system
suffices. A write that fails on any rank costs this checkpoint alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.checkpoint.engine_state import EngineState, OwnedFragment
from pmlm_dist.checkpoint.files import write_numbers
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.manifest import (
    STATE,
    CorruptCheckpoint,
    FileDigest,
    as_document,
    from_document,
    rank_file,
    read_json,
    write_json,
)
from pmlm_dist.checkpoint.resume import RunState, progress_metadata
from pmlm_dist.checkpoint.staging import StagingBuffer
from pmlm_dist.config import raise_if_any
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.supervision.exit_codes import ExitCode

_POLL_S = 0.05
_LONGEST_POLL_S = 1.0
"""Interval of the listings of a folder by rank 0 once they have found nothing new for a while."""
_GRACE_S = 5.0
_BUSY = "busy"
_LATE = "it took longer than --train.save-timeout-s, or than a signal to stop left time"


class LastCheckpointFailed(RuntimeError):
    """The state at the end of a run could not be written."""

    exit_code = ExitCode.FAILED


class AsyncCheckpointer:
    """Saves the checkpoints of one engine into one folder; constructed and called by every rank alike.

    `metadata`: the run's part of `state.json` (identity, configuration). `timeout_s`: time limit of one checkpoint.
    `deadline`: a second limit as a `time.monotonic` value; it is polled, since a stop signal moves it closer. `on_wait`
    is called at every poll while training waits for a checkpoint. `attempt`: name of this attempt of the run, the same
    on all ranks; random if None. Raises `ConfigError` on every rank when rank 0 cannot write into the folder, or
    another rank does not see its files.
    """

    def __init__(
        self,
        engine: EngineState,
        folder: CheckpointFolder,
        log: RunLog,
        *,
        metadata: dict[str, Any],
        timeout_s: float,
        deadline: Callable[[], float] = lambda: math.inf,
        on_wait: Callable[[], None] = lambda: None,
        attempt: str | None = None,
    ):
        self.failures = 0
        self.stalled_s = 0.0
        """Seconds for which training has waited for saving."""
        self._engine, self._folder, self._log = engine, folder, log
        self._metadata, self._timeout_s, self._deadline, self._on_wait = metadata, timeout_s, deadline, on_wait
        self._memory = StagingBuffer(engine.topology.device)
        self._writer: SaveThread | None = None
        self._attempt = _start_attempt(folder, engine.topology, attempt=attempt or secrets.token_hex(4))
        engine.before_optimizer_step(self._wait_until_copied)

    def save(self, state: RunState, **extra: Any) -> None:
        """Start saving `state`; waits first until the previous checkpoint is written or has failed.

        `extra`: further fields of `state.json`, as JSON values.
        """
        with self._stalled():
            self._finish_previous()
            document = {**progress_metadata(self._engine, state), **self._metadata, **extra, "written_at": time.time()}
            self._writer = SaveThread(
                SaveRequest(
                    step=state.step,
                    folder=self._folder,
                    temporary=self._folder.temporary(state.step, attempt=self._attempt),
                    document=document,
                    timeout_at=time.monotonic() + self._timeout_s,
                    deadline=self._deadline,
                ),
                self._engine,
                self._memory,
            )
            self._writer.start()

    def log_finished(self) -> None:
        """Log the result of the last checkpoint once it is known. Called after every step; never waits."""
        writer = self._writer
        if writer is None or writer.reported or (status := writer.status()) == _BUSY:
            return
        writer.reported = True
        if writer.error is not None:
            raise writer.error
        if writer.path is not None:
            self._log.info(f"checkpoint: {writer.path}" + (f"; warning: {writer.problem}" if writer.problem else ""))
        elif status:
            self._report_failure(writer.request.step, status)

    def wait(self) -> bool:
        """Wait until the last checkpoint is written or has failed; return True unless it failed."""
        self._finish_previous()
        return self._writer is None or not self._writer.failed_anywhere

    def close(self) -> None:
        """Wait until the last checkpoint is written. Raises `LastCheckpointFailed`."""
        if not self.wait():
            assert self._writer is not None
            raise LastCheckpointFailed(
                f"the last checkpoint, of step {self._writer.request.step}, could not be written (see above): make "
                "room, then start the run again"
            )

    def abandon(self) -> None:
        """Wait a few seconds at most for a checkpoint being written: the process is about to exit on an error."""
        if self._writer is not None:
            self._writer.join(_GRACE_S)

    def _report_failure(self, step: int, problem: str) -> None:
        self.failures += 1
        self._log.scalars({"checkpoint/failed": self.failures}, step=step)
        self._log.info(
            f"warning: the checkpoint of step {step} was not written ({problem}); training continues, the previous "
            f"checkpoint is kept; {self.failures} failed since this attempt started"
        )

    def _finish_previous(self) -> None:
        """Wait, on all ranks together, until the last checkpoint is written or has failed.

        Ranks poll with short collectives. A rank that blocked in one until its disk is done would let the other ranks
        run into the collective timeout, and a slow disk must not end the run.
        """
        writer, topology = self._writer, self._engine.topology
        if writer is None or writer.finished:
            return
        while _BUSY in (statuses := topology.all_gather_object(writer.status())):
            problems = {rank: status for rank, status in enumerate(statuses) if status not in ("", _BUSY)}
            if problems:
                writer.set_failed_ranks(problems)
            self._on_wait()
            time.sleep(_POLL_S)
        # Rank 0 decides: it alone commits, and reports success only after the commit.
        writer.finished, writer.failed_anywhere = True, statuses[0] != ""
        if writer.is_alive():  # timed out but still running: it keeps its buffer and must never commit
            writer.abandoned = True
            self._memory = StagingBuffer(topology.device)
        self.log_finished()

    def _wait_until_copied(self) -> None:
        if self._writer is not None and not self._writer.copied.is_set():
            with self._stalled():
                self._writer.copied.wait()

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stalled_s += time.perf_counter() - start


def _start_attempt(folder: CheckpointFolder, topology: Topology, *, attempt: str) -> str:
    """Clean up after earlier attempts and verify that all ranks share `folder`; return the attempt's name."""
    problems: list[str] = []
    if topology.is_rank_zero:
        try:
            folder.remove_temporary()
            folder.temporary(0, attempt=attempt).mkdir(parents=True)
        except OSError as error:
            problems = [f"no checkpoint can be written: {error}"]
    attempt, problems = topology.broadcast_object((attempt, problems))
    raise_if_any(problems)
    seen = topology.all_gather_object(folder.temporary(0, attempt=attempt).is_dir())
    raise_if_any(
        [
            f"--run-dir: rank {rank} does not see in {folder.root} what rank 0 writes there: put it on a file system "
            "that all nodes share"
            for rank, is_seen in enumerate(seen)
            if not is_seen
        ]
    )
    if topology.is_rank_zero:
        folder.temporary(0, attempt=attempt).rmdir()
    return attempt


@dataclass(frozen=True)
class SaveRequest:
    """One checkpoint to write."""

    step: int
    folder: CheckpointFolder
    temporary: Path
    document: dict[str, Any]
    """Content of `state.json`; rank 0 writes it."""
    timeout_at: float
    """`time.monotonic` at which the time limit of a checkpoint expires."""
    deadline: Callable[[], float]
    """Second limit, which a stop signal moves closer."""

    def is_late(self, *, slack_s: float = 0.0) -> bool:
        """Whether either limit passed more than `slack_s` seconds ago."""
        return self._limit() < time.monotonic() - slack_s

    def remaining_s(self) -> float:
        """Seconds until the first limit; a little more than none after it."""
        return max(_POLL_S, self._limit() - time.monotonic())

    def _limit(self) -> float:
        return min(self.timeout_at, self.deadline())


class SaveThread(threading.Thread):
    """Writes this rank's part of one checkpoint; on rank 0 also collects the other parts and commits."""

    def __init__(self, request: SaveRequest, engine: EngineState, memory: StagingBuffer):
        super().__init__(name=f"checkpoint of step {request.step}", daemon=True)
        self.request = request
        self.copied = threading.Event()
        self.path: Path | None = None
        """Committed checkpoint, on rank 0."""
        self.problem: str | None = None
        """Failure that costs this checkpoint alone; with `path`, one of retention."""
        self.error: BaseException | None = None
        """Error of the program, to be raised in the training thread."""
        self.reported = self.finished = self.failed_anywhere = self.abandoned = False
        self._engine, self._topology, self._memory = engine, engine.topology, memory
        self._ready = torch.cuda.Event() if engine.topology.device.type == "cuda" else None
        if self._ready is not None:
            self._ready.record()  # after the work queued so far: the state to copy
        self._failed_ranks: dict[int, str] = {}

    def status(self) -> str:
        """Return `busy`, the problem of a failure, or "" after success."""
        if self.is_alive():
            # With slack, so that a rank 0 about to time out by itself can still remove the folder.
            return _LATE if self.request.is_late(slack_s=2 * _POLL_S) else _BUSY
        if self.error is not None:
            return repr(self.error)
        return "" if self.path is not None or self.problem is None else self.problem

    def set_failed_ranks(self, problems: dict[int, str]) -> None:
        """Pass on the problems of ranks that have failed, by rank: rank 0 stops waiting for their files."""
        self._failed_ranks = problems

    def run(self) -> None:
        """Copy, write, and on rank 0 collect and commit. Failures are kept for the training thread to report."""
        try:
            try:
                owned = self._engine.fragments_to_write()
                self._memory.take(owned, self._ready)
            finally:
                self.copied.set()  # also after a failure: the next optimizer step waits for it
            self._write(owned)
        except (OSError, CorruptCheckpoint) as error:
            self.problem = str(error)
            self._clean_up()
        except BaseException as error:  # an error of the program: raised in the training thread, where it ends the run
            self.error = error

    def _write(self, owned: list[OwnedFragment]) -> None:
        request = self.request
        request.temporary.mkdir(parents=True, exist_ok=True)
        fragments = [part.fragment for part in owned]
        written: dict[str, FileDigest] = {}
        if fragments or self._topology.is_rank_zero:
            name = rank_file(self._topology.rank)
            written[name] = write_numbers(request.temporary / name, fragments, self._memory.chunks())
        if self._topology.is_rank_zero:
            self._commit(written)
        else:
            self._report_to_rank_zero("done", as_document(written))

    def _commit(self, files: dict[str, FileDigest]) -> None:
        request = self.request
        files[STATE] = write_json(request.temporary / STATE, request.document)
        for rank, report in self._wait_for_all_ranks().items():
            if "problem" in report:
                raise OSError(f"rank {rank}: {report['problem']}")
            files |= from_document(report)
            (request.temporary / f"{rank_file(rank)}.done").unlink()
        if self.abandoned:  # training has reported a failure meanwhile: committing now would contradict it
            raise OSError(_LATE)
        self.path = request.folder.commit(request.step, request.temporary, files)
        try:
            request.folder.remove_old(self.path)
        except OSError as error:
            self.problem = f"older checkpoints could not be removed ({error})"

    def _clean_up(self) -> None:
        """Remove partial files: a rank its own, rank 0 the folder after every rank has reported."""
        request = self.request
        with contextlib.suppress(OSError):
            (request.temporary / rank_file(self._topology.rank)).unlink(missing_ok=True)
        if self._topology.is_rank_zero:
            self._wait_for_all_ranks()
            shutil.rmtree(request.temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self._report_to_rank_zero("failed", {"problem": self.problem})

    def _report_to_rank_zero(self, outcome: str, report: dict[str, Any]) -> None:
        # Atomic, not durable: rank 0 must not read half of it, but no later process reads it. An fsync of the folder
        # would race with rank 0, which renames the folder as soon as it has all reports.
        name = f"{rank_file(self._topology.rank)}.{outcome}"
        write_json(self.request.temporary / name, report, durable=False, indent=None)

    def _wait_for_all_ranks(self) -> dict[int, dict[str, Any]]:
        """Return the report of every other rank by rank; for one that failed or is late, its problem."""
        received: dict[int, dict[str, Any]] = {}
        others, pause_s = set(range(1, self._topology.world_size)), _POLL_S
        while True:
            is_late = self.request.is_late()  # before the files are read: a report in time always counts
            received |= self._new_reports(others - received.keys())
            for rank in others - received.keys():
                if is_late or rank in self._failed_ranks:
                    received[rank] = {"problem": self._failed_ranks.get(rank, _LATE)}
            if len(received) == len(others):
                return received
            time.sleep(min(pause_s, self.request.remaining_s()))
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _new_reports(self, ranks: set[int]) -> dict[int, dict[str, Any]]:
        """Return the reports of `ranks` that are there: one listing, however many ranks there are."""
        folder = self.request.temporary
        try:
            names = set(os.listdir(folder))
        except FileNotFoundError:  # a newer attempt has removed it
            return {}
        reports = [(rank, f"{rank_file(rank)}.{outcome}") for rank in ranks for outcome in ("failed", "done")]
        return {rank: read_json(folder / name) for rank, name in reports if name in names}
