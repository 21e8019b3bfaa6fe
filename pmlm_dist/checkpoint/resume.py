"""Resuming a run: what a checkpoint records besides tensors, which one is loaded, and whether it fits this run.

    find_checkpoint (rank 0 chooses for all) -> state.json -> identity of the run compared -> load_checkpoint
    AsyncCheckpointer (async_save.py) -> rank files and state.json (files.py) -> step-N (folder.py)

No random state is saved: dropout and masks are functions of seed and samples consumed (parallel/seeding.py). No stream
position is saved: the sample order is elastic and follows from samples consumed.
"""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import CheckpointReader, read_state
from pmlm_dist.checkpoint.fingerprint import fingerprint, fingerprint_differences, is_finite
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.parallel.groups import Topology


@dataclass(frozen=True)
class RunState:
    """Progress of a run; with the configuration it determines all later steps."""

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0


def find_checkpoint(folder: CheckpointFolder, topology: Topology) -> Path | None:
    """Return the checkpoint to resume from, chosen by rank 0; every rank must call.

    Warns of newer checkpoints that are corrupt. Raises `ConfigError` on every rank if there are some but none is valid.
    """
    path, skipped, problems = None, [], []
    if topology.is_rank_zero:
        try:
            path, skipped = folder.newest_valid()
        except ConfigError as error:
            problems = error.problems
    path, problems = topology.broadcast_object((path, problems))
    raise_if_any(problems)
    for problem in skipped:
        warnings.warn(f"{problem}; resuming from {path}", stacklevel=2)
    return path


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
