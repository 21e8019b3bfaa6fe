"""Process groups: those of megatron-core, but one for equal ranks; few sockets at a thousand ranks."""

import os
import resource
from typing import Any

import pytest
from support.worlds import run_world

pytestmark = pytest.mark.distributed


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


def test_limit_of_open_files_is_raised_to_the_hard_one():
    ((soft, hard),) = run_world(limit_of_open_files, 1)
    assert soft == hard > 512
