"""Processes as Linux has them: children that go with their parent, kills for want of memory, what the dead leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from pathlib import Path

_LEFTOVERS_S = 2.0
_END_S = 5.0
_POLL_S = 0.02
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """From now on processes below this one come to it when their parents end."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """From now on this process is killed when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed in this control group for want of memory, where it counts them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, group = line.split(":", 2)
            version_1 = "memory" in controllers.split(",")
            root = Path("/sys/fs/cgroup/memory" if version_1 else "/sys/fs/cgroup")
            events = root / group.lstrip("/") / ("memory.oom_control" if version_1 else "memory.events")
            if (version_1 or not controllers) and events.exists():
                return count_of_kills(events.read_text(encoding="ascii"))
    return 0


def count_of_kills(events: str) -> int:
    """The number after `oom_kill` in a control group's file."""
    found = re.search(r"^oom_kill (\d+)$", events, flags=re.MULTILINE)
    return int(found[1]) if found else 0


def state_of(pid: int) -> str:
    """State of a process as the kernel calls it: `running`, `stopped`, ...; `gone` when there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"^State:\s+\S+ \((.*)\)$", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
        return found[1] if found else "unknown"
    return "gone"


def _children() -> list[int]:
    """Processes whose parent this one is, also those it has inherited."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if entry.read_text(errors="replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                found.append(int(entry.parent.name))
    return found


def end_descendants() -> None:
    """What the rank has started comes to its supervisor when the rank is gone; it ends by itself, or is killed."""
    began = time.monotonic()
    while time.monotonic() < began + _LEFTOVERS_S + _END_S:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            if time.monotonic() > began + _LEFTOVERS_S:
                for pid in _children():
                    send(pid, signal.SIGKILL)
            time.sleep(_POLL_S)


def clear_shared_memory(since: float) -> None:
    """Remove what torch's processes, now dead, have left in /dev/shm since then: the names say whose it is."""
    for path in Path("/dev/shm").glob("torch_[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.name.split("_")[1])
            if (
                path.stat().st_uid == os.getuid()
                and path.stat().st_mtime >= since
                and not Path(f"/proc/{pid}").exists()
            ):
                path.unlink()


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal, unless the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def send_to_main_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process' main thread, which handles it before all else, also where it was stopped.

    A signal to the process is any thread's to handle, while the others go on. Without glibc it is such a one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):
        libc.tgkill(pid, pid, number)
    else:
        send(pid, number)


def name_of(number: int) -> str:
    """`SIGKILL` for 9."""
    return signal.Signals(number).name if number in {int(known) for known in signal.Signals} else f"signal {number}"


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
