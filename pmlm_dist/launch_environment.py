"""The launcher's environment: rank, world size and local ranks of a process before `torch.distributed` starts.

    deepspeed, torchrun | mpirun (Open MPI, MPICH) | srun | plain python
      -> LAUNCHERS (the variables of each) -> rendezvous: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
                                           -> is_rank_zero, local_world_size, threads_per_rank

Standard library only: the entry points import it before torch, which reads OMP_NUM_THREADS on import.
"""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pmlm_dist.config import ConfigError

_FIRST_PORT, _PORTS = 20_000, 12_000  # below the range of ephemeral ports (32768 on Linux)
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launcher:
    """Names of the variables that a launcher sets for each rank; of several names the first that is set counts."""

    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...]
    required: tuple[str, ...] = ()
    """Variables that must be present besides `rank` for this launcher to be recognized."""
    job: tuple[str, ...] = ()
    """Variables with the job's identity, equal on all ranks."""
    nodes: tuple[str, ...] = ()
    node_list: tuple[str, ...] = ()
    is_mpi: bool = False


# In the order of precedence. MPI precedes Slurm: `mpirun` in the shell of `srun --pty bash` inherits that step's
# variables, and with them every rank would be a run of its own in the same folder.
LAUNCHERS = (
    Launcher(  # torchrun and deepspeed
        rank="RANK",
        world_size=("WORLD_SIZE",),
        local_rank="LOCAL_RANK",
        local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        required=("WORLD_SIZE",),
    ),
    Launcher(  # Open MPI
        rank="OMPI_COMM_WORLD_RANK",
        world_size=("OMPI_COMM_WORLD_SIZE",),
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        job=("PMIX_NAMESPACE",),
        is_mpi=True,
    ),
    Launcher(  # MPICH
        rank="PMI_RANK",
        world_size=("PMI_SIZE",),
        local_rank="MPI_LOCALRANKID",
        local_world_size=("MPI_LOCALNRANKS",),
        required=("MPI_LOCALRANKID",),  # `srun --mpi=pmi2` also sets PMI_RANK, but no local rank
        is_mpi=True,
    ),
    Launcher(  # Slurm
        rank="SLURM_PROCID",
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank="SLURM_LOCALID",
        local_world_size=("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
        required=("SLURM_STEP_ID",),  # sbatch sets SLURM_PROCID too, but only srun makes a step
        job=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),  # a requeued job gets another port
        nodes=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        node_list=("SLURM_STEP_NODELIST", "SLURM_NODELIST"),
    ),
)


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """The five variables that `torch.distributed` reads, from the launcher's variables in `environ`.

    Without a launcher: a world of one rank. MASTER_ADDR and MASTER_PORT in the environment take precedence. Raises
    `ConfigError` when a job spans several nodes and the address of the first one is unknown.
    """
    launcher = _launcher(environ)
    if launcher is None:
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": "0"}
    job = ".".join(environ.get(name, "") for name in launcher.job)
    return {
        "RANK": environ[launcher.rank],
        "WORLD_SIZE": _first_set(launcher.world_size, environ, default="1"),
        "LOCAL_RANK": environ.get(launcher.local_rank, "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(launcher, environ),
        # A checksum of the job's identity: equal on all its ranks, rarely equal for two jobs of one host.
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS),
    }


def _launcher(environ: Mapping[str, str]) -> Launcher | None:
    return next((one for one in LAUNCHERS if all(name in environ for name in (one.rank, *one.required))), None)


def _first_host(launcher: Launcher, environ: Mapping[str, str]) -> str:
    if int(_first_set(launcher.nodes, environ, default="1")) > 1:
        return first_node(next((environ[name] for name in launcher.node_list if name in environ), ""))
    world_size = _first_set(launcher.world_size, environ, default="1")
    if launcher.is_mpi and _first_set(launcher.local_world_size, environ, default=world_size) != world_size:
        raise ConfigError(
            ["MASTER_ADDR is not set and this MPI job spans several nodes: pass rank 0's host, "
             "`mpirun -x MASTER_ADDR=HOST ...`"]
        )  # fmt: skip
    return _LOOPBACK


def first_node(nodelist: str) -> str:
    """First host of a Slurm node list. Raises `ConfigError` if the list has no host.

    >>> first_node("gpu[003-010,012],login1")
    'gpu003'
    """
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)  # to the first comma outside brackets
    if not match:
        raise ConfigError([f"the Slurm node list ({nodelist!r}) names no host: set MASTER_ADDR to rank 0's host"])
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def rank_in(environ: Mapping[str, str]) -> int:
    """Rank of this process according to its launcher, 0 without one."""
    return int(_first_set([launcher.rank for launcher in LAUNCHERS], environ, default="0"))


def launched_ranks(environ: Mapping[str, str]) -> int:
    """Return the number of ranks that a launcher has started with this one, 1 without a launcher.

    Of SLURM's variables only the step's counts: sbatch sets that of the job for one process.
    """
    launcher = _launcher(environ)
    return int(_first_set(launcher.world_size[:1], environ, default="1")) if launcher else 1


def is_rank_zero(environ: Mapping[str, str]) -> bool:
    """Return True on the rank that prints; usable before process groups exist."""
    return rank_in(environ) == 0


def threads_per_rank(environ: Mapping[str, str], *, cores: int) -> int:
    """Threads of one rank when the ranks of this host share `cores` equally; at least 1."""
    return max(1, cores // local_world_size(environ, default=1))


def local_world_size(environ: Mapping[str, str], *, default: int) -> int:
    """Number of ranks on this host according to the launcher; `default` if no launcher has set it."""
    names = [name for launcher in LAUNCHERS for name in launcher.local_world_size]
    ranks = re.match(r"\d+", _first_set(names, environ, default=""))  # Slurm writes "8(x4)" for 4 hosts
    return max(1, int(ranks[0])) if ranks else default


def _first_set(names: Sequence[str], environ: Mapping[str, str], *, default: str) -> str:
    return next((environ[name] for name in names if environ.get(name)), default)


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no accelerator where no GPU has a device file: it would search and warn."""
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_num_threads() -> None:
    """Set OMP_NUM_THREADS to this rank's share of the host's cores unless it is set; call before importing torch."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(os.environ, cores=len(os.sched_getaffinity(0)))))
