"""From a run to its checkpoints and back: what is saved besides numbers, which checkpoint is loaded, what must fit.

    find_checkpoint (rank 0 chooses, all follow) -> state.json -> the run's identity fits? -> load_checkpoint
    Saver (saver.py) -> rank files and state.json (checkpoint_files.py) -> step-N (checkpoint_folder.py)

Dropout and masks are functions of seed and samples consumed (`parallel/seeding.py`), so there is no random state to
keep; the sample order is elastic, so there is no place in a stream to keep either.
"""

from __future__ import annotations

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
    """How far a run is; with the configuration this determines everything that follows."""

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0


def find_checkpoint(folder: CheckpointFolder, topology: Topology) -> Path | None:
    """The checkpoint to go on from, chosen by rank 0 for all; every rank must call.

    Newer ones that are not whole are named in warnings. Raises `ConfigError` on every rank if none of several is whole.
    """
    path, complaints, problems = None, [], []
    if topology.is_rank_zero:
        try:
            path, complaints = folder.newest_valid()
        except ConfigError as error:
            problems = error.problems
    path, problems = topology.broadcast_object((path, problems))
    raise_if_any(problems)
    for complaint in complaints:
        warnings.warn(f"{complaint}; going on from {path}", stacklevel=2)
    return path


def describe(engine: EngineState, state: RunState) -> dict[str, Any]:
    """What `state.json` says of progress and engine; every rank must call, for the fingerprint.

    Raises `FloatingPointError` when the model answers with numbers that are not finite: such weights are not kept.
    """
    answers = _probe_statistics(engine)
    if not is_finite(answers):
        raise FloatingPointError(f"the weights of step {state.step} give logits that are not finite: not saved")
    return {**asdict(state), "counters": engine.counters(), "fingerprint": answers}


def load_checkpoint(engine: EngineState, path: Path) -> RunState:
    """Fill `engine` from the checkpoint at `path`, which is whole and of the same run, whatever topology wrote it.

    Every rank must call. Raises `ConfigError` when the filled model is another one, or answers differently.
    """
    saved = read_state(path)
    with CheckpointReader(path) as reader:
        engine.restore(reader, saved["counters"])
    found = fingerprint_differences(saved["fingerprint"], _probe_statistics(engine), precision=engine.precision)
    raise_if_any([f"{path}: {difference}" for difference in found] + ([_MISREAD] if found else []))
    return RunState(**{name: saved[name] for name in asdict(RunState())})


def _probe_statistics(engine: EngineState) -> dict[str, Any]:
    model = engine.model.config
    assert model.vocab_size is not None
    return fingerprint(
        engine.engine,
        engine.topology,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        zero_stage=engine.engine.zero_optimization_stage(),
    )


_MISREAD = (
    "the model does not compute what it computed when this checkpoint was saved, though its files are whole: go on "
    "with the release that saved it, or on the device it was saved on"
)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How the identity of a saved run differs from that of this one, a sentence a setting."""
    return [
        f"{name} was {saved.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
