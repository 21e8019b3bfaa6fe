"""A rank's sign of life: what it is at, for the supervisor outside it (`supervisor.py`).

    rank: enter("data"), enter("step"), ...  --shared memory-->  supervisor: the same beat for longer than its limit?

A beat is a few bytes in memory that both processes share since the fork, so it costs microseconds, reaches nobody else
and needs no file. What the supervisor does with silence is its own affair; this module only tells. A process without a
supervisor beats into memory of its own. Standard library only: the supervisor imports it.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pmlm_dist.config import WatchdogConfig
from pmlm_dist.supervision.exit_codes import blames_peers, exit_code_of

START_UP, DATA, STEP, SAVE, VALIDATION = "start-up", "data", "step", "save", "validation"
PHASES = (START_UP, DATA, STEP, SAVE, VALIDATION)
DEFAULT_LIMIT_S = 600.0
"""How long a rank may take until it has told its limits: to read its settings and to import torch."""

_BEAT = struct.Struct("<QqqddI")  # beats so far, step, phase, limit in seconds, time, check sum of these
_CHECKSUM = struct.Struct("<I")
_STATUS_OFFSET = mmap.PAGESIZE
_LENGTH = struct.Struct("<II")  # bytes, check sum
_SIZE = 16 * mmap.PAGESIZE


def phase_limits(watchdog: WatchdogConfig, *, warm: bool) -> dict[str, float]:
    """Seconds that each phase may pass in silence; all is start-up until ranks are `warm`, after their first step."""
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
    """What a rank said last."""

    count: int
    """Beats so far: it grows while the rank makes progress."""
    step: int
    """The step it is at."""
    phase: str
    limit_s: float
    """How long it may be silent from here on."""
    at: float
    """When, by `time.monotonic()`."""


@dataclass(frozen=True)
class RankStatus:
    """What a rank has told of itself and, once it has failed, of its failure."""

    rank: int | None = None
    world_size: int = 1
    run_dir: str | None = None
    attempt: str | None = None
    """Name of this start of the run, the same on all ranks."""
    failure: str | None = None
    """The error, in one line."""
    traceback: str = ""
    code: int = 0
    blames_peers: bool = False
    """The failure tells of other ranks: its cause is likely with them."""


class Heartbeat:
    """The rank's side writes, the supervisor's reads; made before the two part. One thread of the rank beats."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._limits: Mapping[str, float] = {}
        self._count, self._step, self._phase = 0, 0, START_UP
        self._status = RankStatus()
        self.beat()

    def set_limits(self, limits: Mapping[str, float]) -> None:
        """Say how many seconds may pass without a beat in each phase."""
        self._limits = limits
        self.beat()

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Say that the rank is alive and goes on with `phase`, of `step` if it is a new one."""
        self._step, self._phase = self._step if step is None else step, phase
        self.beat()

    def beat(self) -> None:
        """Say that the rank is alive and still at the same."""
        self._count += 1
        limit_s = self._limits.get(self._phase, DEFAULT_LIMIT_S)
        place = (self._step, PHASES.index(self._phase))
        beat = _BEAT.pack(self._count, *place, limit_s, time.monotonic(), 0)[: -_CHECKSUM.size]
        self._memory[: _BEAT.size] = beat + _CHECKSUM.pack(zlib.crc32(beat))

    def register(self, *, rank: int, world_size: int, run_dir: str, attempt: str) -> None:
        """Say which rank of which start of which run this is."""
        self._write_status(RankStatus(rank=rank, world_size=world_size, run_dir=run_dir, attempt=attempt))

    def fail(self, error: BaseException) -> None:
        """Say what error ends this rank."""
        line = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
        code, of_peers = int(exit_code_of(error)), blames_peers(error)
        told: dict[str, Any] = {
            "failure": line[:2000],
            "traceback": trace[-8000:],
            "code": code,
            "blames_peers": of_peers,
        }
        self._write_status(replace(self._status, **told))

    def read(self) -> Beat | None:
        """The last beat; None while it is being written."""
        count, step, phase, limit_s, at, check = _BEAT.unpack_from(self._memory)
        if check != zlib.crc32(self._memory[: _BEAT.size - _CHECKSUM.size]):
            return None
        return Beat(count, step, PHASES[phase], limit_s, at)

    def status(self) -> RankStatus:
        """What the rank has told last; nothing while it is being written."""
        length, check = _LENGTH.unpack_from(self._memory, _STATUS_OFFSET)
        start = _STATUS_OFFSET + _LENGTH.size
        told = self._memory[start : start + min(length, _SIZE - start)]
        return RankStatus(**json.loads(told)) if length and zlib.crc32(told) == check else RankStatus()

    def _write_status(self, words: RankStatus) -> None:
        self._status = words
        told = json.dumps(asdict(words)).encode()
        start = _STATUS_OFFSET + _LENGTH.size
        self._memory[start : start + len(told)] = told
        _LENGTH.pack_into(self._memory, _STATUS_OFFSET, len(told), zlib.crc32(told))
