"""Heartbeat of a rank: its phase and step, in memory shared with its supervisor (`supervisor.py`).

    rank: enter("data"), enter("step"), ...  --shared memory-->  supervisor: same beat for longer than the limit?

A beat is a line of JSON in memory that both processes share since the fork: microseconds, no file, no other process.
The supervisor decides on the reaction to silence. Without a supervisor the memory is private. Standard library only.
"""

import json
import mmap
import struct
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmlm_dist.config import WatchdogConfig
from pmlm_dist.supervision.exit_codes import exit_code_of, is_peer_failure

START_UP, DATA, STEP, SAVE, VALIDATION = "start-up", "data", "step", "save", "validation"
PHASES = (START_UP, DATA, STEP, SAVE, VALIDATION)
DEFAULT_LIMIT_S = 600.0
"""Limit before the rank has set its own: time to read the settings and to import torch."""

_HEADER = struct.Struct("<II")  # of a record: bytes, checksum
_BEAT, _STATUS = 0, mmap.PAGESIZE  # where the records are
_SIZE = 16 * mmap.PAGESIZE


def phase_limits(watchdog: WatchdogConfig, *, warm: bool) -> dict[str, float]:
    """Return the limit of each phase in seconds; until the ranks are `warm` (first step done) at least start-up's."""
    limits = {
        START_UP: watchdog.startup_s,
        DATA: watchdog.data_s,
        STEP: watchdog.step_s,
        SAVE: watchdog.save_s,
        VALIDATION: watchdog.validation_s,
    }
    return limits if warm else {phase: max(limit, watchdog.startup_s) for phase, limit in limits.items()}


@dataclass(frozen=True)
class Beat:
    """The last beat of a rank."""

    count: int
    """Number of beats so far; grows while the rank makes progress."""
    step: int
    phase: str
    limit_s: float
    """Longest time until the next beat."""
    time: float
    """Time of the beat, by `time.monotonic()`."""
    part: int = 0
    """Micro-batch of the step, from 1; 0: none."""
    parts: int = 0


@dataclass(frozen=True)
class RankStatus:
    """Identity of a rank and, after a failure, its error."""

    rank: int | None = None
    world_size: int = 1
    run_dir: str | None = None
    attempt: str | None = None
    """Name of the attempt, the same on all ranks."""
    failure: str | None = None
    """The error, in one line."""
    traceback: str = ""
    code: int = 0
    is_peer_failure: bool = False
    """The error is a failed communication: its cause is likely on another rank."""


class Heartbeat:
    """Written by one thread of the rank, read by the supervisor; created before the fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._limits: Mapping[str, float] = {}
        self._last = Beat(0, 0, START_UP, DEFAULT_LIMIT_S, time.monotonic())
        self._status = RankStatus()
        self.beat()

    def set_limits(self, limits: Mapping[str, float]) -> None:
        """Set the longest time between two beats, in seconds, for each phase."""
        self._limits = limits
        self.beat()

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Beat at the begin of `phase`; `step` only when a new step begins."""
        beat = self._last if phase == STEP else replace(self._last, part=0, parts=0)
        self._last = replace(beat, phase=phase, step=beat.step if step is None else step)
        self.beat()

    def enter_part(self, part: int, *, of: int) -> None:
        """Beat at the begin of micro-batch `part`, from 1, of `of` in this step."""
        self._last = replace(self._last, part=part, parts=of)
        self.beat()

    def beat(self) -> None:
        """Beat without a change of phase or step."""
        limit_s = self._limits.get(self._last.phase, DEFAULT_LIMIT_S)
        self._last = replace(self._last, count=self._last.count + 1, limit_s=limit_s, time=time.monotonic())
        self._write(_BEAT, self._last)

    def register(self, *, rank: int, world_size: int, run_dir: str, attempt: str) -> None:
        self._status = RankStatus(rank=rank, world_size=world_size, run_dir=run_dir, attempt=attempt)
        self._write(_STATUS, self._status)

    def fail(self, error: BaseException) -> None:
        line = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
        self._status = replace(
            self._status,
            failure=line[:2000],
            traceback=trace[-8000:],
            code=int(exit_code_of(error)),
            is_peer_failure=is_peer_failure(error),
        )
        self._write(_STATUS, self._status)

    def read(self) -> Beat | None:
        """Return the last beat; None in the middle of a write."""
        beat = self._read(_BEAT)
        return Beat(**beat) if beat else None

    def status(self) -> RankStatus:
        """Return the status of the rank; an empty one before `register` and in the middle of a write."""
        return RankStatus(**self._read(_STATUS))

    def _write(self, place: int, record: Beat | RankStatus) -> None:
        data = json.dumps(vars(record)).encode()
        # The reader may run in the middle of a write; the checksum detects it without a lock that a rank could hold.
        self._memory[place : place + _HEADER.size + len(data)] = _HEADER.pack(len(data), zlib.crc32(data)) + data

    def _read(self, place: int) -> dict[str, Any]:
        length, checksum = _HEADER.unpack_from(self._memory, place)
        start = place + _HEADER.size
        data = self._memory[start : start + length]
        return json.loads(data) if length and zlib.crc32(data) == checksum else {}
