"""Resuming a run: what a checkpoint records besides tensors, which one is loaded, and whether it fits this run.

    find_checkpoint (each rank verifies its share) -> state.json -> identity of the run compared -> load_checkpoint
    AsyncCheckpointer (async_save.py) -> rank files and state.json (files.py) -> step-N (folder.py)

No random state is saved: dropout and masks are functions of seed and samples consumed (parallel/seeding.py). No stream
position is saved: the sample order is elastic and follows from samples consumed.
"""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import CheckpointReader, checkpoint_problems, read_state
from pmlm_dist.checkpoint.fingerprint import fingerprint, fingerprint_differences, is_finite
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.config import raise_if_any
from pmlm_dist.parallel.groups import Topology


@dataclass(frozen=True)
class RunState:
    """Progress of a run; with the configuration it determines all later steps."""

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0


def find_checkpoint(
    folder: CheckpointFolder, topology: Topology, on_wait: Callable[[], None] = lambda: None
) -> Path | None:
    """Return the checkpoint to resume from: the newest that is valid on all ranks; every rank must call.

    Calls `on_wait` at every poll while ranks verify files. Warns on rank 0 of newer checkpoints that are corrupt.
    Raises `ConfigError` on every rank if there are some but none is valid.
    """
    steps = topology.broadcast_object(folder.steps() if topology.is_rank_zero else None)
    path, skipped = folder.newest_valid_of(steps, lambda step: _problems_by_all_ranks(step, topology, on_wait))
    if topology.is_rank_zero:
        for problem in [*skipped, *folder.pointer_problems()] if path else []:
            warnings.warn(f"{problem}; resuming from {path}", stacklevel=2)
    return path


def _problems_by_all_ranks(path: Path, topology: Topology, on_wait: Callable[[], None]) -> list[str]:
    """Return the problems of a checkpoint on every rank; each reads its share of the bytes.

    Ranks poll with short collectives meanwhile: a large file must not let the others run into their time limit.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        own, pause_s = pool.submit(checkpoint_problems, path, part=topology.rank, parts=topology.world_size), 0.01
        while topology.all_reduce_max(int(not own.done()))[0]:
            on_wait()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
    return list(dict.fromkeys(problem for of_rank in topology.all_gather_object(own.result()) for problem in of_rank))


def progress_metadata(engine: EngineState, state: RunState) -> dict[str, Any]:
    """Return progress, engine counters and fingerprint for `state.json`; every rank must call, for the fingerprint.

    Raises `FloatingPointError` when the model's logits are not finite: such weights are not saved.
    """
    current = fingerprint(engine)
    if not is_finite(current):
        raise FloatingPointError(f"the weights of step {state.step} give logits that are not finite: not saved")
    return {**asdict(state), "counters": engine.counters(), "fingerprint": current}


def load_checkpoint(engine: EngineState, path: Path) -> RunState:
    """Fill `engine` from the valid checkpoint at `path`, whatever topology wrote it; every rank must call.

    Raises `ConfigError` when the model has other tensors, or when its fingerprint differs from the saved one.
    """
    saved = read_state(path)
    with CheckpointReader(path) as reader:
        engine.restore(reader, saved["counters"])
    problems = fingerprint_differences(saved["fingerprint"], fingerprint(engine), precision=engine.precision)
    raise_if_any([f"{path}: {problem}" for problem in problems] + ([_OTHER_LOGITS] if problems else []))
    return RunState(**{name: saved[name] for name in asdict(RunState())})


_OTHER_LOGITS = (
    "the model does not compute what it computed when this checkpoint was saved, though its files are valid: resume "
    "with the release that saved it, or on the device it was saved on"
)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one sentence for each setting in which the identities of two runs differ."""
    return [
        f"{name} was {saved.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
