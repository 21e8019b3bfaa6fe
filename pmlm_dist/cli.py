"""The `pmlm` command: a table of commands, each a function of the remaining arguments.

The first line of a command's docstring is its help. What a command needs is imported inside it, so that `pmlm --help`
and a mistyped command answer quickly.
"""

import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, NoReturn

from pmlm_dist import __version__
from pmlm_dist.config import BatchConfig, RunConfig
from pmlm_dist.console import flush_stdout, prepare_streams, print_safely
from pmlm_dist.launch_environment import choose_accelerator, is_rank_zero, launched_ranks, set_num_threads
from pmlm_dist.options import option_value, preset_of, without_option
from pmlm_dist.ranges import Positive
from pmlm_dist.supervision import exit_codes
from pmlm_dist.supervision.heartbeat import Heartbeat
from pmlm_dist.supervision.signals import StopSignals, interruptible

PROGRAM = "pmlm"
USER_ERROR = int(exit_codes.ExitCode.BAD_CONFIGURATION)


def train(arguments: Sequence[str], heartbeat: Heartbeat | None = None, signals: StopSignals | None = None) -> None:
    """Pre-train a pseudo-masked language model, or resume its run; `train.py`, for launchers, is the same."""
    set_num_threads()
    config = run_config(arguments)
    from pmlm_dist.training.run import pretrain  # torch reads OMP_NUM_THREADS when it is imported

    pretrain(config, signals, heartbeat)


def run_config(arguments: Sequence[str]) -> RunConfig:
    """Return the settings of a pre-training: a preset, then overrides by name.

    Exits with a message for an unknown setting; raises `ConfigError` for an unknown preset.
    """
    from pmlm_dist.presets import PRESETS

    preset = preset_of(arguments, PRESETS, default="base")
    notes = (
        "\n\ndeepspeed --num_gpus 8 train.py                  the paper's base model on data/corpus\n\n"
        "deepspeed --num_gpus 2 train.py --preset tiny    the demo\n\n"
        "torchrun, srun and mpirun start it as well. Any setting is overridden by name: `--train.steps 1000`.\n\n"
        f"--preset {'|'.join(PRESETS)}: where the defaults come from (now: {preset})."
    )
    rest = without_option("preset", without_option("local_rank", arguments))
    return _parse(RunConfig, train, rest, default=PRESETS[preset](), notes=notes)


def prepare_corpus(arguments: Sequence[str]) -> None:
    """Cut raw text into shuffled WebDataset shards of packed samples (with mpirun: on many cores and nodes)."""
    from pmlm_dist.corpus.prepare import mpi, pipeline

    config = _parse(pipeline.PrepareConfig, prepare_corpus, arguments, flat=True)
    with mpi.abort_on_failure(mpi.world(), exit_codes.explain):
        pipeline.prepare_corpus(config)


def corpus(arguments: Sequence[str]) -> None:
    """Check that a corpus is complete: `pmlm corpus verify DIR`."""
    from pmlm_dist.corpus.verify import verify

    _run_subcommand({"verify": verify}, corpus, arguments)


def inspect(arguments: Sequence[str]) -> None:
    """Show one sample of a corpus as the model gets it: spans, factorization order, slots, visibility."""
    from pmlm_dist.commands import inspect as command

    command.inspect(_parse(command.InspectConfig, inspect, arguments))


def plot(arguments: Sequence[str]) -> None:
    """Plot the losses of a run as a PNG."""
    from pmlm_dist.commands.plot import PlotConfig, plot_losses

    plot_losses(_parse(PlotConfig, plot, arguments))


def checkpoint(arguments: Sequence[str]) -> None:
    """List, verify or reshape the checkpoints of a run: `pmlm checkpoint ls|verify|reshape DIR`."""
    from pmlm_dist.commands import checkpoint as command

    table = {"ls": command.ls, "verify": command.verify, "reshape": command.reshape}
    _run_subcommand(table, checkpoint, arguments)


def plan(arguments: Sequence[str]) -> None:
    """Estimate what a run needs before it is queued: memory, step time, communication, days; and what does not fit."""
    from pmlm_dist.planning.settings import PlanConfig
    from pmlm_dist.presets import PRESETS

    preset = preset_of(arguments, PRESETS, default="base")
    notes = f"\n--preset {'|'.join(PRESETS)}: where the defaults come from (now: {preset})."
    default = PlanConfig.of_preset(preset)
    config = _parse(PlanConfig, plan, without_option("preset", arguments), default=default, notes=notes)
    from pmlm_dist.commands import plan as command

    command.run(config)


def export(arguments: Sequence[str]) -> None:
    """Write a checkpoint for Hugging Face transformers (MPNet, BERT) or as UniLM's; loaded back and compared."""
    from pmlm_dist.conversion.export import export as write

    _parse(write, export, arguments)


def import_(arguments: Sequence[str]) -> None:
    """Convert a BERT, MPNet or UniLM checkpoint, to start pre-training from it with `train.py --init`."""
    from pmlm_dist.conversion.importing import import_weights

    _parse(import_weights, import_, arguments)


def finetune(arguments: Sequence[str], heartbeat: Heartbeat | None = None, signals: StopSignals | None = None) -> None:
    """Fine-tune a model on a task: GLUE, SQuAD or your own; `pmlm finetune --task list` lists all."""
    import tyro

    from pmlm_dist.downstream.settings import GENERATION, RECIPES, FinetuneConfig, GenerationConfig

    set_num_threads()
    from pmlm_dist.downstream import finetune as driver
    from pmlm_dist.downstream.tasks.registry import TASKS

    task = option_value("task", arguments)
    if task == "list":
        print("\n".join(f"{name:16}{kind.about}" for name, kind in TASKS.items()))
        return
    preset = preset_of(arguments, RECIPES, default=TASKS[task].preset if task in TASKS else "glue")
    default = FinetuneConfig(
        task=tyro.MISSING,
        model=tyro.MISSING,
        output=tyro.MISSING,
        preset=preset,
        recipe=RECIPES[preset],
        generation=GENERATION.get(preset, GenerationConfig()),
    )
    notes = f"\n--preset {'|'.join(RECIPES)}: where the recipe comes from (now: {preset})."
    rest = without_option("preset", arguments)
    driver.finetune(_parse(FinetuneConfig, finetune, rest, default=default, notes=notes), heartbeat, signals)


def score(arguments: Sequence[str]) -> None:
    """Write the log-likelihood of every text of a file under a pre-trained model: pmlm score FILE --model DIR."""
    set_num_threads()
    from pmlm_dist.downstream.score import score_file

    _parse(score_file, score, arguments, flat=True)


def embed(arguments: Sequence[str]) -> None:
    """Write a vector for every text of a file: pmlm embed FILE --model DIR --output VECTORS.npy."""
    set_num_threads()
    from pmlm_dist.downstream.embed import embed_file

    _parse(embed_file, embed, arguments, flat=True)


def linear_probe(arguments: Sequence[str]) -> None:
    """Measure what a linear classifier reads from a model's frozen vectors, beside untrained ones and TF-IDF."""
    set_num_threads()
    from pmlm_dist.downstream import embed as command

    command.linear_probe(_parse(command.LinearProbeConfig, linear_probe, arguments))


def evaluate(arguments: Sequence[str]) -> None:
    """Score a fine-tuned model on a split, and write its predictions; with --suite: a model on minimal pairs."""
    set_num_threads()
    if option_value("suite", arguments) is not None:
        from pmlm_dist.downstream.suite import SuiteConfig, evaluate_suite

        evaluate_suite(_parse(SuiteConfig, evaluate, arguments))
        return
    from pmlm_dist.downstream.evaluate import evaluate_saved
    from pmlm_dist.downstream.settings import EvaluateConfig

    evaluate_saved(_parse(EvaluateConfig, evaluate, arguments))


def predict(arguments: Sequence[str]) -> None:
    """Predict new inputs without labels with a fine-tuned model of any task."""
    from pmlm_dist.downstream.settings import PredictConfig

    set_num_threads()
    from pmlm_dist.downstream.evaluate import predict_file

    predict_file(_parse(PredictConfig, predict, arguments))


def generate(arguments: Sequence[str]) -> None:
    """Generate targets for a file of sources with a model fine-tuned for it."""
    import tyro

    set_num_threads()
    from pmlm_dist.commands import generate as command

    default = command.GenerateConfig(model=tyro.MISSING, input=tyro.MISSING, output=tyro.MISSING)
    model = option_value("model", arguments)
    if model is not None:
        default = dataclasses.replace(default, decoding=command.saved_decoding(model))
    notes = "\nWith --model the settings of its fine-tuning are the defaults."
    command.generate(_parse(command.GenerateConfig, generate, arguments, default=default, notes=notes, flat=True))


def fill(arguments: Sequence[str]) -> None:
    """Fill the masks of a text in any order: pmlm fill "text with [MASK] and [MASK:3]" --model DIR."""
    from pmlm_dist.commands.fill import fill_masks

    _parse(fill_masks, fill, arguments, flat=True)


def extend_positions(arguments: Sequence[str]) -> None:
    """Give a model more positions, for longer sources and targets than it was pre-trained on."""
    from pmlm_dist.commands.extend_positions import extend_positions as write

    _parse(write, extend_positions, arguments)


def demo_tasks(arguments: Sequence[str]) -> None:
    """The demo's tasks: `pmlm demo-tasks data` writes them, `table` prints the scores; `make demo-tasks` runs all."""
    from pmlm_dist.downstream.demo.demo_tasks import write_data, write_table

    _run_subcommand({"data": write_data, "table": write_table}, demo_tasks, arguments)


def _name(command: Callable[..., None]) -> str:
    return command.__name__.rstrip("_").replace("_", "-")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    _name(command): command
    for command in (
        *(train, prepare_corpus, corpus, inspect, plot, plan, checkpoint, export, import_, finetune, evaluate, predict),
        *(score, embed, linear_probe, demo_tasks, generate, fill, extend_positions),
    )
}
SUPERVISED = {train: "train.py", finetune: PROGRAM}
"""Commands whose ranks run below a supervisor, with the name in their messages."""
SINGLE_PROCESS = (export, import_, extend_positions)
"""Commands that write a folder from one process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (supervision/exit_codes.py)."""
    is_process = arguments is None
    if is_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command handles it: no traceback of the imports
        prepare_streams()
    choose_accelerator()
    # deepspeed puts --local_rank first
    arguments = without_option("local_rank", sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        return _run(lambda: print(_help()) or (0 if arguments else USER_ERROR))
    if "--version" in (arguments[0], *arguments[1:2]):
        return _run(lambda: print(f"pmlm_dist {__version__}"))
    command = COMMANDS.get(arguments[0])
    if command is None:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return _usage_error(f"no command {arguments[0]!r}{hint}; `pmlm --help` lists them")
    if is_process and command in SUPERVISED:
        run_below_supervisor(command, arguments[1:])
    ranks = launched_ranks(os.environ) if command in SINGLE_PROCESS else 1
    if ranks > 1:
        return _usage_error(
            f"{arguments[0]} runs in one process but was started as {ranks}: start it without a launcher"
        )
    with ExitStack() as stack:

        def run_command() -> None:
            if is_process:
                stack.enter_context(interruptible())  # here, where a signal has a message; until after that message
            command(arguments[1:])

        return _run(run_command)


def _run(main: Callable[[], int | None]) -> int:
    def main_with_output() -> int | None:
        code = main()
        flush_stdout()  # here, where a full disk has a message; the interpreter's flush at exit has none
        return code

    return exit_codes.run(main_with_output, program=PROGRAM)


def run_below_supervisor(command: Callable[..., None], arguments: Sequence[str]) -> NoReturn:
    """Run a command of `SUPERVISED` in a process below a supervisor; does not return."""
    from pmlm_dist.supervision.supervisor import exit_now, run_supervised

    def rank(heartbeat: Heartbeat) -> None:
        signals = StopSignals()
        signals.install()
        command(arguments, heartbeat, signals)

    exit_now(run_supervised(rank, program=SUPERVISED[command]))


# ------------------------------------------------------------------------------------------------------------ arguments


def _parse(
    kind: Any,
    command: Callable[..., None],
    arguments: Sequence[str],
    *,
    default: Any = None,
    notes: str = "",
    flat: bool = False,
) -> Any:
    """Read `arguments` into the dataclass `kind`, or call the function `kind` with them; exits with help or an error.

    `notes` follow the command's docstring in its help. `flat`: nested settings are named without their prefix.
    """
    import tyro

    # The option of `global_` without the underscore that Python needs.
    BatchConfig.__annotations__["global_"] = Annotated[int | None, Positive, tyro.conf.arg(name="global")]
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=f"{PROGRAM} {_name(command)}",
        description=f"{command.__doc__}{notes}",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,) if flat else (),
        console_outputs=is_rank_zero(os.environ),
        **options,
    )


def _run_subcommand(
    table: dict[str, Callable[..., Any]], command: Callable[..., None], arguments: Sequence[str]
) -> None:
    import tyro

    tyro.extras.subcommand_cli_from_dict(
        table, prog=f"{PROGRAM} {_name(command)}", description=command.__doc__, args=list(arguments)
    )


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: pmlm COMMAND [settings]   (pmlm COMMAND --help lists the settings)", "", *lines])


def _usage_error(message: str) -> int:
    if is_rank_zero(os.environ):
        print_safely(f"{PROGRAM}: {message}", to_stderr=True)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
