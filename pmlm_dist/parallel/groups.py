"""Process groups: who shares one copy of the model (tensor parallel, tp), who holds the others (data parallel, dp).

    world of 8 ranks, tp = 2:     dp 0: ranks 0 1 | dp 1: 2 3 | dp 2: 4 5 | dp 3: 6 7

megatron-core owns the groups; DeepSpeed learns of them through `ModelParallelUnit`. Nothing outside `parallel/` asks
for a rank: the rest of the code gets a `Topology`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore

from pmlm_dist.config import ConfigError, divisors, raise_if_any
from pmlm_dist.launch_environment import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """Place of this process in the world."""

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
        """Whether this process speaks for the run: prints, writes logs."""
        return self.rank == 0

    def all_reduce_dp(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the data-parallel group, in place; tensor-parallel peers hold equal values."""
        if self.dp > 1:
            dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values

    def all_reduce_tp(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the tensor-parallel group, in place."""
        if self.tp > 1:
            dist.all_reduce(values, group=parallel_state.get_tensor_model_parallel_group())
        return values

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of all ranks' values, one by one. On the host: no accelerator is waited for."""
        found = torch.tensor(values)
        if self.world_size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable, small), in order of rank, on every rank."""
        box = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(box, value)
        return box

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (picklable, small) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


def raise_on_all_ranks(found: list[str], topology: Topology) -> None:
    """Raise `ConfigError` on every rank when any rank has found problems, with those of all; every rank must call."""
    elsewhere: dict[str, int] = {}
    for rank, of_rank in enumerate(topology.all_gather_object(found)):
        for problem in of_rank:
            elsewhere.setdefault(problem, rank)
    raise_if_any(
        [*found, *(f"on rank {rank}: {problem}" for problem, rank in elsewhere.items() if problem not in found)]
    )


def run_on_all_ranks(topology: Topology, prepare: Callable[[], T]) -> T:
    """What `prepare` gives, unless it raises `ConfigError` on any rank: then all raise it, with every problem."""
    found, made = [], None
    try:
        made = prepare()
    except ConfigError as error:
        found = error.problems
    raise_on_all_ranks(found, topology)
    return made  # pyright: ignore[reportReturnType]


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`, answered from megatron-core's groups.

    megatron-core's own `parallel_state` lacks the `*_model_parallel_*` names. With `mpu=None` and tp > 1 DeepSpeed
    averages gradients over tensor-parallel peers too and trains wrongly without a word.
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
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)


def init_process_groups(*, tp: int = 1, timeout_s: int = 600) -> Topology:
    """Join the world that the launcher described and build the groups of tensor-parallel size `tp`.

    A process that no launcher started is a world of its own. Collectives end with an error after `timeout_s` seconds.
    Raises `ConfigError` when `tp` does not divide the world, on every rank alike and before any waits for another.
    """
    variables = rendezvous(os.environ)
    rank, world_size, local_rank = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    raise_if_any(_world_problems(world_size, tp=tp))
    os.environ.update(variables)
    os.environ.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    )  # megatron-core orders its all-reduce before a product by it
    device = _device(local_rank)
    if not dist.is_initialized():
        _join_world(rank, world_size, device=device, timeout_s=timeout_s)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, timeout_s // 60),
        )
    return topology(device, local_rank=local_rank)


def topology(device: torch.device, *, local_rank: int = 0) -> Topology:
    """The `Topology` of groups that stand already."""
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


def _world_problems(world_size: int, *, tp: int) -> list[str]:
    if world_size % tp == 0:
        return []
    return [f"parallel.tp ({tp}) must divide the number of ranks ({world_size}): use one of {divisors(world_size)}"]


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _join_world(rank: int, world_size: int, *, device: torch.device, timeout_s: int) -> None:
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world_size == 1 and os.environ["MASTER_PORT"] == "0":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
