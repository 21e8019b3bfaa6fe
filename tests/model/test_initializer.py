"""Initial weights: deviations of the matrices, on any tensor-parallel size."""

from dataclasses import replace

import pytest
from support.batches import PADDED
from support.worlds import run_world

from pmlm_dist.config import ModelConfig


def deviations(initializer: str, tp: int) -> dict[str, float]:
    """Return the deviation of every matrix of this rank, in multiples of `initializer_range`."""
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups, seeding

    groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
    shape = ModelConfig(vocab_size=PADDED - 3, hidden_size=128, num_layers=8, num_heads=4, ffn_size=512)
    model = build_model(replace(shape, initializer=initializer), padded_vocab_size=PADDED)
    return {name: float(p.std()) / 0.02 for name, p in model.named_parameters() if "layers" in name and p.ndim == 2}


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_scaled_initializer_divides_the_output_projections_alone(tp: int):
    for initializer, expected in (("normal", 1.0), ("scaled", 0.25)):  # 1 / sqrt(2 * 8)
        for found in run_world(deviations, tp, initializer, tp):
            assert len(found) == 8 * 5
            for name, deviation in found.items():
                is_output = name.endswith(("attention.output.weight", "ffn_out.weight"))
                assert deviation == pytest.approx(expected if is_output else 1.0, rel=0.05), name
