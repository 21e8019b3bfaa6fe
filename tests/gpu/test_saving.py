"""Checkpoints on a GPU: copied to page-locked memory beside the steps, and opened again on the GPU and on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import run_config, start_run, take_steps
from support.worlds import run_world

from pmlm_dist.checkpoint.files import read_weights
from pmlm_dist.config import RunConfig

pytestmark = pytest.mark.gpu

BEFORE, AFTER = 3, 3
SETTINGS = [
    {"zero": 0},
    {"zero": 1, "precision": "bf16"},
    {"zero": 2, "precision": "fp16"},
    {"zero": 3, "precision": "bf16"},
    {"zero": 2, "offload": True},
    {"zero": 3, "offload": True, "precision": "bf16"},
]


def started(config: RunConfig) -> tuple[Any, Any, Any]:
    """Run, engine and its state on this rank."""
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.training.loop import build_engine

    run = start_run(config)
    engine = build_engine(run)
    return run, engine, EngineState(engine, run.topology)


def saved_and_on(config: RunConfig) -> tuple[str, list[float]]:
    """Train, save, train on at once; where the checkpoint lies, and the losses after it."""
    from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
    from pmlm_dist.checkpoint.folder import CheckpointFolder
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.metrics.run_log import RunLog

    run, engine, engine_state = started(config)
    log = RunLog(run.config.run_dir, enabled=False, first_step=0)
    metadata = {"identity": run.identity(), "configuration": run.configuration()}
    checkpointer = AsyncCheckpointer(
        engine_state, CheckpointFolder(run.checkpoints, keep=9), log, metadata=metadata, timeout_s=60
    )
    state, _, _ = take_steps(run, engine, RunState(), steps=BEFORE)
    checkpointer.save(state)
    _, losses, _ = take_steps(run, engine, state, steps=AFTER)  # weights change while the copy may still be under way
    checkpointer.close()
    assert checkpointer._memory._block.is_pinned()
    assert run.topology.device.type == "cuda"
    return str(CheckpointFolder(run.checkpoints, keep=9).folder(BEFORE)), losses


def opened_and_on(config: RunConfig, path: str, device: str) -> list[float]:
    from pmlm_dist.checkpoint.resume import load_checkpoint

    os.environ["DS_ACCELERATOR"] = device
    run, engine, engine_state = started(config)
    state = load_checkpoint(engine_state, Path(path))
    return take_steps(run, engine, state, steps=AFTER)[1]


def without_accumulation(corpus: Path, run_dir: Path, **settings: Any) -> RunConfig:
    return run_config(corpus, run_dir, steps=BEFORE + AFTER, micro_batch=8, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{name}{value}" for name, value in s.items()))
def test_a_run_goes_on_from_what_was_copied_beside_its_steps(
    small_corpus: Path, tmp_path: Path, settings: dict[str, Any]
):
    """Sums on a GPU may be taken in another order from run to run: losses are held to 1e-5 of each other."""
    config = without_accumulation(small_corpus, tmp_path / "run", **settings)
    ((path, straight),) = run_world(saved_and_on, 1, config, timeout_s=400.0)
    again = replace(config, run_dir=tmp_path / "again")
    (losses,) = run_world(opened_and_on, 1, again, path, "cuda", timeout_s=400.0)
    tolerance = 1e-5 if settings.get("precision", "fp32") == "fp32" else 1e-3
    np.testing.assert_allclose(losses, straight, rtol=tolerance)


def test_what_a_gpu_wrote_opens_on_the_cpu(small_corpus: Path, tmp_path: Path):
    config = without_accumulation(small_corpus, tmp_path / "run", zero=1)
    ((path, straight),) = run_world(saved_and_on, 1, config)
    assert all(np.isfinite(weight).all() for weight in read_weights(Path(path)).values())
    (losses,) = run_world(opened_and_on, 1, replace(config, run_dir=tmp_path / "cpu"), path, "cpu")
    np.testing.assert_allclose(losses, straight, rtol=1e-4)
    assert torch.cuda.is_available()
