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
from pmlm_dist.ranks import share_cores, speaks
from pmlm_dist.training.preemption import Stopped, StopSignals

EXIT_FAILED, EXIT_BAD_CONFIGURATION = 1, 2


def parse(arguments: list[str], *, quiet: bool = False) -> RunConfig:
    """The configuration of a command line: a preset, then overrides by name. Exits with a message if one is unknown."""
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


def main() -> int:
    """Run and return the exit code: 0 done, 1 a damaged shard on the way, 2 bad configuration, 75 told to stop."""
    signals = StopSignals()
    signals.listen()
    share_cores()
    try:
        config = parse(sys.argv[1:], quiet=not speaks(os.environ))
        from pmlm_dist.training.loop import pretrain  # torch reads OMP_NUM_THREADS when it is imported

        pretrain(config, signals)
    except Stopped as stopped:
        return stopped.exit_code
    except ConfigError as error:
        if speaks(os.environ):
            print(f"\nThis run cannot start:\n{error}\n", file=sys.stderr)
        return EXIT_BAD_CONFIGURATION
    except ValueError as error:
        from pmlm_dist.corpus.shards import ShardError

        if not isinstance(error, ShardError):
            raise
        print(f"\nThis run cannot go on: {error}\n", file=sys.stderr)  # whichever rank met it
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a finished ZeRO-3 run on gloo can abort in its destructors
