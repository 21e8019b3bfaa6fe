"""The planned number of parameters against the real model's, by tensor-parallel size."""

from dataclasses import replace

import pytest
from support.worlds import run_world

from pmlm_dist.config import ModelConfig
from pmlm_dist.planning.parameters import largest_tensor, persistent_numbers, rank_parameters, total_parameters
from pmlm_dist.planning.workload import Workload
from pmlm_dist.presets import PRESETS

SHAPES = {name: replace(preset().model, vocab_size=30_522) for name, preset in PRESETS.items()}
SHAPES |= {f"{name}, no relative positions": replace(shape, relative_bias=False) for name, shape in SHAPES.items()}
SHAPES["odd"] = ModelConfig(
    vocab_size=130, hidden_size=40, num_layers=1, num_heads=4, ffn_size=52, max_positions=24, segment_types=3
)
PERSISTENT = 100_000


def numbers_on_ranks(tp: int, shapes: dict[str, ModelConfig]) -> dict[str, list[int]]:
    """For each shape the elements of every parameter of this rank, from models on the meta device."""
    import torch

    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups

    groups.init_process_groups(tp=tp)
    with torch.device("meta"):
        return {
            name: [p.numel() for p in build_model(shape, padded_vocab_size=padded(shape)).parameters()]
            for name, shape in shapes.items()
        }


def padded(shape: ModelConfig) -> int:
    assert shape.vocab_size is not None
    return -(-shape.vocab_size // 128) * 128


@pytest.fixture(scope="module")
def real() -> dict[int, dict[str, list[int]]]:
    return {tp: run_world(numbers_on_ranks, tp, tp, SHAPES)[-1] for tp in (1, 2, 4)}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_a_rank_equal_the_model(real: dict[int, dict[str, list[int]]], name: str, tp: int):
    work = Workload(SHAPES[name], context=16, predictions=3, micro_batch=1, tp=tp)
    numbers = real[tp][name]
    assert rank_parameters(work) == sum(numbers)
    assert largest_tensor(work) == max(numbers)
    assert persistent_numbers(work, threshold=PERSISTENT) == sum(n for n in numbers if n <= PERSISTENT)


@pytest.mark.parametrize("name", SHAPES)
def test_total_counts_replicated_parameters_once(real: dict[int, dict[str, list[int]]], name: str):
    work = Workload(SHAPES[name], context=16, predictions=3, micro_batch=1, tp=4)
    assert total_parameters(work) == sum(real[1][name])


def test_presets_have_the_sizes_of_the_paper():
    sizes = {name: total_parameters(Workload(SHAPES[name], 512, 77, 1)) / 1e6 for name in ("base", "large")}
    assert sizes == pytest.approx({"base": 109.5, "large": 335.0}, rel=0.01)
