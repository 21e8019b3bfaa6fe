"""Attention under the visibility rule: which queries meet which keys, and with what bias.

A *query group* is a range of queries, the range of keys it may see at all, and what is added to their scores: the
relative position bias, with minus infinity where the rule forbids. A *plan* is the list of groups of a layer, made once
a step and shared by all layers. The readings of the rule differ only in how they cut the groups:

    dense   all T slots against all T slots: the specification
    split   context queries against the S context keys; appended queries against all T keys: nothing computed for
            pairs that no rule allows in bulk
    flex    all against all in blocks, those without a visible pair skipped (`flex_attention.py`)

The last layer reads only the predicted slots, AE slots first, then PAR slots.

Legend: B batch, H heads of this rank, D head size, S context slots, M predictions, A = 2M appended slots, T = S + A
slots, R read slots, Q and K queries and keys of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pmlm_dist.masking.visibility import visible
from pmlm_dist.model.flex_attention import BlockGroup, attention_flex, block_group
from pmlm_dist.model.fused_attention import GroupedAttention, Pairs
from pmlm_dist.model.relative_position import RelativeBias


@dataclass(frozen=True)
class QueryGroup:
    """Queries `rows` of a layer's query tensor against the keys `keys`."""

    rows: slice
    keys: slice
    bias: Tensor | None
    """Added to the scores: [H, B, Q, K], with size 1 where heads or samples share it."""
    padding_BK: Tensor | None = None
    """Added to the scores of every query: minus infinity for keys that are padding, else zero."""


Groups = tuple[QueryGroup, ...] | tuple[BlockGroup]
"""What a layer is told beside queries, keys and values. The one differentiable tensor of a group is its `bias`."""


@dataclass(frozen=True)
class AttentionPlan:
    """Groups of the inner layers (all slots ask) and of the last one (only the read slots ask)."""

    inner: Groups
    last: Groups


@dataclass(frozen=True)
class Slots:
    """The slots of a batch as attention sees them, and which of them are read.

    `predicted_BM` holds the context index of each predicted position, `reads` tells where it is read: at its base slot
    ("ae"), at its pseudo mask ("par", after them), or both. None: every slot is read.
    """

    order_BT: Tensor
    valid_BT: Tensor
    positions_BT: Tensor
    num_context: int
    predicted_BM: Tensor | None
    objectives: tuple[str, ...] = ("ae", "par")

    @property
    def context(self) -> slice:
        """The context slots."""
        return slice(0, self.num_context)

    @property
    def everything(self) -> slice:
        """All slots."""
        return slice(0, self.order_BT.shape[1])

    @property
    def appended(self) -> slice:
        """Originals and pseudo masks."""
        return slice(self.num_context, self.order_BT.shape[1])

    @property
    def pseudo(self) -> slice:
        """The pseudo masks."""
        return slice((self.num_context + self.order_BT.shape[1]) // 2, self.order_BT.shape[1])

    @property
    def has_appended(self) -> bool:
        """Whether there is more than the context."""
        return self.order_BT.shape[1] > self.num_context

    def predicted_slots_BR(self) -> Tensor | None:
        """Indices of the read slots: AE slots, then PAR slots; None when all are read."""
        if self.predicted_BM is None:
            return None
        pseudo = torch.arange(self.pseudo.start, self.pseudo.stop, device=self.predicted_BM.device)
        by_name = {"ae": self.predicted_BM, "par": pseudo.expand(len(self.predicted_BM), -1)}
        return torch.cat([by_name[name] for name in self.objectives], dim=1)

    def forbidden(self, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
        """Minus infinity where slots `rows` do not see slots `keys`, else zero: [1, B, Q, K]."""
        seen_BQK = visible(self.order_BT[:, rows, None], self.order_BT[:, None, keys])
        return _minus_infinity(~(seen_BQK & self.valid_BT[:, None, keys]), dtype)[None]

    def padding_BS(self, dtype: torch.dtype) -> Tensor | None:
        """Minus infinity for padding among the context, else zero; None where there is none."""
        valid_BS = self.valid_BT[:, self.context]
        if valid_BS.device.type == "cpu" and bool(valid_BS.all()):  # asking an accelerator would mean waiting for it
            return None
        return _minus_infinity(~valid_BS, dtype)


def plan_reference(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group: every slot against every slot."""
    everything = slots.everything
    bias = slots.forbidden(everything, everything, dtype)
    if relative_bias is not None:
        bias = relative_bias(slots.positions_BT, slots.positions_BT).to(dtype) + bias
    inner = (QueryGroup(everything, everything, bias),)
    read_BR = slots.predicted_slots_BR()
    if read_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    read = QueryGroup(slice(0, read_BR.shape[1]), everything, bias.take_along_dim(read_BR[None, :, :, None], dim=2))
    return AttentionPlan(inner=inner, last=(read,))


def plan_fused(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """Two groups: the context among itself, the appended slots against everything.

    Requires what the layout gives: context slots at positions 0, 1, 2, ... in every sample, all visible to each other;
    originals and pseudo masks of the same prediction at the same position.
    """
    context, everything, padding_BS = slots.context, slots.everything, slots.padding_BS(dtype)
    context_HSS = None if relative_bias is None else relative_bias.for_contiguous(slots.num_context).to(dtype)
    shared = None if context_HSS is None else context_HSS[:, None]
    inner = [QueryGroup(context, context, shared, padding_BS)]
    appended = None
    if slots.has_appended:
        appended = _appended_bias(slots, relative_bias, dtype)
        inner.append(QueryGroup(slots.appended, everything, appended))
    if slots.predicted_BM is None:
        return AttentionPlan(inner=tuple(inner), last=tuple(inner))
    num_predicted, last = slots.predicted_BM.shape[1], []
    for number, name in enumerate(slots.objectives):
        rows = slice(number * num_predicted, (number + 1) * num_predicted)
        if name == "ae":
            ae = None if context_HSS is None else _take_rows(context_HSS, slots.predicted_BM)
            last.append(QueryGroup(rows, context, ae, padding_BS))
        else:
            assert appended is not None
            last.append(QueryGroup(rows, everything, appended[:, :, num_predicted:]))
    return AttentionPlan(inner=tuple(inner), last=tuple(last))


def _appended_bias(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> Tensor:
    """Bias [H | 1, B, A, T] of the appended slots towards all: looked up once for an original and its pseudo mask."""
    forbidden_1BAT = slots.forbidden(slots.appended, slots.everything, dtype)
    if relative_bias is None:
        return forbidden_1BAT
    positions_BM = slots.positions_BT[:, slots.pseudo]
    keys_BK = slots.positions_BT[:, : slots.pseudo.start]  # context and originals
    bias_HBMK = relative_bias(positions_BM, keys_BK).to(dtype)
    bias_HBMT = torch.cat([bias_HBMK, bias_HBMK[..., slots.num_context :]], dim=-1)
    return (bias_HBMT[:, :, None] + forbidden_1BAT.unflatten(2, (2, -1))).flatten(2, 3)


def plan_flex(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group of blocks: every slot against every slot. The bias keeps fp32 whatever the activations' `dtype`.

    It has a cell a distance rather than a bucket: in the backward pass every pair adds to its cell, and there are few
    buckets to wait for.
    """
    bias_HN = None
    if relative_bias is not None:
        bias_HN = relative_bias.by_distance(max(slots.order_BT.shape[1], relative_bias.max_distance))
    batch = (slots.order_BT, slots.valid_BT, slots.positions_BT)
    inner = (block_group(*batch, rows_BQ=None, bias_HN=bias_HN),)
    read_BR = slots.predicted_slots_BR()
    if read_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    return AttentionPlan(inner=inner, last=(block_group(*batch, rows_BQ=read_BR, bias_HN=bias_HN),))


def attention_reference(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v by groups: queries [Q, B, H, D], keys and values [T, B, H, 2, D].

    Returns the mixed values [Q, B, H, D]. Written for reading; autograd does the rest. Every query must see at least
    one key.
    """
    scale = q_QBHD.shape[-1] ** -0.5
    parts = []
    for group in groups:
        q_HBQD = q_QBHD[group.rows].permute(2, 1, 0, 3)
        k_HBKD, v_HBKD = kv_TBH2D[group.keys].permute(3, 2, 1, 0, 4)
        scores_HBQK = scale * q_HBQD @ k_HBKD.transpose(2, 3)
        if group.bias is not None:
            scores_HBQK = scores_HBQK + group.bias
        if group.padding_BK is not None:
            scores_HBQK = scores_HBQK + group.padding_BK[:, None]
        mixed_HBQD = F.dropout(scores_HBQK.softmax(dim=-1), dropout) @ v_HBKD
        parts.append(mixed_HBQD.permute(2, 1, 0, 3))
    return torch.cat(parts)


def attention_fused(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """The same as one operation with a backward pass of its own (`fused_attention.py`)."""
    pairs = [Pairs(group.rows, group.keys, group.padding_BK) for group in groups]
    biases = [group.bias for group in groups]
    return GroupedAttention.apply(q_QBHD, kv_TBH2D, pairs, dropout, *biases)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class AttentionBackend:
    """A reading of the visibility rule: how queries are cut into groups, and what computes them."""

    plan: Callable[[Slots, RelativeBias | None, torch.dtype], AttentionPlan]
    attend: Callable[..., Tensor]


ATTENTION_BACKENDS = {
    "reference": AttentionBackend(plan_reference, attention_reference),
    "fused": AttentionBackend(plan_fused, attention_fused),
    "flex": AttentionBackend(plan_flex, attention_flex),
}


def _take_rows(bias_HSS: Tensor, rows_BM: Tensor) -> Tensor:
    """Rows [H, B, M, S] of a bias that all samples share."""
    return bias_HSS.index_select(1, rows_BM.flatten()).unflatten(1, rows_BM.shape)


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, float("-inf"))
