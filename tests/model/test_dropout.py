"""Dropout under tensor parallelism: peers drop the same hidden units (copies) and different attention probabilities."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import MODEL, PADDED, logits_of, random_batch
from support.worlds import run_world
from torch import Tensor

pytestmark = pytest.mark.distributed


def dropped(tp: int) -> tuple[list[Tensor], list[Tensor]]:
    """Masks of the kept hidden units and attention probabilities of a rank, in order of computation."""
    from dataclasses import replace

    from pmlm_dist.model import fused_attention
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups, seeding

    topology = groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
    model = build_model(replace(MODEL, hidden_dropout=0.3, attention_dropout=0.3), padded_vocab_size=PADDED).train()
    units: list[Tensor] = []
    heads: list[Tensor] = []

    drop = F.dropout

    def record_units(states: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        output = drop(states, *arguments, **settings)
        units.append((output != 0) | (states == 0))
        return output

    F.dropout = record_units
    attend = fused_attention._attend

    def record_heads(*operands: Any, **settings: Any) -> list[Tensor]:
        saved = attend(*operands, **settings)
        heads.append(saved[1])
        return saved

    fused_attention._attend = record_heads
    try:
        seeding.seed_dropout(3, micro_step=0, dp_rank=topology.dp_rank)
        logits_of(model, random_batch())
    finally:
        fused_attention._attend, F.dropout = attend, drop
    return units, heads


def shares(masks: list[Tensor]) -> list[float]:
    return [float(mask.float().mean()) for mask in masks]


def test_tp_peers_drop_same_hidden_units_and_different_probabilities():
    (units_0, heads_0), (units_1, heads_1) = run_world(dropped, 2, 2)
    assert len(units_0) == 1 + 2 * MODEL.num_layers  # embeddings; attention and feed-forward network of every layer
    assert len(heads_0) == 2 * MODEL.num_layers  # two query groups a layer
    for own, peer in zip(units_0, units_1, strict=True):
        assert torch.equal(own, peer)
    for own, peer in zip(heads_0, heads_1, strict=True):
        assert own.shape == peer.shape == (MODEL.num_heads // 2, *own.shape[1:])
        assert 0.3 < float((own == peer).float().mean()) < 0.7  # 0.58 for independent draws
    assert all(0.6 < share < 0.8 for share in shares([*units_0, *heads_0]))
    assert not torch.equal(units_0[1], units_0[3])


def test_dp_ranks_draw_different_dropout():
    (units_0, heads_0), (units_1, heads_1) = run_world(dropped, 2, 1)
    for own, other in zip([*units_0, *heads_0], [*units_1, *heads_1], strict=True):
        assert not torch.equal(own, other)
