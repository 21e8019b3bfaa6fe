"""Attention by FlexAttention: visibility rule and bias as functions of a pair of slots, compiled into one kernel.

    order, valid --mask_mod--> block mask: which blocks of 128 x 128 pairs have some, all or no visible pairs
    positions   --score_mod--> bias of the distance of a pair, added to its score

No matrix over all pairs exists. Blocks without a visible pair are skipped, blocks with visible pairs only are computed
without evaluating the rule, and the bias is looked up inside the kernel. On a GPU the kernels are compiled at their
first use. On a CPU torch falls back to an uncompiled implementation without a backward pass.

Legend: B batch, H heads of this rank, D head size, Q queries, T slots (all of them keys), N distances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.visibility import visible


@dataclass(frozen=True)
class BlockGroup:
    """Queries against all slots: the blocks to compute, and the positions and bias of their pairs."""

    block_mask: BlockMask
    q_positions_BQ: Tensor
    k_positions_BT: Tensor
    bias: Tensor | None
    """By head and distance [H, N], from `RelativeBias.by_distance`; None without relative bias."""


def block_group(inputs: SlotInputs[Tensor], *, rows_BQ: Tensor | None, bias_HN: Tensor | None) -> BlockGroup:
    """Group of the slots `rows_BQ` (None: all) of a batch as queries against all T slots."""
    order_BT, positions_BT = inputs.order_BT, inputs.positions_BT.int()
    make_block_mask, _ = _operations(order_BT.device.type)
    # An order that no query attends to marks invalid keys: one load and one comparison per pair instead of two.
    k_order_BT = order_BT.masked_fill(~inputs.valid_BT, torch.iinfo(order_BT.dtype).min)
    q_order_BQ, q_positions_BQ = order_BT, positions_BT
    if rows_BQ is not None:
        q_order_BQ, q_positions_BQ = order_BT.gather(1, rows_BQ), positions_BT.gather(1, rows_BQ)
    (batch, queries), slots = q_order_BQ.shape, order_BT.shape[1]
    # Heads None: visibility does not depend on the head, so all of them share one mask.
    block_mask = make_block_mask(_mask_mod(q_order_BQ, k_order_BT), batch, None, queries, slots, device=order_BT.device)
    return BlockGroup(block_mask, q_positions_BQ, positions_BT, bias_HN)


def attention_flex(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[BlockGroup], *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the visible pairs: queries [Q, B, H, D], keys and values [T, B, H, 2, D].

    Return the mixed values [Q, B, H, D]. Differentiable on a GPU only. The kernel has no dropout; `config.py` rejects
    settings that need it.
    """
    assert not dropout, "FlexAttention has no dropout of attention probabilities"
    (group,) = groups
    _, attend = _operations(q_QBHD.device.type)
    q_BHQD = q_QBHD.permute(1, 2, 0, 3)
    k_BHTD, v_BHTD = kv_TBH2D.permute(3, 1, 2, 0, 4)
    # The kernel scales by 1 / sqrt(D) before `score_mod`, so the bias is added unscaled, as in the other backends.
    mixed_BHQD = attend(q_BHQD, k_BHTD, v_BHTD, score_mod=_score_mod(group), block_mask=group.block_mask)
    return mixed_BHQD.permute(2, 0, 1, 3)


def _mask_mod(q_order_BQ: Tensor, k_order_BT: Tensor) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(q_order_BQ[b, q], k_order_BT[b, k])

    return mask_mod


def _score_mod(group: BlockGroup) -> Callable[..., Tensor] | None:
    if group.bias is None:
        return None
    bias_HN, q_positions_BQ, k_positions_BT = group.bias, group.q_positions_BQ, group.k_positions_BT
    reach = bias_HN.shape[1] // 2  # the middle cell is distance 0

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k_positions_BT[b, k] - q_positions_BQ[b, q]
        # Clamped: positions may be farther apart than there are slots, and a kernel does not check bounds.
        return score + bias_HN[h, distance.clamp(-reach, reach) + reach]

    return score_mod


def _operations(device_type: str) -> tuple[Callable[..., BlockMask], Callable[..., Any]]:
    """`create_block_mask` and `flex_attention`, compiled on a GPU."""
    return _compiled() if device_type == "cuda" else (create_block_mask, flex_attention)


@cache
def _compiled() -> tuple[Callable[..., BlockMask], Callable[..., Any]]:
    """Both operations, compiled at the first call for each shape.

    `dynamic=False`: a run has few shapes, and kernels for fixed shapes are faster. `fullgraph`: a graph break raises an
    error instead of slowing down every step.
    """
    make_block_mask = torch.compile(create_block_mask, dynamic=False, fullgraph=True)
    return make_block_mask, torch.compile(flex_attention, dynamic=False, fullgraph=True)
