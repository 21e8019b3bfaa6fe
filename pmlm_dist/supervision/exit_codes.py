"""Exit codes of a run's processes, by cause, and the restart policy of each code.

The supervisors (`supervisor.py`) give every rank the code of the first failure. The batch scripts and `restart.py`
decide by it; docs/operations.md shows the table to users.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import signal
import traceback
from collections.abc import Callable

from pmlm_dist.console import discard_broken_stdout, flush_stdout, print_safely
from pmlm_dist.launch_environment import is_rank_zero

SIGNALLED = 128
"""Offset of the exit code of a process that a signal ended, as in shells and SLURM."""


class RestartPolicy(enum.Enum):
    """When a run is restarted automatically."""

    NEVER = "no"
    ALWAYS = "yes"
    """Any number of times, as long as the run makes progress."""
    ONCE = "once"
    """Once in a row: with the same settings the failure is likely to repeat."""
    BOUNDED = "if it made progress"
    """A limited number of times, and only if steps were gained since the last restart."""


class ExitCode(enum.IntEnum):
    """Exit codes of train.py; 75 is EX_TEMPFAIL of sysexits.h."""

    meaning: str
    restart: RestartPolicy

    def __new__(cls, code: int, meaning: str, restart: RestartPolicy) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.restart = meaning, restart
        return member

    DONE = 0, "complete, or stopped by `STOP` or `--train.stop-at`", RestartPolicy.NEVER
    FAILED = (
        1,
        "failed: a Python error, an unreadable corpus, or a disk that is full or read-only",
        RestartPolicy.BOUNDED,
    )
    BAD_CONFIGURATION = (
        2,
        "an invalid setting, or a checkpoint that does not match the settings; nothing was computed",
        RestartPolicy.NEVER,
    )
    PREEMPTED = 75, "stopped by a signal; the last checkpoint is valid", RestartPolicy.ALWAYS
    HUNG = 80, "a rank made no progress within the time limit of its phase (`--watchdog`)", RestartPolicy.BOUNDED
    OUT_OF_MEMORY = (
        81,
        "out of memory, on the device or the node (the kernel or SLURM killed a rank)",
        RestartPolicy.ONCE,
    )
    NOT_FINITE = (
        82,
        "too many consecutive steps with gradients that are not finite, or the loss scale is at its minimum",
        RestartPolicy.NEVER,
    )
    IN_USE = 83, "another job uses this run folder; nothing was changed", RestartPolicy.NEVER
    SUPERSEDED = (
        84,
        "a newer attempt has taken over the run folder; this one stopped writing to it",
        RestartPolicy.NEVER,
    )
    INTERRUPTED = 130, "interrupted by Ctrl-C (SIGINT); the last checkpoint is valid", RestartPolicy.NEVER


_BY_CODE = {int(code): code for code in ExitCode}


def restart_policy(code: int) -> RestartPolicy:
    """Return the policy for a run that ended with `code`; a code outside `ExitCode` counts as a failure."""
    return _BY_CODE[code].restart if code in _BY_CODE else RestartPolicy.BOUNDED


def describe(code: int) -> str:
    """Return the meaning of `code`."""
    if code in _BY_CODE:
        return _BY_CODE[code].meaning
    return f"ended by signal {code - SIGNALLED}" if code > SIGNALLED else "unknown"


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|no host memory", re.IGNORECASE)
_NO_SCALE_LEFT = "loss scale already at minimum"
_PEER_FAILURE = re.compile(
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


def is_peer_failure(error: BaseException) -> bool:
    """Return True for a failed communication with other ranks: the root cause is likely on one of those."""
    return isinstance(error, (OSError, RuntimeError)) and _matches(_PEER_FAILURE, error)


_DISK_ERRORS = {
    errno.ENOSPC: "cannot be written: {}; make room on the disk",
    errno.EDQUOT: "cannot be written: {}; make room, or raise the quota",
    errno.EFBIG: "cannot be written: {}; raise the limit of the size of a file (`ulimit -f`)",
    errno.EROFS: "cannot be written: {}; choose a folder that can be written to",
    errno.EACCES: "cannot be opened: {}; change its permissions, or choose another",
    errno.EPERM: "cannot be opened: {}; change its permissions, or choose another",
    errno.ENOTDIR: "cannot be opened: {}; choose another path",
    errno.EISDIR: "cannot be opened: {}; choose another path",
    errno.ENAMETOOLONG: "cannot be opened: {}; choose a shorter path",
    errno.ELOOP: "cannot be opened: {}; correct the links",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""In the errors of libraries written in Rust: safetensors, tokenizers."""


def _disk_problem(error: BaseException) -> str:
    """Return what could not be written, why, and the way out; empty for other errors."""
    match, first = _OS_ERROR.search(str(error)), error.__context__
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    # torch.save raises an error of its own while it closes a file on a full disk.
    if isinstance(error, RuntimeError) and isinstance(first, OSError):
        number = first.errno
    if number not in _DISK_ERRORS:
        return ""
    name = getattr(error, "filename", None) or "a file"
    return f"{name} {_DISK_ERRORS[number].format(os.strerror(number))}, then start again"


def _matches(pattern: re.Pattern[str], error: BaseException) -> bool:
    # The class' module counts, too: errors of torch.distributed name the library there and not in their text.
    return bool(pattern.search(f"{type(error).__module__}.{type(error).__name__}: {error}"))


STOPS = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
"""Ends as asked for: complete, or stopped by a signal or a file."""
COLLECTIVE_ENDS = (*STOPS, ExitCode.BAD_CONFIGURATION, ExitCode.IN_USE)
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


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code for `error` and what is printed: its message, or its traceback if none explains it."""
    code, message = _explain(error)
    return code, message or "".join(traceback.format_exception(error))


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):  # its argument, if any: the signal
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        return SIGNALLED + number, f"interrupted ({number.name})"
    return int(exit_code_of(error)), _message(error)


def _failed(error: BaseException, program: str, on_failure: Callable[[BaseException], None] | None) -> int:
    if isinstance(error, OSError) and error.filename is None and error.errno in _DISK_ERRORS:
        try:
            flush_stdout("\n")  # is it standard output that cannot be written?
        except OSError as full:
            error = full
    code, message = _explain(error)
    is_collective = code in COLLECTIVE_ENDS or isinstance(error, KeyboardInterrupt)
    if not is_collective and on_failure is not None:
        on_failure(error)
    if message:
        if not is_collective or is_rank_zero(os.environ):
            _print_message(program, message)
    elif not is_collective:
        print_safely(traceback.format_exc(), to_stderr=True)
    return code


def _print_message(program: str, message: str) -> None:
    is_list = message.startswith("- ")  # the problems of a ConfigError, one a line
    print_safely(f"{program}:\n{message}" if is_list else f"{program}: {message}", to_stderr=True)


def _message(error: BaseException) -> str:
    """The message that explains `error` without a traceback; empty if there is none."""
    code = exit_code_of(error)
    if code in STOPS:  # logged where it happened
        return ""
    if code is ExitCode.OUT_OF_MEMORY:
        return f"out of memory ({str(error).partition(chr(10))[0]}): use a smaller batch, more ranks or fewer beams"
    if hasattr(error, "exit_code") or isinstance(error, FloatingPointError):
        return str(error)
    return _disk_problem(error)
