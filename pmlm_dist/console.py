"""Console output that must not end a run: the terminal may be gone, the log's disk full. Standard library only."""

import contextlib
import errno
import io
import os
import select
import sys


def print_safely(text: str, *, to_stderr: bool = False) -> bool:
    """Print `text` and flush; returns False if it could not be written."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)
        return True
    return False


def flush_stdout(text: str = "") -> None:
    """Print `text` and flush. Raises OSError if standard output cannot be written, and discards what is left of it."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        if error.errno != errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error.filename = "standard output"
        raise


def prepare_streams() -> None:
    """Make the standard streams usable, at the start of a process.

    Each that was closed (`>&-`) becomes /dev/null. Else Python has None there, and the next file that is opened gets
    the stream's number: what libraries print would be written into it. Characters that the locale's encoding lacks are
    printed as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free number: the stream's
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error


def discard_broken_stdout() -> bool:
    """Return True if the reader of standard output has closed it (`--help | head`); redirect it to /dev/null then.

    Without the redirection Python's own flush at exit would fail and change the exit code.
    """
    output = select.poll()
    output.register(sys.stdout, 0)
    is_broken = any(event & select.POLLERR for _, event in output.poll(0))
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_broken
