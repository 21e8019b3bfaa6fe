"""Checkpoints on a GPU: copied to pinned memory during training, and loaded on the GPU and on the CPU."""

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


def build_run(config: RunConfig) -> tuple[Any, Any, Any]:
    """Run, engine and engine state of this rank."""
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine = build_engine(run)
    return run, engine, EngineState(engine, run.topology)


def save_and_continue(config: RunConfig) -> tuple[str, list[float]]:
    """Train, save, and continue at once: path of the checkpoint and the losses after it."""
    from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
    from pmlm_dist.checkpoint.folder import CheckpointFolder
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.metrics.run_log import RunLog

    run, engine, engine_state = build_run(config)
    log = RunLog(run.config.run_dir, enabled=False, first_step=0)
    metadata = {"identity": run.identity(), "configuration": run.configuration()}
    checkpointer = AsyncCheckpointer(
        engine_state, CheckpointFolder(run.checkpoints, keep=9), log, metadata=metadata, timeout_s=60
    )
    state, _, _ = take_steps(run, engine, RunState(), steps=BEFORE)
    checkpointer.save(state)
    _, losses, _ = take_steps(run, engine, state, steps=AFTER)  # weights change while they may still be copied
    checkpointer.close()
    assert checkpointer._memory._block.is_pinned()
    assert run.topology.device.type == "cuda"
    return str(CheckpointFolder(run.checkpoints, keep=9).folder(BEFORE)), losses


def load_and_continue(config: RunConfig, path: str, device: str) -> list[float]:
    from pmlm_dist.checkpoint.resume import load_checkpoint

    os.environ["DS_ACCELERATOR"] = device
    run, engine, engine_state = build_run(config)
    state = load_checkpoint(engine_state, Path(path))
    return take_steps(run, engine, state, steps=AFTER)[1]


def without_accumulation(corpus: Path, run_dir: Path, **settings: Any) -> RunConfig:
    return run_config(corpus, run_dir, steps=BEFORE + AFTER, micro_batch=8, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{name}{value}" for name, value in s.items()))
def test_run_resumed_from_asynchronous_checkpoint_has_same_losses(
    small_corpus: Path, tmp_path: Path, settings: dict[str, Any]
):
    """The order of sums on a GPU may change from run to run, hence the tolerance of 1e-5."""
    config = without_accumulation(small_corpus, tmp_path / "run", **settings)
    ((path, expected),) = run_world(save_and_continue, 1, config, timeout_s=400.0)
    resumed = replace(config, run_dir=tmp_path / "again")
    (losses,) = run_world(load_and_continue, 1, resumed, path, "cuda", timeout_s=400.0)
    tolerance = 1e-5 if settings.get("precision", "fp32") == "fp32" else 1e-3
    np.testing.assert_allclose(losses, expected, rtol=tolerance)


def test_checkpoint_of_gpu_resumes_on_cpu(small_corpus: Path, tmp_path: Path):
    config = without_accumulation(small_corpus, tmp_path / "run", zero=1)
    ((path, expected),) = run_world(save_and_continue, 1, config)
    assert all(np.isfinite(weight).all() for weight in read_weights(Path(path)).values())
    (losses,) = run_world(load_and_continue, 1, replace(config, run_dir=tmp_path / "cpu"), path, "cpu")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert torch.cuda.is_available()
