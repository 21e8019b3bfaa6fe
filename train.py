"""Pre-train a pseudo-masked language model.

deepspeed --num_gpus 8 train.py                  the paper's base model on data/corpus

deepspeed --num_gpus 2 train.py --preset tiny    the demo

torchrun, srun and mpirun start it as well. Any setting is overridden by name, for example `--train.steps 1000`.
"""

from __future__ import annotations

import argparse
import os
import sys

import tyro

from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.launch_environment import is_rank_zero, set_num_threads
from pmlm_dist.presets import PRESETS
from pmlm_dist.supervision.heartbeat import Heartbeat
from pmlm_dist.supervision.signals import StopSignals
from pmlm_dist.supervision.supervisor import exit_now, run_supervised


def parse(arguments: list[str], *, quiet: bool = False) -> RunConfig:
    """Return the configuration of a command line: a preset, then overrides by name.

    Exits with a message for an unknown setting; raises `ConfigError` for an unknown preset.
    """
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--preset", default="base")
    launcher.add_argument("--local_rank", "--local-rank", help="appended by launchers; LOCAL_RANK is used instead")
    known, overrides = launcher.parse_known_args(arguments)
    if known.preset not in PRESETS:
        raise ConfigError([f"--preset ({known.preset}) must be one of {', '.join(sorted(PRESETS))}"])
    return tyro.cli(
        RunConfig,
        args=overrides,
        default=PRESETS[known.preset](),
        description=f"{__doc__}\n--preset {'|'.join(PRESETS)}: where the defaults come from (now: {known.preset}).",
        console_outputs=not quiet,
    )


def main(heartbeat: Heartbeat) -> None:
    """Run as one rank; its supervisor watches `heartbeat` and maps exceptions to exit codes."""
    signals = StopSignals()
    signals.install()
    set_num_threads()
    config = parse(sys.argv[1:], quiet=not is_rank_zero(os.environ))
    from pmlm_dist.training.run import pretrain  # torch reads OMP_NUM_THREADS when it is imported

    pretrain(config, signals, heartbeat)


if __name__ == "__main__":
    exit_now(run_supervised(main))
