"""Training over two nodes with other launchers equals that of the batch script."""

import os
import sys
from pathlib import Path

import pytest
from support.submissions import ROOT, SMALL, Submission, step_scalars

BESIDE_PYTHON = Path(sys.executable).parent
STEPS = 5


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_launcher_trains_over_two_nodes_like_the_batch_script(
    submit: Submission, uninterrupted: Path, tmp_path: Path, launcher: str
):
    """mpirun in an allocation, and DeepSpeed's launcher with a hostfile (which starts the ranks through srun here)."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    nodes = ["--nodes=2", "--ntasks-per-node=1"]
    commands: dict[str, list[str | Path]] = {
        "mpirun": ["salloc", *nodes, BESIDE_PYTHON / "mpirun", "--bind-to", "none", sys.executable],
        "deepspeed": [
            *(BESIDE_PYTHON / "deepspeed", "--hostfile", hostfile, "--launcher", "slurm", "--no_ssh_check"),
            *("--master_addr", "127.0.0.1", "--launcher_args", " ".join(nodes)),
        ],
    }
    settings: list[str | Path] = ["--preset", "tiny", "--corpus", submit.corpus, "--run-dir", tmp_path / "run"]
    submit.cluster.run(
        *commands[launcher],
        ROOT / "train.py",
        *settings,
        *("--ds-config", submit.engine, *SMALL, "--train.stop-at", str(STEPS)),
        environ={
            "PATH": f"{BESIDE_PYTHON}:{os.environ['PATH']}",
            "MASTER_ADDR": "127.0.0.1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        timeout_s=150,
    )
    actual, expected = step_scalars(tmp_path / "run"), step_scalars(uninterrupted)
    assert list(actual) == list(range(1, STEPS + 1))
    for step in range(1, STEPS):  # the last step has validation scalars as well
        assert actual[step] == expected[step]
    assert actual[STEPS]["train/total"] == expected[STEPS]["train/total"]
