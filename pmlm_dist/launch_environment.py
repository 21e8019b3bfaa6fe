"""The launcher's environment: which rank a process is, before it joins its world. Standard library only.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT themselves. `srun` and `mpirun`
set names of their own, which are translated here; a plain `python train.py` is a world of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from pmlm_dist.config import ConfigError

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _PORTS = 20_000, 12_000  # below the ports that kernels hand out by themselves


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """The five variables that `torch.distributed` reads, from whatever launcher set `environ`.

    Looked for in this order: the variables themselves, Open MPI, MPICH, Slurm's step (`srun`), nothing (one process).
    MPI comes before Slurm: `mpirun` typed into the shell of an `srun --pty bash` sees that step's variables as well.
    MASTER_ADDR and MASTER_PORT in the environment always win. Raises `ConfigError` when a job spans several nodes and
    the first one's address cannot be told.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        found = {name: environ[name] for name in RENDEZVOUS if name in environ}
        return {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port("")), **found}
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _mpi(environ, prefix="OMPI_COMM_WORLD_", job=environ.get("PMIX_NAMESPACE", ""))
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:  # srun can set PMI_RANK too, without a local rank
        names = {
            "RANK": "PMI_RANK",
            "SIZE": "PMI_SIZE",
            "LOCAL_RANK": "MPI_LOCALRANKID",
            "LOCAL_SIZE": "MPI_LOCALNRANKS",
        }
        renamed = {new: environ[old] for new, old in names.items() if old in environ}
        return _mpi({**environ, **renamed}, prefix="", job="")
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        return _slurm(environ)
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    several_nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))) > 1
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", ""))
    address = environ.get("MASTER_ADDR") or (first_node(nodes) if several_nodes else "127.0.0.1")
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}"
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": environ.get("MASTER_PORT", str(_port(job))),
    }


def _mpi(environ: Mapping[str, str], *, prefix: str, job: str) -> dict[str, str]:
    size = environ.get(f"{prefix}SIZE", "1")
    several_nodes = environ.get(f"{prefix}LOCAL_SIZE", size) != size
    if several_nodes and "MASTER_ADDR" not in environ:
        raise ConfigError(
            ["MASTER_ADDR is not set and this MPI job spans several nodes: pass rank 0's host, "
             "`mpirun -x MASTER_ADDR=HOST ...`"]
        )  # fmt: skip
    return {
        "RANK": environ[f"{prefix}RANK"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get(f"{prefix}LOCAL_RANK", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": environ.get("MASTER_PORT", str(_port(job))),
    }


def first_node(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,012],login1` gives `gpu003`.

    >>> first_node("gpu[003-010,012],login1")
    'gpu003'
    """
    match = re.match(r"[^,\[](?:[^,\[]|\[[^\]]*\])*", nodelist)  # to the first comma outside brackets
    if not match:
        raise ConfigError([f"the Slurm node list ({nodelist!r}) names no host: set MASTER_ADDR to rank 0's host"])
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _port(job: str) -> int:
    """A port that all ranks of one job derive alike and two jobs of one host rarely share."""
    digest = 0
    for character in job:
        digest = (digest * 131 + ord(character)) % _PORTS
    return _FIRST_PORT + digest


# Of torchrun and deepspeed, Open MPI, MPICH, srun: the first that is set counts (see launch_environment.py).
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_RANKS_OF_THIS_HOST = (
    *("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
)


def rank_in(environ: Mapping[str, str]) -> int:
    """This process' rank as its launcher calls it, 0 without one."""
    return int(_first_set(_RANK, environ, default="0"))


def is_rank_zero(environ: Mapping[str, str]) -> bool:
    """Whether this process, before it has joined its world, is the one that prints."""
    return rank_in(environ) == 0


def threads_per_rank(environ: Mapping[str, str], *, cores: int) -> int:
    """Threads of one rank when `cores` are divided among the ranks of this host."""
    ranks = re.match(r"\d+", _first_set(_RANKS_OF_THIS_HOST, environ, default="1"))  # Slurm writes "8(x4)" for 4 hosts
    return max(1, cores // max(1, int(ranks[0]) if ranks else 1))


def _first_set(names: tuple[str, ...], environ: Mapping[str, str], *, default: str) -> str:
    return next((environ[name] for name in names if environ.get(name)), default)


def set_num_threads() -> None:
    """Give this process its part of the host's cores, unless OMP_NUM_THREADS says otherwise; before torch's import."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(os.environ, cores=len(os.sched_getaffinity(0)))))
