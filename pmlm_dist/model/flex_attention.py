"""Attention by FlexAttention: the visibility rule and the bias as functions of a pair of slots, compiled into a kernel.

    order, valid --mask_mod--> block mask: which blocks of 128 x 128 pairs hold a visible one, and which all of them
    positions   --score_mod--> the bias of a pair's distance, added to its score

Neither is ever a matrix over all pairs: blocks without a visible pair are skipped, those that are visible throughout
are not asked, and the bias of a pair is looked up where its score is. On a GPU the kernels are compiled when they are
first used; on a CPU torch computes the same longhand, and has no backward pass.

Legend: B batch, H heads of this rank, D head size, Q queries, T slots (all of them keys), N distances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pmlm_dist.masking.visibility import visible


@dataclass(frozen=True)
class BlockGroup:
    """Queries against all slots: the blocks that are computed, and what their pairs' scores get."""

    block_mask: BlockMask
    q_positions_BQ: Tensor
    k_positions_BT: Tensor
    bias: Tensor | None
    """By head and distance [H, N], as `RelativeBias.by_distance` gives it; None without relative bias."""


def block_group(
    order_BT: Tensor, valid_BT: Tensor, positions_BT: Tensor, *, rows_BQ: Tensor | None, bias_HN: Tensor | None
) -> BlockGroup:
    """The slots `rows_BQ` (None: all) of a batch as queries against all T slots."""
    make_block_mask, _ = _operations(order_BT.device.type)
    # One load and one comparison a pair instead of two: a key that is not valid has an order that no query sees.
    k_order_BT = order_BT.masked_fill(~valid_BT, torch.iinfo(order_BT.dtype).min)
    positions_BT = positions_BT.int()
    q_order_BQ, q_positions_BQ = order_BT, positions_BT
    if rows_BQ is not None:
        q_order_BQ, q_positions_BQ = order_BT.gather(1, rows_BQ), positions_BT.gather(1, rows_BQ)
    (batch, queries), slots = q_order_BQ.shape, order_BT.shape[1]
    block_mask = make_block_mask(
        _mask_mod(q_order_BQ, k_order_BT), batch, None, queries, slots, device=order_BT.device
    )  # None: the same for all heads
    return BlockGroup(block_mask, q_positions_BQ, positions_BT, bias_HN)


def attention_flex(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[BlockGroup], *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the visible pairs: queries [Q, B, H, D], keys and values [T, B, H, 2, D].

    Returns the mixed values [Q, B, H, D]. Differentiable on a GPU only. The kernel has no dropout; `config.py` refuses
    it.
    """
    assert not dropout, "FlexAttention has no dropout of attention probabilities"
    (group,) = groups
    _, attend = _operations(q_QBHD.device.type)
    q_BHQD = q_QBHD.permute(1, 2, 0, 3)
    k_BHTD, v_BHTD = kv_TBH2D.permute(3, 1, 2, 0, 4)
    mixed_BHQD = attend(q_BHQD, k_BHTD, v_BHTD, score_mod=_score_mod(group), block_mask=group.block_mask)
    return mixed_BHQD.permute(2, 0, 1, 3)


def _mask_mod(q_order_BQ: Tensor, k_order_BT: Tensor) -> Callable[..., Tensor]:
    def sees(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(q_order_BQ[b, q], k_order_BT[b, k])

    return sees


def _score_mod(group: BlockGroup) -> Callable[..., Tensor] | None:
    if group.bias is None:
        return None
    bias_HN, q_positions_BQ, k_positions_BT = group.bias, group.q_positions_BQ, group.k_positions_BT
    reach = bias_HN.shape[1] // 2

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k_positions_BT[b, k] - q_positions_BQ[b, q]
        return score + bias_HN[h, distance.clamp(-reach, reach) + reach]

    return add_bias


def _operations(device_type: str) -> tuple[Callable[..., BlockMask], Callable[..., Any]]:
    """What makes a block mask and what attends: compiled on a GPU, else as torch has them."""
    return _compiled() if device_type == "cuda" else (create_block_mask, flex_attention)


@cache
def _compiled() -> tuple[Callable[..., BlockMask], Callable[..., Any]]:
    """Compiled at the first call for each shape; a run has few, and fixed shapes make the faster kernels.

    Compiled whole (`fullgraph`): a part that cannot be compiled is an error instead of a slow step.
    """
    make_block_mask = torch.compile(create_block_mask, dynamic=False, fullgraph=True)
    return make_block_mask, torch.compile(flex_attention, dynamic=False, fullgraph=True)
