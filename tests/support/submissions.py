"""Submission of the batch scripts with small runs, and the comparison of their steps."""

import sys
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.metrics.run_log import read_metrics
from support.slurm_cluster import Cluster, Job

ROOT = Path(__file__).parent.parent.parent
STEPS = 200

SMALL = [
    *("--model.hidden-size", "32", "--model.num-layers", "2", "--model.num-heads", "4", "--model.ffn-size", "64"),
    *("--model.max-positions", "64", "--model.hidden-dropout", "0", "--model.attention-dropout", "0"),
    *("--optim.warmup-steps", "5", "--optim.peak-lr", "5e-3", "--train.steps", str(STEPS), "--train.log-every", "1"),
    *("--train.validate-every", "100", "--train.validation-samples", "8", "--train.checkpoint-every", "50"),
    *("--data.workers", "1"),
]


@dataclass(frozen=True)
class Submission:
    """Submits the batch scripts unchanged; environment and options make the run small."""

    cluster: Cluster
    corpus: Path
    engine: Path

    def pretrain(
        self, run_dir: Path, *arguments: str, tasks: int = 1, options: tuple[str, ...] = (), **settings: str
    ) -> Job:
        """Submit `slurm/pretrain_base.sh` on two nodes of `tasks` ranks."""
        defaults = [
            "--nodes=2",
            f"--ntasks-per-node={tasks}",
            f"--gpus-per-node={tasks}",
            "--cpus-per-task=1",
            *options,
        ]
        environ = {
            "PROJECT": str(ROOT),
            "VENV": sys.prefix,
            "PRESET": "tiny",
            "CORPUS": str(self.corpus),
            "RUN_DIR": str(run_dir),
            "DS_CONFIG": str(self.engine),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        script = ROOT / "slurm" / "pretrain_base.sh"
        return self.cluster.submit(script, *SMALL, *arguments, options=defaults, environ=environ)


def step_scalars(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return losses, norms and validation losses of every step."""
    return {
        step: {name: value for name, value in scalars.items() if name.startswith(("train/", "validation/"))}
        for step, scalars in read_metrics(run_dir).items()
    }


def check_equal(run_dir: Path, expected: Path) -> None:
    """Check that a run is complete and that each of its steps equals that of another run."""
    assert (run_dir / "COMPLETE").exists()
    actual, reference = step_scalars(run_dir), step_scalars(expected)
    assert list(actual) == list(range(1, STEPS + 1)) == list(reference)
    different = [step for step in reference if actual[step] != reference[step]]
    assert not different, f"steps {different[:5]} are different"
