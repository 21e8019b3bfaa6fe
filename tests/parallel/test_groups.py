"""Process groups: their ranks and sockets, what they set for CUDA and DeepSpeed, objects. No GPU is needed."""

import os
import resource
from typing import Any

import pytest
import torch
from support.worlds import run_world

from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology


def cuda_connections(tp: int) -> str | None:
    groups.init_process_groups(tp=tp)
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "expected"), [(1, None), (2, "1")])
def test_one_hardware_queue_only_with_tensor_parallelism(monkeypatch, tp: int, expected: str | None):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert run_world(cuda_connections, 2, tp) == [expected, expected]


def join_with_one_visible_device(launcher: dict[str, str]) -> list[tuple[int, int | None, str, str | None]]:
    """Local rank, device and DeepSpeed's variables after each of two calls, with one (pretended) GPU visible."""
    import torch.distributed as dist

    os.environ.update(launcher, DS_ACCELERATOR="cuda")
    init, new_group = dist.init_process_group, dist.new_group
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(dist, "init_process_group", lambda backend, **settings: init("gloo", **settings))
        patch.setattr(dist, "new_group", lambda ranks, **settings: new_group(ranks, **{**settings, "backend": "gloo"}))
        for _ in range(2):
            topology = groups.init_process_groups()
            variables = os.environ["LOCAL_RANK"], os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
            results.append((topology.local_rank, topology.device.index, *variables))
    return results


@pytest.mark.distributed
def test_rank_with_one_visible_gpu_has_device_0_and_keeps_its_local_rank():
    """`srun --gpus-per-task=1`: DeepSpeed selects the device of number LOCAL_RANK."""
    assert run_world(join_with_one_visible_device, 2, {}) == [2 * [(rank, 0, "0", None)] for rank in range(2)]
    # DeepSpeed asserts that both variables are equal.
    ((first, _), _) = run_world(join_with_one_visible_device, 2, {"OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert first[2:] == ("0", "0")


def test_objects_are_broadcast_on_the_host(monkeypatch):
    """On the device they would wait for its queue, and create NCCL's connections at the start."""
    used: list[Any] = []
    monkeypatch.setattr(groups.dist, "broadcast_object_list", lambda box, *, src, device: used.append(device))
    topology = Topology(
        rank=0, world_size=2, local_rank=0, tp_rank=0, tp=1, dp_rank=0, dp=2, device=torch.device("cuda", 0)
    )
    assert topology.broadcast_object("value") == "value"
    assert used == [torch.device("cpu")]


def ranks_by_group(tp: int, plain: bool) -> dict[str, list[int]]:
    """Ranks of every group of megatron-core; `plain`: as it creates them itself."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from pmlm_dist.parallel import groups

    if plain:
        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    else:
        groups.init_process_groups(tp=tp)
    return {
        name: dist.get_process_group_ranks(group)
        for name, group in vars(parallel_state).items()
        if isinstance(group, dist.ProcessGroup)
    }


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 2)])
def test_groups_hold_the_ranks_of_those_that_megatron_creates_itself(ranks: int, tp: int):
    groups = run_world(ranks_by_group, ranks, tp, False)
    assert groups == run_world(ranks_by_group, ranks, tp, True)
    assert len(groups[0]) > 10


def groups_of_large_world(ranks: int, tp: int) -> list[tuple[tuple[int, ...], Any]]:
    """Join a simulated world; return ranks and backend of every group that is created."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pmlm_dist.parallel import groups

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    os.environ.update(WORLD_SIZE=str(ranks))
    new_group, created = dist.new_group, []

    def recorded(ranks: Any, **options: Any) -> Any:
        created.append((tuple(ranks), options["backend"]))
        return new_group(ranks, **{**options, "backend": None})

    dist.new_group = recorded
    groups.init_process_groups(tp=tp)
    return created


@pytest.mark.distributed
def test_large_world_has_one_group_for_equal_ranks():
    (created,) = run_world(groups_of_large_world, 1, 1024, 2)
    assert len({ranks for ranks, _ in created}) == len(created)
    assert sum(len(ranks) - 1 for ranks, _ in created if 0 in ranks) == 1 + 511 + 1023


def limit_of_open_files() -> tuple[int, int]:
    from pmlm_dist.parallel import groups

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    groups.init_process_groups()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.mark.distributed
def test_limit_of_open_files_is_raised_to_the_hard_one():
    ((soft, hard),) = run_world(limit_of_open_files, 1)
    assert soft == hard > 512
