"""Process groups: ranks that share one copy of the model (tensor parallel, tp) and copies of it (data parallel, dp).

    world of 8 ranks, tp = 2:     dp 0: ranks 0 1 | dp 1: 2 3 | dp 2: 4 5 | dp 3: 6 7

megatron-core owns the groups, and `ModelParallelUnit` passes them to DeepSpeed. Code outside `parallel/` gets a
`Topology` instead of querying ranks.
"""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.launch_environment import rendezvous
from pmlm_dist.relations import divisors

T = TypeVar("T")


@dataclass(frozen=True)
class PendingMaxima:
    """Maxima over all ranks that are being computed."""

    maxima: torch.Tensor
    work: dist.Work | None
    """The collective operation; None in a world of one rank."""

    def wait(self) -> list[int]:
        """Return the maxima once every rank has contributed."""
        if self.work is not None:
            self.work.wait()
        return self.maxima.tolist()


@dataclass(frozen=True)
class Topology:
    """Ranks of this process, sizes of its groups, and its device."""

    rank: int
    world_size: int
    local_rank: int
    tp_rank: int
    tp: int
    dp_rank: int
    dp: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """True on the rank that prints and writes logs."""
        return self.rank == 0

    def all_reduce_dp(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the data-parallel group in place; tensor-parallel peers must pass equal values."""
        if self.dp > 1:
            dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values

    def all_reduce_tp(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the tensor-parallel group in place."""
        if self.tp > 1:
            dist.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """Elementwise maximum of `values` over all ranks."""
        return self.start_all_reduce_max(*values).wait()

    def start_all_reduce_max(self, *values: int) -> PendingMaxima:
        """Start the elementwise maximum of `values` over all ranks, without waiting for any of them."""
        maxima = torch.tensor(values)  # on the host: an accelerator would have to finish its queue first
        if self.world_size == 1:
            return PendingMaxima(maxima, None)
        return PendingMaxima(maxima, dist.all_reduce(maxima, op=dist.ReduceOp.MAX, async_op=True))

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` (picklable, small) of every rank, in order of rank, on every rank."""
        per_rank = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(per_rank, value)
        return per_rank

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (picklable, small) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))  # by gloo, as all other objects
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def raise_on_all_ranks(problems: list[str], topology: Topology) -> None:
    """Raise `ConfigError` with the problems of all ranks on every rank, if any rank has one. Every rank must call."""
    first_rank: dict[str, int] = {}
    for rank, of_rank in enumerate(topology.all_gather_object(problems)):
        for problem in of_rank:
            first_rank.setdefault(problem, rank)
    elsewhere = {problem: rank for problem, rank in first_rank.items() if problem not in problems}
    raise_if_any([*problems, *(f"on rank {rank}: {problem}" for problem, rank in elsewhere.items())])


def run_on_all_ranks(topology: Topology, prepare: Callable[[], T]) -> T:
    """Return `prepare()`. If it raises `ConfigError` on any rank, all ranks raise it with the problems of all."""
    # A rank that raised alone would leave the others waiting in their next collective operation.
    problems, result = [], None
    try:
        result = prepare()
    except ConfigError as error:
        problems = error.problems
    raise_on_all_ranks(problems, topology)
    return result  # pyright: ignore[reportReturnType]


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface, implemented with megatron-core's groups.

    megatron-core's own `parallel_state` lacks the `*_model_parallel_*` names. With `mpu=None` and tp > 1, DeepSpeed
    silently averages gradients over tensor-parallel peers too, which makes training wrong.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


def init_process_groups(*, tp: int = 1, timeout_s: int = 600) -> Topology:
    """Join the world described by the launcher's environment and build the groups of tensor-parallel size `tp`.

    A process without a launcher is a world of size 1. Collective operations raise after `timeout_s` seconds. Raises
    `ConfigError` if `tp` does not divide the world size, on every rank and before any communication.
    """
    variables = _launcher_variables()
    rank, world_size, local_rank = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size % tp:
        usable = divisors(world_size)
        raise ConfigError([f"parallel.tp ({tp}) must divide the number of ranks ({world_size}): use one of {usable}"])
    os.environ.update(variables)
    if tp > 1:
        # One hardware queue: megatron-core relies on it to start the all-reduce of a gradient before the next product.
        # Without tensor parallelism it would only delay copies and reductions that overlap with computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _device(local_rank)
    if not dist.is_initialized():
        _join_world(rank, world_size, device=device, timeout_s=timeout_s)
    if not parallel_state.model_parallel_is_initialized():
        with _one_group_for_equal_ranks(backend="nccl" if device.type == "cuda" else None):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=max(1, timeout_s // 60),
            )
        # Wait for all: another rank may still need the store, which ends with rank 0.
        dist.all_reduce(torch.zeros(()))
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


@cache
def _launcher_variables() -> dict[str, str]:
    """Return `rendezvous` of this process, from before `_device` changes LOCAL_RANK."""
    return rendezvous(os.environ)


@contextmanager
def _one_group_for_equal_ranks(*, backend: str | None) -> Iterator[None]:
    """Let megatron-core create one process group for equal lists of ranks, with `backend` (None: that of the world).

    megatron-core creates 17 kinds of groups, six of them over all data-parallel ranks or more. By default each would
    have the world's gloo as well, which connects every rank with every other: 5,600 sockets a rank at 1,024 ranks.
    """
    create, created = parallel_state.create_group, {}

    def create_once(ranks: Sequence[int], **options: Any) -> Any:
        if tuple(ranks) not in created:
            created[tuple(ranks)] = create(ranks, **{**options, "backend": backend})
        return created[tuple(ranks)]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


def _raise_limit_of_open_files() -> None:
    """Raise the soft limit of open files, often 1,024, to the hard one: gloo has a socket for every rank."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _device(local_rank: int) -> torch.device:
    """Select this rank's device. Where each rank sees its own GPU alone (`--gpus-per-task=1`), it is number 0."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # DeepSpeed takes LOCAL_RANK for the number of the device, and compares it with Open MPI's variable.
    names = {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
    os.environ.update(dict.fromkeys(names, str(device.index)))
    return device


def _join_world(rank: int, world_size: int, *, device: torch.device, timeout_s: int) -> None:
    _raise_limit_of_open_files()
    timeout = timedelta(seconds=timeout_s)
    # gloo beside NCCL: small values are exchanged on the host without synchronizing the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Port 0: no launcher. A store in memory needs no port, so runs on one machine cannot collide.
    if world_size == 1 and os.environ["MASTER_PORT"] == "0":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
