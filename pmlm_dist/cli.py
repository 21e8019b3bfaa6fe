"""The `pmlm` command: one word for what to do, then that command's settings.

A command is a function of the remaining arguments, listed in `COMMANDS`; the first line of its docstring is its help.
What it needs is imported inside it, so that `pmlm --help` and a mistyped command answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from pmlm_dist.config import ConfigError
from pmlm_dist.launch_environment import discard_broken_stdout, is_rank_zero, set_num_threads
from pmlm_dist.supervision.heartbeat import Heartbeat
from pmlm_dist.supervision.run_lock import FolderInUse
from pmlm_dist.supervision.signals import Stopped, StopSignals

USER_ERROR = 2


def prepare_corpus(arguments: Sequence[str]) -> None:
    """Cut raw text into shuffled WebDataset shards of packed samples (with mpirun: on many cores and nodes)."""
    import tyro

    from pmlm_dist.corpus.prepare import pipeline

    config = tyro.cli(
        pipeline.PrepareConfig,
        prog="pmlm prepare-corpus",
        description=prepare_corpus.__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    pipeline.prepare_corpus(config)


def corpus(arguments: Sequence[str]) -> None:
    """Prove that a corpus is whole: `pmlm corpus verify DIR`."""
    import tyro

    from pmlm_dist.corpus.verify import verify

    tyro.extras.subcommand_cli_from_dict(
        {"verify": verify}, prog="pmlm corpus", description=corpus.__doc__, args=list(arguments)
    )


def inspect(arguments: Sequence[str]) -> None:
    """Show one sample of a corpus as the model reads it: spans, factorization order, slots, visibility."""
    import tyro

    from pmlm_dist.commands import inspect

    config = tyro.cli(inspect.InspectConfig, prog="pmlm inspect", description=inspect.__doc__, args=arguments)
    inspect.inspect(config)


def plot(arguments: Sequence[str]) -> None:
    """Draw the losses of a run as a PNG."""
    import tyro

    from pmlm_dist.commands.plot import PlotConfig, plot_losses

    plot_losses(tyro.cli(PlotConfig, prog="pmlm plot", description=plot.__doc__, args=arguments))


def checkpoint(arguments: Sequence[str]) -> None:
    """List, verify or reshape the checkpoints of a run: `pmlm checkpoint ls|verify|reshape DIR`."""
    import tyro

    from pmlm_dist.commands import checkpoint as commands

    tyro.extras.subcommand_cli_from_dict(
        {"ls": commands.ls, "verify": commands.verify, "reshape": commands.reshape},
        prog="pmlm checkpoint",
        description=checkpoint.__doc__,
        args=list(arguments),
    )


def plan(arguments: Sequence[str]) -> None:
    """Say what a run needs before it is queued: memory, step time, communication, days; and what does not fit."""
    import tyro

    from pmlm_dist.commands import plan
    from pmlm_dist.planning.settings import PlanConfig
    from pmlm_dist.presets import PRESETS

    preset, rest = _option_value("preset", arguments) or "base", _without_option("preset", arguments)
    if preset not in PRESETS:
        raise ConfigError([f"--preset ({preset}) must be one of {', '.join(sorted(PRESETS))}"])
    description = f"{plan.__doc__}\n--preset {'|'.join(PRESETS)}: where the defaults come from (now: {preset})."
    default = PlanConfig.of_preset(preset)
    plan.run(tyro.cli(PlanConfig, prog="pmlm plan", description=description, args=rest, default=default))


def export(arguments: Sequence[str]) -> None:
    """Write a checkpoint for Hugging Face transformers (MPNet, BERT) or as UniLM's; loaded back and compared."""
    import tyro

    from pmlm_dist.conversion.export import export as write

    tyro.cli(write, prog="pmlm export", description=export.__doc__, args=arguments)


def import_weights(arguments: Sequence[str]) -> None:
    """Read a BERT, MPNet or UniLM checkpoint, to go on pre-training from it with `train.py --init`."""
    import tyro

    from pmlm_dist.conversion.importing import import_weights as read

    tyro.cli(read, prog="pmlm import", description=import_weights.__doc__, args=arguments)


def finetune(arguments: Sequence[str], heartbeat: Heartbeat | None = None, signals: StopSignals | None = None) -> None:
    """Fine-tune a model on a task: GLUE, SQuAD or your own; `pmlm finetune --task list` shows all."""
    import tyro

    from pmlm_dist.downstream.settings import GENERATION, RECIPES, FinetuneConfig, GenerationConfig

    set_num_threads()
    from pmlm_dist.downstream import finetune as driver
    from pmlm_dist.downstream.tasks.registry import TASKS

    task, rest = _option_value("task", arguments), _without_option("preset", arguments)
    if task == "list":
        print("\n".join(f"{name:16}{kind.about}" for name, kind in TASKS.items()))
        return
    preset = _option_value("preset", arguments) or (TASKS[task].preset if task in TASKS else "glue")
    if preset not in RECIPES:
        raise ConfigError([f"--preset ({preset}) must be one of {', '.join(RECIPES)}"])
    default = FinetuneConfig(
        task=tyro.MISSING,
        model=tyro.MISSING,
        output=tyro.MISSING,
        preset=preset,
        recipe=RECIPES[preset],
        generation=GENERATION.get(preset, GenerationConfig()),
    )
    description = f"{finetune.__doc__}\n--preset {'|'.join(RECIPES)}: where the recipe comes from (now: {preset})."
    driver.finetune(
        tyro.cli(
            FinetuneConfig,
            prog="pmlm finetune",
            description=description,
            args=rest,
            default=default,
            console_outputs=is_rank_zero(os.environ),
        ),
        heartbeat,
        signals,
    )


def evaluate(arguments: Sequence[str]) -> None:
    """Score a fine-tuned model on a split, and write its predictions."""
    import tyro

    from pmlm_dist.downstream.settings import EvaluateConfig

    set_num_threads()
    from pmlm_dist.downstream.finetune import evaluate_saved

    evaluate_saved(
        tyro.cli(
            EvaluateConfig,
            prog="pmlm evaluate",
            description=evaluate.__doc__,
            args=arguments,
            console_outputs=is_rank_zero(os.environ),
        )
    )
    _exit_distributed()


def _option_value(name: str, arguments: Sequence[str]) -> str | None:
    """Value of the setting `--name` among `arguments`, if it is there."""
    return getattr(_option_parser(name).parse_known_args(arguments)[0], name)


def _without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """`arguments` without the setting `--name`, which a launcher has added or which has been read."""
    return _option_parser(name).parse_known_args(arguments)[1]


def _option_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser


def _exit_distributed() -> None:
    """End a rank of several at once: after ZeRO-3 on gloo it can abort in its destructors."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def generate(arguments: Sequence[str]) -> None:
    """Write answers to a file of sources with a model that was fine-tuned for it."""
    import tyro

    set_num_threads()
    from pmlm_dist.commands import generate as answers

    default = answers.GenerateConfig(model=tyro.MISSING, input=tyro.MISSING, output=tyro.MISSING)
    model, vocabulary = (_option_value(name, arguments) for name in ("model", "vocabulary"))
    if model is not None:
        default = dataclasses.replace(default, decoding=answers.saved_decoding(model, vocabulary=vocabulary))
    config = tyro.cli(
        answers.GenerateConfig,
        prog="pmlm generate",
        description=f"{generate.__doc__}\nWith --model the settings of its fine-tuning are the defaults.",
        args=arguments,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=is_rank_zero(os.environ),
    )
    answers.generate(config)


def fill(arguments: Sequence[str]) -> None:
    """Fill the masks of a text in any order: pmlm fill "text with [MASK] and [MASK:3]" --model DIR."""
    import tyro

    from pmlm_dist.commands.fill import fill_masks

    tyro.cli(
        fill_masks,
        prog="pmlm fill",
        description=fill.__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=is_rank_zero(os.environ),
    )


def extend_positions(arguments: Sequence[str]) -> None:
    """Give a model more positions, for longer sources and targets than it was pre-trained on."""
    import tyro

    from pmlm_dist.commands.extend_positions import extend_positions as write

    tyro.cli(write, prog="pmlm extend-positions", description=extend_positions.__doc__, args=arguments)


def demo_tasks(arguments: Sequence[str]) -> None:
    """The demo's tasks: `pmlm demo-tasks data` writes them, `table` shows the scores; `make demo-tasks` does all."""
    import tyro

    from pmlm_dist.downstream.demo.demo_tasks import write_data, write_table

    tyro.extras.subcommand_cli_from_dict(
        {"data": write_data, "table": write_table},
        prog="pmlm demo-tasks",
        description=demo_tasks.__doc__,
        args=list(arguments),
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare-corpus": prepare_corpus,
    "corpus": corpus,
    "inspect": inspect,
    "plot": plot,
    "plan": plan,
    "checkpoint": checkpoint,
    "export": export,
    "import": import_weights,
    "finetune": finetune,
    "evaluate": evaluate,
    "demo-tasks": demo_tasks,
    "generate": generate,
    "fill": fill,
    "extend-positions": extend_positions,
}
SINGLE_PROCESS = (export, import_weights, extend_positions)
"""Commands that write a folder from one process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, or 2 for settings or data that a user can mend."""
    is_process = arguments is None
    arguments = _without_option(
        "local_rank", sys.argv[1:] if arguments is None else arguments
    )  # deepspeed puts it first
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    command = COMMANDS.get(arguments[0])
    if command is None:
        return _failed(f"no command {arguments[0]!r}{_closest(arguments[0])}; `pmlm --help` lists them")
    if is_process and command is finetune:
        _run_finetune_supervised(arguments[1:])
    if command in SINGLE_PROCESS:
        from pmlm_dist.launch_environment import rendezvous

        ranks = int(rendezvous(os.environ)["WORLD_SIZE"])
        if ranks > 1:
            return _failed(f"{arguments[0]} runs in one process and found itself among {ranks}: start it by itself")
    return _said(partial(command, arguments[1:]))


def _run_finetune_supervised(arguments: Sequence[str]) -> NoReturn:
    """Fine-tune in a process below a supervisor (supervision/supervisor.py), as train.py does; ends both processes."""
    from pmlm_dist.supervision.supervisor import exit_now, run_supervised

    def rank(heartbeat: Heartbeat) -> int:
        signals = StopSignals()
        signals.install()
        return _outcome(partial(finetune, arguments, heartbeat, signals))

    exit_now(run_supervised(rank))


def _said(run: Callable[[], None]) -> int:
    """`_outcome`; an interruption, or asking for more memory than there is, ends with one message and its code."""
    from pmlm_dist.supervision.exit_codes import SIGNALLED, ExitCode, exit_code_of

    try:
        return _outcome(run)
    except KeyboardInterrupt:
        _failed("interrupted")
        return SIGNALLED + signal.SIGINT
    except (MemoryError, OSError, RuntimeError) as error:
        if exit_code_of(error) is not ExitCode.OUT_OF_MEMORY:
            raise
        _failed(f"out of memory ({str(error).splitlines()[0]}): ask for less, a smaller batch or fewer beams")
        return ExitCode.OUT_OF_MEMORY


def _outcome(run: Callable[[], None]) -> int:
    try:
        run()
    except ConfigError as error:
        return _failed(str(error))
    except ValueError as error:
        from pmlm_dist.corpus.shards import ShardError

        if not isinstance(error, ShardError):
            raise
        return _failed(str(error))
    except FolderInUse as error:
        _failed(str(error))
        return error.exit_code
    except Stopped as stopped:
        return stopped.exit_code
    except BrokenPipeError:
        if not discard_broken_stdout():
            raise
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: pmlm COMMAND [settings]   (pmlm COMMAND --help shows the settings)", "", *lines])


def _closest(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _failed(message: str) -> int:
    if is_rank_zero(os.environ):
        print(f"pmlm: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
