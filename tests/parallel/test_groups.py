"""Process groups: what they set for CUDA and DeepSpeed, and where objects are exchanged. No GPU is needed."""

import os
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
    init = dist.init_process_group
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(dist, "init_process_group", lambda backend, **settings: init("gloo", **settings))
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
