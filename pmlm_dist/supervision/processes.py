"""Linux processes: orphans and parents, kills by the kernel's out-of-memory killer."""

import contextlib
import ctypes
import os
import re
import signal
import time
from pathlib import Path

_POLL_S = 0.02
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parents end."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def oom_kills() -> int:
    """Return the number of out-of-memory kills in this process' control group; 0 where the kernel does not count."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, group = line.split(":", 2)
            version_1 = "memory" in controllers.split(",")
            root = Path("/sys/fs/cgroup/memory" if version_1 else "/sys/fs/cgroup")
            events = root / group.lstrip("/") / ("memory.oom_control" if version_1 else "memory.events")
            if (version_1 or not controllers) and events.exists():
                return parse_oom_kills(events.read_text(encoding="ascii"))
    return 0


def parse_oom_kills(events: str) -> int:
    """Return the number after `oom_kill` in the text of a control group's events file."""
    match = re.search(r"^oom_kill (\d+)$", events, flags=re.MULTILINE)
    return int(match[1]) if match else 0


def process_state(pid: int) -> str:
    """Return the kernel's name for the state of a process: `running`, `stopped`, ...; `gone` without a process."""
    with contextlib.suppress(OSError):
        match = re.search(r"^State:\s+\S+ \((.*)\)$", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
        return match[1] if match else "unknown"
    return "gone"


def _children() -> list[int]:
    """Return the children of this process, adopted ones included."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if entry.read_text(errors="replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                children.append(int(entry.parent.name))
    return children


def end_children(*, grace_s: float, kill_s: float) -> None:
    """Wait `grace_s` for the children of this process, adopted ones included, then kill them for up to `kill_s`."""
    start = time.monotonic()
    while time.monotonic() < start + grace_s + kill_s:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            if time.monotonic() > start + grace_s:
                for pid in _children():  # each time: the children of a killed child are adopted
                    send_signal(pid, signal.SIGKILL)
            time.sleep(_POLL_S)


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal, unless the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def send_to_main_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal to the main thread of a process, which handles it before it resumes, also after a SIGSTOP.

    A signal to the process may be handled by any thread while the main thread runs on. That is the fallback without
    glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):
        libc.tgkill(pid, pid, number)
    else:
        send_signal(pid, number)


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9."""
    return signal.Signals(number).name if number in {int(known) for known in signal.Signals} else f"signal {number}"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
