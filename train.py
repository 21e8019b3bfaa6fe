"""Pre-train a pseudo-masked language model.

deepspeed --num_gpus 8 train.py                       the paper's base model on data/corpus
deepspeed --num_gpus 2 train.py --preset tiny         the demo
torchrun, srun and mpirun start it as well; settings are overridden by name, `--train.steps 1000` for example.
"""

from __future__ import annotations

import argparse
import os
import sys

import tyro

from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.presets import PRESETS

EXIT_BAD_CONFIGURATION = 2


def parse(arguments: list[str], *, quiet: bool = False) -> RunConfig:
    """The configuration of a command line: a preset, then overrides by name. Exits with a message if one is unknown."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--preset", choices=sorted(PRESETS), default="base")
    launcher.add_argument("--local_rank", "--local-rank", help="appended by launchers; LOCAL_RANK is used instead")
    known, overrides = launcher.parse_known_args(arguments)
    return tyro.cli(
        RunConfig,
        args=overrides,
        default=PRESETS[known.preset](),
        description=f"{__doc__}\n--preset {'|'.join(PRESETS)}: where the defaults come from (now: {known.preset}).",
        console_outputs=not quiet,
    )


def use_cores_evenly() -> None:
    """Divide the host's cores among its ranks, unless OMP_NUM_THREADS says otherwise."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "0")) or 0)
    ranks = ranks or int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def main() -> int:
    """Run and return the exit code: 0 done, 2 bad configuration."""
    speaks = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))) == "0"
    config = parse(sys.argv[1:], quiet=not speaks)
    use_cores_evenly()
    from pmlm_dist.training.loop import pretrain  # torch reads OMP_NUM_THREADS when it is imported

    try:
        pretrain(config)
    except ConfigError as error:
        if speaks:
            print(f"\nThis run cannot start:\n{error}\n", file=sys.stderr)
        return EXIT_BAD_CONFIGURATION
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a finished ZeRO-3 run on gloo can abort in its destructors
