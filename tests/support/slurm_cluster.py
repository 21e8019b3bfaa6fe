"""A real SLURM cluster on this machine: one controller, two nodes and a spare one, in one folder.

    munged (own socket and key)  <-  slurmctld  <->  slurmd n1, slurmd n2, slurmd n3  ->  batch scripts, steps

A requeued job waits one second longer than the lifetime of credentials, which is therefore the minimum (5 s, not 120).
All nodes are this host and share its file system. Each is configured with 8 CPUs and 8 GPUs; the GPUs are device files
that are never opened. Node names do not resolve, as on some real clusters.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from support.worlds import free_port

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_POLL_S = 0.2

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=20
SlurmdTimeout=10
SchedulerParameters=sched_interval=1,batch_sched_delay=0
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs that are not installed; `tests/cluster/install.sh` installs them."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


class Cluster:
    """A running cluster in its own `folder`, which all users can read."""

    def __init__(self, folder: Path):
        self.folder = folder
        shell = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self._environ = {**shell, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str | Path, environ: Mapping[str, str] | None = None, timeout_s: float = 30) -> str:
        """Run a SLURM command and return its output. Raises RuntimeError when it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self._environ, **(environ or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), environ: Mapping[str, str]) -> Job:
        """Submit a batch script; its output goes to one file in this cluster's folder."""
        settings = ["--parsable", f"--output={self.folder}/job-%A.log", *options]
        number = self.run("sbatch", *settings, script, *arguments, environ=environ).strip()
        return Job(self, number)

    def start(self, *, timeout_s: float = 60) -> None:
        """Start all daemons and wait until all nodes are idle."""
        self._write_files()
        self._daemon("munged", *self._munge_options())
        self._daemon("slurmctld", "-f", self.folder / "slurm.conf")
        for node in NODES:
            self.start_daemon(node)
        wait_until(lambda: self.nodes() == dict.fromkeys(NODES, "idle"), timeout_s=timeout_s, what=self.nodes)

    def start_daemon(self, node: str) -> None:
        """Start the daemon of `node`."""
        self._daemon("slurmd", "-N", node, "-f", self.folder / "slurm.conf")

    def kill_daemon(self, name: str) -> None:
        """Kill `slurmctld` or `slurmd.NODE`; the processes of jobs on the node survive."""
        pid = int((self.folder / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), timeout_s=10, what=lambda: f"process {pid} has not ended")

    def restart_controller(self) -> None:
        """Kill the controller, as by a machine failure, and restart it."""
        self.kill_daemon("slurmctld")
        self._daemon("slurmctld", "-f", self.folder / "slurm.conf")
        wait_until(lambda: set(self.nodes()) == set(NODES), timeout_s=30, what=self.nodes)

    def logs(self, node: str) -> str:
        """Return the logs of the controller and of the daemon of `node`."""
        return "".join((self.folder / name).read_text() for name in ("slurmctld.log", f"slurmd.{node}.log"))

    def end_all_jobs(self) -> None:
        """Cancel pending jobs and kill running ones; return when all have ended."""
        if not self.run("squeue", "-h").strip():
            return
        self.run("scancel", "--state=PENDING", "--user", getpass.getuser())
        self.run("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
        self.run("scancel", "--user", getpass.getuser())
        wait_until(lambda: not self.run("squeue", "-h").strip(), timeout_s=40, what=lambda: self.run("squeue"))

    def stop(self) -> None:
        """End every job, then every daemon by its pid file."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, TimeoutError):
            self.end_all_jobs()
        for name in (*(f"slurmd.{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            _end(self.folder / name)

    def nodes(self) -> dict[str, str]:
        """Return the state of each node by `sinfo`."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").split()
        return dict(zip(lines[::2], lines[1::2], strict=True))

    def _write_files(self) -> None:
        for name in ("state", "munge", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        if os.geteuid() == 0:  # munged does not run as root
            owner = pwd.getpwnam("munge")
            for path in (self.folder / "munge", self.folder / "munge" / "key"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        host = socket.gethostname()
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 RealMemory=8000 "
            "Gres=gpu:8 State=UNKNOWN"
            for node in NODES
        ]
        configuration = _CONFIGURATION.format(
            host=host, port=free_port(), user=getpass.getuser(), folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(configuration)
        gpus = "".join(f"NodeName={node} Name=gpu File=/dev/tty[0-7]\n" for node in NODES)
        (self.folder / "gres.conf").write_text(gpus)

    def _munge_options(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge/{name}" for option, name in names.items()]

    def _daemon(self, *command: str | Path) -> None:
        as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"] if os.geteuid() == 0 else []
        self.run(*(as_munge if command[0] == "munged" else []), *command)


class Job:
    """A job submitted to a cluster, with one log for all attempts."""

    def __init__(self, cluster: Cluster, number: str):
        self.cluster, self.number = cluster, number
        self.log = cluster.folder / f"job-{number}.log"

    def printed(self) -> str:
        """Return the output of all attempts so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def state(self) -> str:
        """Return `PENDING`, `RUNNING`, `COMPLETED`, ... or `GONE`."""
        try:
            lines = self.cluster.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", self.number).split()
        except RuntimeError:  # the controller has removed it
            return "GONE"
        return lines[0] if lines else "GONE"

    def restarts(self) -> int:
        """Return the number of requeues."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return int(shown.partition("Restarts=")[2].split()[0])

    def nodes(self) -> list[str]:
        """Return the nodes of the job; rank 0 and the batch script are on the first."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        names = re.search(r"^\s*NodeList=(\S+)$", shown, flags=re.MULTILINE)
        assert names, shown
        return self.cluster.run("scontrol", "show", "hostnames", names[1]).split()

    def set_limit(self, *, within_s: float) -> None:
        """Set the time limit, in whole minutes since the start, to at least `within_s` seconds from now."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        times = re.search(r"RunTime=(?:(\d+)-)?(\d+):(\d+):(\d+)", shown)
        assert times, shown
        days, hours, minutes, seconds = (int(number or 0) for number in times.groups())
        runs_s = ((24 * days + hours) * 60 + minutes) * 60 + seconds
        limit = math.ceil((runs_s + within_s) / 60)
        self.cluster.run("scontrol", "update", f"jobid={self.number}", f"TimeLimit={limit}")

    def wait_for_print(self, text: str, *, timeout_s: float = 120) -> None:
        """Wait until `text` is in the output."""
        self._wait(lambda: text in self.printed(), timeout_s=timeout_s, what=f"{text!r} was not printed")

    def wait_for_end(self, *, timeout_s: float = 150) -> str:
        """Wait for the end of the job and return its state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")
        self._wait(lambda: self.state() in final, timeout_s=timeout_s, what="the job has not ended")
        return self.state()

    def wait_for_restart(self, number: int, *, timeout_s: float = 60) -> None:
        """Wait until the job has been requeued `number` times."""
        self._wait(lambda: self.restarts() >= number, timeout_s=timeout_s, what=f"no restart {number}")

    def _wait(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        wait_until(condition, timeout_s=timeout_s, what=lambda: f"{what}; {self.state()}\n{self.printed()}")


def processes_of(job: str, *, node: str) -> list[int]:
    """Return the processes of `job` on `node`: batch script, srun, supervisors, ranks and their descendants."""
    pids, variables = [], {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variables <= set(path.read_bytes().split(b"\0")):
                pids.append(int(path.parent.name))
    return pids


def rank_process(job: str, *, rank: int) -> int:
    """Return the process of a rank in `job`: the child of its supervisor, which has the same command line."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (folder / "environ").read_bytes().split(b"\0")
            variables = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if variables <= set(environ) and b"train.py" in command and b"srun" not in command[0]:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    (pid,) = (pid for pid, parent in parents.items() if parent in parents)
    return pid


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: Callable[[], object]) -> None:
    """Wait until `condition()` holds. Raises TimeoutError with the text of `what()`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:g} s: {what()}")
        time.sleep(_POLL_S)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, stopped at the end of the block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _end(pid_file: Path) -> None:
    """End the daemon of `pid_file` by SIGTERM, then SIGKILL."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            os.kill(pid, number)
            wait_until(
                lambda: not Path(f"/proc/{pid}").exists(),
                timeout_s=seconds,
                what=lambda: f"process {pid} has not ended",
            )
            return
