"""What a process of a run ends with, by cause, and whether the run is then started again: the one table of it.

The ranks' supervisors (`supervisor.py`) give every rank of a run the code of what ended it first; the batch scripts and
`restarts.py` decide by it; docs/operations.md shows it to people.
"""

from __future__ import annotations

import enum
import os
import re
import signal
import traceback
from collections.abc import Callable

from pmlm_dist.console import discard_broken_stdout, print_safely
from pmlm_dist.launch_environment import is_rank_zero

SIGNALLED = 128
"""Added to the number of the signal that ended a process, as shells and SLURM do."""


class RestartPolicy(enum.Enum):
    """Whether a run is started again by itself."""

    NEVER = "no"
    ALWAYS = "yes"
    """As often as it takes, as long as steps are gained."""
    ONCE = "once"
    """Once in a row: with the same settings it will most likely happen again."""
    BOUNDED = "if steps were gained"
    """At most so many times, and only if steps were gained since the last time."""


class ExitCode(enum.IntEnum):
    """Exit codes of train.py; 75 is EX_TEMPFAIL of sysexits.h."""

    meaning: str
    restart: RestartPolicy

    def __new__(cls, code: int, meaning: str, again: RestartPolicy) -> ExitCode:  # noqa: D102
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.restart = meaning, again
        return member

    DONE = 0, "complete; or ended by `STOP` or `--train.stop-at`", RestartPolicy.NEVER
    FAILED = 1, "failed: a Python error, or a corpus that cannot be read", RestartPolicy.BOUNDED
    BAD_CONFIGURATION = (
        2,
        "a wrong setting, or a checkpoint that does not fit; nothing was computed",
        RestartPolicy.NEVER,
    )
    PREEMPTED = 75, "told to stop; the last checkpoint stands", RestartPolicy.ALWAYS
    HUNG = 80, "a rank made no progress for as long as its phase may take (`--watchdog`)", RestartPolicy.BOUNDED
    OUT_OF_MEMORY = (
        81,
        "out of memory, of the device or of the node (the kernel or SLURM killed a rank)",
        RestartPolicy.ONCE,
    )
    NOT_FINITE = (
        82,
        "too many steps in a row with gradients that are not finite, or no loss scale left",
        RestartPolicy.NEVER,
    )
    IN_USE = 83, "another job is at work in this run folder; nothing was changed", RestartPolicy.NEVER
    SUPERSEDED = (
        84,
        "another start has taken over the run folder; this one must not write to it any more",
        RestartPolicy.NEVER,
    )


_BY_CODE = {int(code): code for code in ExitCode}


def restart_policy(code: int) -> RestartPolicy:
    """Whether a run that ended with `code` is started again; any code that is no `ExitCode` is a failure."""
    return _BY_CODE[code].restart if code in _BY_CODE else RestartPolicy.BOUNDED


def describe(code: int) -> str:
    """What `code` means."""
    if code in _BY_CODE:
        return _BY_CODE[code].meaning
    return f"ended by signal {code - SIGNALLED}" if code > SIGNALLED else "unknown"


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|no host memory", re.IGNORECASE)
_NO_SCALE_LEFT = "loss scale already at minimum"
_OF_PEERS = re.compile(
    r"\b(gloo|nccl|TCPStore|torch\.distributed|CorpusReadError)\b|connection (closed|reset)|timed out waiting",
    re.IGNORECASE,
)


def exit_code_of(error: BaseException) -> ExitCode:
    """The code for an error that ends a rank; an error of this package may carry its own as `exit_code`."""
    if isinstance(getattr(error, "exit_code", None), int):
        return _BY_CODE[error.exit_code]  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, MemoryError) or (
        isinstance(error, (OSError, RuntimeError)) and _matches(_OUT_OF_MEMORY, error)
    ):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, FloatingPointError) or _NO_SCALE_LEFT in str(error):
        return ExitCode.NOT_FINITE
    return ExitCode.FAILED


def blames_peers(error: BaseException) -> bool:
    """Whether an error tells that other ranks could not be talked to, so that its cause is likely elsewhere."""
    return isinstance(error, (OSError, RuntimeError)) and _matches(_OF_PEERS, error)


def _matches(pattern: re.Pattern[str], error: BaseException) -> bool:
    return bool(pattern.search(f"{type(error).__module__}.{type(error).__name__}: {error}"))


COLLECTIVE_ENDS = (ExitCode.DONE, ExitCode.BAD_CONFIGURATION, ExitCode.PREEMPTED, ExitCode.IN_USE)
"""Ends that all ranks reach together: rank 0 prints the message, and no rank counts as the cause."""


def run(
    main: Callable[[], int | None], *, program: str, on_failure: Callable[[BaseException], None] | None = None
) -> int:
    """Call `main` and return the exit code of this process: the one mapping from exceptions to exit codes.

    An exception that carries an `exit_code`, and lack of memory, is explained by its message; any other is printed with
    its traceback. `on_failure` is called first with what is no collective end.
    """
    try:
        return main() or int(ExitCode.DONE)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError as error:
        return int(ExitCode.DONE) if discard_broken_stdout() else _failed(error, program, on_failure)
    except BaseException as error:
        return _failed(error, program, on_failure)


def _failed(error: BaseException, program: str, on_failure: Callable[[BaseException], None] | None) -> int:
    if isinstance(error, KeyboardInterrupt):
        code, message = SIGNALLED + signal.SIGINT, "interrupted"
    else:
        code, message = int(exit_code_of(error)), _message(error)
    if code in COLLECTIVE_ENDS:
        if message and is_rank_zero(os.environ):
            _print_message(program, message)
        return code
    if on_failure is not None:
        on_failure(error)
    if message:
        _print_message(program, message)
    else:
        print_safely(traceback.format_exc(), to_stderr=True)
    return code


def _print_message(program: str, message: str) -> None:
    is_list = message.startswith("- ")  # the problems of a ConfigError, one a line
    print_safely(f"{program}:\n{message}" if is_list else f"{program}: {message}", to_stderr=True)


def _message(error: BaseException) -> str:
    """The message that explains `error` without a traceback; empty if there is none."""
    code = exit_code_of(error)
    if code in (ExitCode.DONE, ExitCode.PREEMPTED):  # logged where it happened
        return ""
    if code is ExitCode.OUT_OF_MEMORY:
        return f"out of memory ({str(error).partition(chr(10))[0]}): use a smaller batch, more ranks or fewer beams"
    if hasattr(error, "exit_code") or isinstance(error, FloatingPointError):
        return str(error)
    return ""
