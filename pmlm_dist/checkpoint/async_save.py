"""Saving while the training goes on.

    training            save | forward, backward | update | ...                              | next save
                          |                      ^ waits until copied                        ^ waits until written
    writer, each rank     +-> copy to host memory -> write, flush, read back -> rank-i.done
    writer, rank 0                                      all done -> manifest, name, `latest` -> old ones go

Weights and moments change in the optimizer's update alone, so they are copied while the next forward and backward
passes run. Ranks tell rank 0 that they are done by small files, so no collective runs outside the training's own
thread and any shared file system will do. A write that fails on any rank costs this checkpoint and nothing else.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmlm_dist.checkpoint.engine_state import EngineState, OwnedFragment
from pmlm_dist.checkpoint.files import (
    STATE,
    CorruptCheckpoint,
    FileDigest,
    rank_file,
    read_json,
    write_json,
    write_numbers,
)
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState, describe
from pmlm_dist.config import raise_if_any
from pmlm_dist.metrics.run_log import RunLog
from pmlm_dist.parallel.groups import Topology

_CHUNK_BYTES = 2**24
_POLL_S = 0.05
_GRACE_S = 5.0
_BUSY = "busy"
_LATE = "it took longer than --train.save-timeout-s, or than a signal to stop left time"


class AsyncCheckpointer:
    """Saves one engine's checkpoints into one folder; made, and told what to do, by every rank alike.

    Raises `ConfigError` on every rank when rank 0 cannot write there, or another rank does not see what it writes.
    `about`: what `state.json` says of the run (identity, configuration). `timeout_s`: a checkpoint that is not written
    by then is given up; so is one that is not when `limit()` (`time.monotonic`) is past, which may come nearer.
    `alive` is called again and again while the training waits for a checkpoint. `life`: name of this start of the run,
    the same on all ranks; drawn when there is none.
    """

    def __init__(
        self,
        engine: EngineState,
        folder: CheckpointFolder,
        log: RunLog,
        *,
        about: dict[str, Any],
        timeout_s: float,
        limit: Callable[[], float] = lambda: math.inf,
        alive: Callable[[], None] = lambda: None,
        attempt: str | None = None,
    ):
        self.failures = 0
        self.stalled_s = 0.0
        """Seconds that the training has stood still for saving."""
        self._engine, self._folder, self._log = engine, folder, log
        self._about, self._timeout_s, self._limit, self._alive = about, timeout_s, limit, alive
        self._memory = StagingBuffer(engine.topology.device)
        self._writer: SaveThread | None = None
        self._life = _begin_life(folder, engine.topology, attempt=attempt or secrets.token_hex(4))
        engine.before_optimizer_step(self._wait_until_copied)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that has been written."""
        return next(reversed(self._folder.steps()), None)

    def save(self, state: RunState, **facts: Any) -> None:
        """Start to save `state`; waits until the last checkpoint is written, or has failed.

        `facts`: what `state.json` says besides, as JSON values.
        """
        with self._stalled():
            self._settle()
            document = {**describe(self._engine, state), **self._about, **facts, "written_at": time.time()}
            self._writer = SaveThread(
                SaveRequest(
                    step=state.step,
                    folder=self._folder,
                    temporary=self._folder.temporary(state.step, attempt=self._life),
                    rank=self._engine.topology.rank,
                    ranks=self._engine.topology.world_size,
                    document=document,
                    deadline=time.monotonic() + self._timeout_s,
                    limit=self._limit,
                ),
                self._engine,
                self._memory,
            )
            self._writer.start()

    def log_finished(self) -> None:
        """Say what became of the last checkpoint, once that is known. To be called after every step; never waits."""
        writer = self._writer
        if writer is None or writer.reported or (outcome := writer.state()) == _BUSY:
            return
        writer.reported = True
        if writer.error is not None:
            raise writer.error
        if writer.path is not None:
            self._log.info(f"checkpoint: {writer.path}" + (f"; warning: {writer.problem}" if writer.problem else ""))
        elif outcome:
            self._report_failure(writer.order.step, outcome)

    def wait(self) -> bool:
        """Wait until the last checkpoint is written; whether it could be."""
        self._settle()
        return self._writer is None or not self._writer.failed_anywhere

    def close(self) -> None:
        """Wait until the last checkpoint is written. Raises RuntimeError when it could not be."""
        if not self.wait():
            assert self._writer is not None
            raise RuntimeError(
                f"the last checkpoint, of step {self._writer.order.step}, could not be written (see above): make room, "
                "then start the run again"
            )

    def abandon(self) -> None:
        """Give a checkpoint that is being written a few seconds to get done: this process ends before its time."""
        if self._writer is not None:
            self._writer.join(_GRACE_S)

    def _report_failure(self, step: int, problem: str) -> None:
        self.failures += 1
        self._log.failed_checkpoints(self.failures, step=step)
        self._log.info(
            f"warning: the checkpoint of step {step} was not written ({problem}); the training goes on, the one before "
            f"stands; {self.failures} failed since this run was started"
        )

    def _settle(self) -> None:
        """Wait, on all ranks together, until the last checkpoint is written or has failed.

        No rank waits for another inside a collective for longer than a poll: a slow disk must not end the run.
        """
        writer, topology = self._writer, self._engine.topology
        if writer is None or writer.settled:
            return
        while _BUSY in (states := topology.all_gather_object(writer.state())):
            problems = {rank: state for rank, state in enumerate(states) if state not in ("", _BUSY)}
            if problems:
                writer.give_up(problems)
            self._alive()
            time.sleep(_POLL_S)
        writer.settled, writer.failed_anywhere = True, states[0] != ""
        if writer.is_alive():  # past its time and still at it: leave it its copy, and never its name to what it writes
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


def _begin_life(folder: CheckpointFolder, topology: Topology, *, attempt: str) -> str:
    """A name for this start of the run, once nothing of earlier ones is left and all ranks have seen a first sign."""
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
    """One checkpoint to be written, as one rank sees it."""

    step: int
    folder: CheckpointFolder
    temporary: Path
    rank: int
    ranks: int
    document: dict[str, Any]
    """Content of `state.json`; rank 0 writes it."""
    deadline: float
    limit: Callable[[], float]

    def is_late(self, *, slack_s: float = 0.0) -> bool:
        """Whether the time to write it is over, and `slack_s` seconds more."""
        return time.monotonic() > min(self.deadline, self.limit()) + slack_s


class SaveThread(threading.Thread):
    """Writes this rank's part of one checkpoint; rank 0's then makes the checkpoint of all parts."""

    def __init__(self, order: SaveRequest, engine: EngineState, memory: StagingBuffer):
        super().__init__(name=f"checkpoint of step {order.step}", daemon=True)
        self.order = order
        self.copied = threading.Event()
        self.path: Path | None = None
        self.problem: str | None = None
        self.error: BaseException | None = None
        self.reported = self.settled = self.failed_anywhere = self.abandoned = False
        self._engine, self._memory = engine, memory
        self._ready = _mark(engine.topology.device)
        self._given_up: dict[int, str] = {}

    def state(self) -> str:
        """`busy`, or what went wrong, or nothing when all is done."""
        if self.is_alive():
            return _LATE if self.order.is_late(slack_s=2 * _POLL_S) else _BUSY
        if self.error is not None:
            return repr(self.error)
        return "" if self.path is not None or self.problem is None else self.problem

    def give_up(self, problems: dict[int, str]) -> None:
        """Tell that other ranks have failed, and how: there is no need to wait for their word."""
        self._given_up = problems

    def run(self) -> None:
        """Copy, write, and on rank 0 collect and commit. What fails is kept for the training's thread to report."""
        try:
            try:
                pieces = self._engine.fragments_to_write()
                self._memory.take(pieces, self._ready)
            finally:
                self.copied.set()
            self._write(pieces)
        except (OSError, CorruptCheckpoint) as error:
            self.problem = str(error)
            self._withdraw()
        except BaseException as error:  # a fault of the program: raised again where it ends the run
            self.error = error

    def _write(self, pieces: list[OwnedFragment]) -> None:
        order = self.order
        order.temporary.mkdir(parents=True, exist_ok=True)
        fragments = [piece.fragment for piece in pieces]
        written = write_numbers(order.temporary / rank_file(order.rank), fragments, self._memory.chunks())
        if order.rank == 0:
            self._complete(written)
        else:
            self._mark_done("done", asdict(written))

    def _complete(self, written: FileDigest) -> None:
        order = self.order
        files = {rank_file(0): written, STATE: write_json(order.temporary / STATE, order.document)}
        for rank, word in self._wait_for_all_ranks().items():
            if "sha256" not in word:
                raise OSError(f"rank {rank}: {word['problem']}")
            files[rank_file(rank)] = FileDigest(**word)
            (order.temporary / f"{rank_file(rank)}.done").unlink()
        if self.abandoned:
            raise OSError(_LATE)
        self.path = order.folder.commit(order.step, order.temporary, files)
        try:
            order.folder.remove_old(self.path)
        except OSError as error:
            self.problem = f"older checkpoints could not be removed ({error})"

    def _withdraw(self) -> None:
        """Leave nothing behind: a rank its own file, rank 0 the folder once all have told how they fared."""
        order = self.order
        with contextlib.suppress(OSError):
            (order.temporary / rank_file(order.rank)).unlink(missing_ok=True)
        if order.rank == 0:
            self._wait_for_all_ranks()
            shutil.rmtree(order.temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self._mark_done("failed", {"problem": self.problem})

    def _mark_done(self, word: str, value: dict[str, Any]) -> None:
        """Leave word for rank 0, in a file that is whole or not there."""
        name = self.order.temporary / f"{rank_file(self.order.rank)}.{word}"
        part = name.with_suffix(".part")
        write_json(part, value)
        os.replace(part, name)

    def _wait_for_all_ranks(self) -> dict[int, dict[str, Any]]:
        """What every other rank has told, or why it has not, by rank."""
        heard: dict[int, dict[str, Any]] = {}
        while len(heard) < self.order.ranks - 1:
            is_late = self.order.is_late()
            for rank in set(range(1, self.order.ranks)) - heard.keys():
                word = self._wait_for_rank(rank)
                if word is None and (is_late or rank in self._given_up):
                    word = {"problem": self._given_up.get(rank, _LATE)}
                if word is not None:
                    heard[rank] = word
            if len(heard) < self.order.ranks - 1:
                time.sleep(_POLL_S)
        return heard

    def _wait_for_rank(self, rank: int) -> dict[str, Any] | None:
        for word in ("done", "failed"):
            path = self.order.temporary / f"{rank_file(rank)}.{word}"
            if path.exists():
                return read_json(path)
        return None


class StagingBuffer:
    """One block of host memory that every save's copy is taken into; page-locked where the device is an accelerator."""

    def __init__(self, device: torch.device):
        self._device = device
        self._block = torch.empty(0)

    def take(self, pieces: list[OwnedFragment], ready: torch.cuda.Event | None) -> None:
        """Copy the numbers of `pieces`, one piece after another, each with its kinds in order."""
        sources = [numbers for piece in pieces for numbers in piece.numbers.values()]
        size = sum(source.numel() for source in sources)
        if self._block.numel() != size:
            self._block = _allocate(size, pinned=self._device.type == "cuda")
        targets = self._block.split([source.numel() for source in sources])
        if ready is None:
            _copy(sources, targets)
            return
        torch.cuda.set_device(self._device)
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            _copy(sources, targets)
        stream.synchronize()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the copy."""
        numbers = self._block.view(torch.uint8).numpy().data
        return (numbers[at : at + _CHUNK_BYTES] for at in range(0, numbers.nbytes, _CHUNK_BYTES))


def _allocate(size: int, *, pinned: bool) -> Tensor:
    try:
        return torch.empty(size, pin_memory=pinned)
    except RuntimeError as error:  # torch has no exception of its own for host memory that is not there
        raise OSError(f"no host memory for a copy of {size * 4:,} bytes ({error})") from error


def _copy(sources: list[Tensor], targets: tuple[Tensor, ...]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """A mark in the accelerator's work: what was queued before it is what is to be copied."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
