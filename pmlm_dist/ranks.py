"""What a process knows of its world before it joins it: whether it speaks for all and is heard, its share of threads.

Standard library only: torch reads the number of threads when it is imported.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Mapping

# Of torchrun and deepspeed, Open MPI, MPICH, srun: the first that is set counts (see launch_environment.py).
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_RANKS_OF_THIS_HOST = (
    *("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
)


def rank_in(environ: Mapping[str, str]) -> int:
    """This process' rank as its launcher calls it, 0 without one."""
    return int(_first_set(_RANK, environ, default="0"))


def speaks(environ: Mapping[str, str]) -> bool:
    """Whether this process, before it has joined its world, is the one that prints."""
    return rank_in(environ) == 0


def threads(environ: Mapping[str, str], *, cores: int) -> int:
    """Threads of one rank when `cores` are divided among the ranks of this host."""
    ranks = re.match(r"\d+", _first_set(_RANKS_OF_THIS_HOST, environ, default="1"))  # Slurm writes "8(x4)" for 4 hosts
    return max(1, cores // max(1, int(ranks[0]) if ranks else 1))


def _first_set(names: tuple[str, ...], environ: Mapping[str, str], *, default: str) -> str:
    return next((environ[name] for name in names if environ.get(name)), default)


def forget_broken_output() -> bool:
    """Whether nobody reads standard output any more (`--help | head`); what is left of it then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout, 0)
    is_broken = any(event & select.POLLERR for _, event in output.poll(0))
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_broken


def share_cores() -> None:
    """Give this process its part of the host's cores, unless OMP_NUM_THREADS says otherwise; before torch's import."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(os.environ, cores=len(os.sched_getaffinity(0)))))
