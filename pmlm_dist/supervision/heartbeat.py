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

from pmlm_dist.config import WatchConfig
from pmlm_dist.supervision.exit_codes import code_of, is_of_peers

START_UP, DATA, STEP, SAVE, VALIDATION = "start-up", "data", "step", "save", "validation"
PHASES = (START_UP, DATA, STEP, SAVE, VALIDATION)
UNTOLD_LIMIT_S = 600.0
"""How long a rank may take until it has told its limits: to read its settings and to import torch."""

_BEAT = struct.Struct("<QqqddI")  # beats so far, step, phase, limit in seconds, time, check sum of these
_CHECK = struct.Struct("<I")
_WORDS_AT = mmap.PAGESIZE
_LENGTH = struct.Struct("<II")  # bytes, check sum
_SIZE = 16 * mmap.PAGESIZE


def phase_limits(watch: WatchConfig, *, warm: bool) -> dict[str, float]:
    """Seconds that each phase may pass in silence; all is start-up until ranks are `warm`, after their first step."""
    limits = {
        START_UP: watch.startup_s,
        DATA: watch.data_s,
        STEP: watch.step_s,
        SAVE: watch.save_s,
        VALIDATION: watch.validation_s,
    }
    return limits if warm else {phase: max(limit, watch.startup_s) for phase, limit in limits.items()}


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
class Words:
    """What a rank has told of itself and, once it has failed, of its failure."""

    rank: int | None = None
    world_size: int = 1
    run_dir: str | None = None
    life: str | None = None
    """Name of this start of the run, the same on all ranks."""
    failure: str | None = None
    """The error, in one line."""
    traceback: str = ""
    code: int = 0
    of_peers: bool = False
    """The failure tells of other ranks: its cause is likely with them."""


class Heartbeat:
    """The rank's side writes, the supervisor's reads; made before the two part. One thread of the rank beats."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._limits: Mapping[str, float] = {}
        self._count, self._step, self._phase = 0, 0, START_UP
        self._words = Words()
        self.go_on()

    def limit(self, limits: Mapping[str, float]) -> None:
        """Say how many seconds may pass without a beat in each phase."""
        self._limits = limits
        self.go_on()

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Say that the rank is alive and goes on with `phase`, of `step` if it is a new one."""
        self._step, self._phase = self._step if step is None else step, phase
        self.go_on()

    def go_on(self) -> None:
        """Say that the rank is alive and still at the same."""
        self._count += 1
        limit_s = self._limits.get(self._phase, UNTOLD_LIMIT_S)
        place = (self._step, PHASES.index(self._phase))
        beat = _BEAT.pack(self._count, *place, limit_s, time.monotonic(), 0)[: -_CHECK.size]
        self._memory[: _BEAT.size] = beat + _CHECK.pack(zlib.crc32(beat))

    def introduce(self, *, rank: int, world_size: int, run_dir: str, life: str) -> None:
        """Say which rank of which start of which run this is."""
        self._tell(Words(rank=rank, world_size=world_size, run_dir=run_dir, life=life))

    def fail(self, error: BaseException) -> None:
        """Say what error ends this rank."""
        line = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
        code, of_peers = int(code_of(error)), is_of_peers(error)
        told: dict[str, Any] = {"failure": line[:2000], "traceback": trace[-8000:], "code": code, "of_peers": of_peers}
        self._tell(replace(self._words, **told))

    def read(self) -> Beat | None:
        """The last beat; None while it is being written."""
        count, step, phase, limit_s, at, check = _BEAT.unpack_from(self._memory)
        if check != zlib.crc32(self._memory[: _BEAT.size - _CHECK.size]):
            return None
        return Beat(count, step, PHASES[phase], limit_s, at)

    def words(self) -> Words:
        """What the rank has told last; nothing while it is being written."""
        length, check = _LENGTH.unpack_from(self._memory, _WORDS_AT)
        start = _WORDS_AT + _LENGTH.size
        told = self._memory[start : start + min(length, _SIZE - start)]
        return Words(**json.loads(told)) if length and zlib.crc32(told) == check else Words()

    def _tell(self, words: Words) -> None:
        self._words = words
        told = json.dumps(asdict(words)).encode()
        start = _WORDS_AT + _LENGTH.size
        self._memory[start : start + len(told)] = told
        _LENGTH.pack_into(self._memory, _WORDS_AT, len(told), zlib.crc32(told))
