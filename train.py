"""Pre-train a pseudo-masked language model.

deepspeed --num_gpus 8 train.py                  the paper's base model on data/corpus

deepspeed --num_gpus 2 train.py --preset tiny    the demo

torchrun, srun and mpirun start it as well; settings are overridden by name, `--train.steps 1000` for example.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

import tyro

from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.launch_environment import discard_broken_stdout, is_rank_zero, set_num_threads
from pmlm_dist.presets import PRESETS
from pmlm_dist.supervision.exit_codes import ExitCode
from pmlm_dist.supervision.heartbeat import Heartbeat
from pmlm_dist.supervision.run_lock import FolderInUse
from pmlm_dist.supervision.signals import Stopped, StopSignals
from pmlm_dist.supervision.supervisor import exit_now, run_supervised


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


def main(heartbeat: Heartbeat) -> int:
    """Run as a rank, with signs of life on `heart`, and return the exit code (supervision/exit_codes.py)."""
    signals = StopSignals()
    signals.install()
    set_num_threads()
    try:
        config = parse(sys.argv[1:], quiet=not is_rank_zero(os.environ))
        from pmlm_dist.training.loop import pretrain  # torch reads OMP_NUM_THREADS when it is imported

        pretrain(config, signals, heartbeat)
    except Stopped as stopped:
        return stopped.exit_code
    except BrokenPipeError:
        if not discard_broken_stdout():
            raise
    except ConfigError as error:
        _say(f"This run cannot start:\n{error}", anybody=False)
        return ExitCode.BAD_CONFIGURATION
    except FolderInUse as error:
        _say(f"This run cannot start: {error}", anybody=False)
        return ExitCode.IN_USE
    except ValueError as error:
        from pmlm_dist.corpus.shards import ShardError

        if not isinstance(error, ShardError):
            raise
        heartbeat.fail(error)
        _say(f"This run cannot go on: {error}", anybody=True)  # whichever rank met it
        return ExitCode.FAILED
    return ExitCode.DONE


def _say(text: str, *, anybody: bool) -> None:
    """Print `text`, on the rank that speaks or on any; a log whose disk is full changes no exit code."""
    if anybody or is_rank_zero(os.environ):
        with contextlib.suppress(OSError):
            print(f"\n{text}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_now(run_supervised(main))
