"""The batch script fine-tunes over two nodes."""

import json
import sys
from pathlib import Path

from support.slurm_cluster import Cluster, Job
from support.small_runs import write_engine_config
from support.small_tasks import write_model, write_text_task
from support.submissions import ROOT


def fine_tune(cluster: Cluster, folder: Path, *arguments: str) -> Job:
    """Submit `slurm/finetune.sh` with a tiny model, its task and its run in `folder`."""
    settings = {
        "task": "classification",
        "model": write_model(folder / "weights"),
        "data": write_text_task(folder / "data"),
        "output": folder / "run",
        "ds-config": write_engine_config(folder / "ds.json"),
        "inputs.max-tokens": 16,
        "recipe.batch": 8,
        "recipe.epochs": 2,
        "log-every": 1,
    }
    return cluster.submit(
        ROOT / "slurm" / "finetune.sh",
        *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
        *arguments,
        options=["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"],
        environ={
            "PROJECT": str(ROOT),
            "VENV": sys.prefix,
            "RUN_DIR": str(folder / "run"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
    )


def test_finetune_script_trains_over_two_nodes(cluster: Cluster, tmp_path: Path):
    job = fine_tune(cluster, tmp_path)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    printed = job.printed()
    assert "ranks: 2 data-parallel x 1 tensor-parallel on cpu" in printed
    assert "step 6/6" in printed
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (
        f"best, step {scores['step']}: validation: accuracy {scores['scores']['validation']['accuracy']:.4f}" in printed
    )
    assert job.restarts() == 0


def test_finetune_job_with_invalid_setting_is_not_requeued(cluster: Cluster, tmp_path: Path):
    job = fine_tune(cluster, tmp_path, "--recipe.lr", "-1")
    assert job.wait_for_end() == "FAILED", job.printed()
    assert job.printed().count("recipe.lr (-1.0) must be positive") == 1
    assert job.restarts() == 0
