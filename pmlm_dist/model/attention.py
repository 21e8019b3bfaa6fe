"""Attention under the visibility rule: which queries meet which keys, and with what bias.

A *query group* is a range of queries, the range of keys it may see at all, and one additive bias that holds the
relative position bias and minus infinity where the rule forbids. A *plan* is the list of groups of a layer, made once
a step and shared by all layers. The readings of the rule differ only in how they cut the groups:

    dense   all T slots against all T slots: the specification
    split   context queries against the S context keys; appended queries against all T keys: nothing computed for
            pairs that no rule allows in bulk

The last layer reads only the predicted slots, AE slots first, then PAR slots.

Legend: B batch, H heads of this rank, Z = B * H, D head size, S context slots, M predictions, T = S + 2M slots,
R = 2M read slots, Q and K queries and keys of a group, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pmlm_dist.masking.visibility import visible
from pmlm_dist.model.fused_attention import GroupedAttention
from pmlm_dist.model.relative_position import RelativeBias


@dataclass(frozen=True)
class QueryGroup:
    """Queries `rows` of a layer's query tensor against the keys `keys`, under one additive bias."""

    rows: slice
    keys: slice
    bias_ZQK: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Groups of the inner layers (all slots ask) and of the last one (only the read slots ask)."""

    inner: tuple[QueryGroup, ...]
    last: tuple[QueryGroup, ...]


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
    num_heads: int
    predicted_BM: Tensor | None
    reads: tuple[str, ...] = ("ae", "par")

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

    def read_BR(self) -> Tensor | None:
        """Indices of the read slots: AE slots, then PAR slots; None when all are read."""
        if self.predicted_BM is None:
            return None
        pseudo = torch.arange(self.pseudo.start, self.pseudo.stop, device=self.predicted_BM.device)
        by_name = {"ae": self.predicted_BM, "par": pseudo.expand(len(self.predicted_BM), -1)}
        return torch.cat([by_name[name] for name in self.reads], dim=1)

    def bias(self, rows: slice, keys: slice, relative_bias: RelativeBias | None, dtype: torch.dtype) -> Tensor:
        """Additive bias [Z, Q, K] of the slots `rows` towards the slots `keys`."""
        seen_BQK = visible(self.order_BT[:, rows, None], self.order_BT[:, None, keys])
        seen_BQK = seen_BQK & self.valid_BT[:, None, keys]
        forbidden_BQK = torch.zeros(seen_BQK.shape, dtype=dtype, device=seen_BQK.device)
        forbidden_BQK.masked_fill_(~seen_BQK, float("-inf"))
        if relative_bias is None:
            return forbidden_BQK.repeat_interleave(self.num_heads, dim=0)
        bias_HBQK = relative_bias(self.positions_BT[:, rows], self.positions_BT[:, keys])
        return (bias_HBQK.to(dtype) + forbidden_BQK).transpose(0, 1).flatten(0, 1)


def plan_dense(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group: every slot against every slot."""
    everything = slots.everything
    bias_ZTT = slots.bias(everything, everything, relative_bias, dtype)
    inner = (QueryGroup(everything, everything, bias_ZTT),)
    read_BR = slots.read_BR()
    if read_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    read = QueryGroup(slice(0, read_BR.shape[1]), everything, _take_rows(bias_ZTT, read_BR))
    return AttentionPlan(inner=inner, last=(read,))


def plan_split(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """Two groups: the context among itself, the appended slots against everything."""
    context_ZSS = slots.bias(slots.context, slots.context, relative_bias, dtype)
    inner = [QueryGroup(slots.context, slots.context, context_ZSS)]
    if slots.has_appended:
        appended_ZAT = slots.bias(slots.appended, slots.everything, relative_bias, dtype)
        inner.append(QueryGroup(slots.appended, slots.everything, appended_ZAT))
    if slots.predicted_BM is None:
        return AttentionPlan(inner=tuple(inner), last=tuple(inner))
    num_predicted, last = slots.predicted_BM.shape[1], []
    for number, name in enumerate(slots.reads):
        rows = slice(number * num_predicted, (number + 1) * num_predicted)
        if name == "ae":
            last.append(QueryGroup(rows, slots.context, _take_rows(context_ZSS, slots.predicted_BM)))
        else:
            last.append(QueryGroup(rows, slots.everything, appended_ZAT[:, num_predicted:]))
    return AttentionPlan(inner=tuple(inner), last=tuple(last))


def attend_plainly(q_QZD: Tensor, kv_TZ2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v group by group: queries [Q, Z, D], keys and values [T, Z, 2, D] -> [Q, Z, D].

    Written for reading; autograd does the rest. Every query must see at least one key.
    """
    scale = q_QZD.shape[-1] ** -0.5
    parts = []
    for group in groups:
        q_ZQD = q_QZD[group.rows].transpose(0, 1)
        k_ZKD, v_ZKD = kv_TZ2D[group.keys].transpose(0, 1).unbind(dim=2)
        probabilities_ZQK = (scale * q_ZQD @ k_ZKD.transpose(1, 2) + group.bias_ZQK).softmax(dim=-1)
        parts.append((F.dropout(probabilities_ZQK, dropout) @ v_ZKD).transpose(0, 1))
    return torch.cat(parts)


def attend_at_once(q_QZD: Tensor, kv_TZ2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """The same as one operation with a backward pass of its own (`fused_attention.py`)."""
    rows = [(group.rows, group.keys) for group in groups]
    biases = [group.bias_ZQK for group in groups]
    return GroupedAttention.apply(q_QZD, kv_TZ2D, rows, dropout, *biases)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Attention:
    """A reading of the visibility rule: how queries are cut into groups, and what computes them."""

    plan: Callable[[Slots, RelativeBias | None, torch.dtype], AttentionPlan]
    attend: Callable[..., Tensor]


ATTENTION = {
    "dense": Attention(plan_dense, attend_plainly),
    "split": Attention(plan_split, attend_at_once),
}


def _take_rows(bias_ZQK: Tensor, rows_BR: Tensor) -> Tensor:
    index_ZR = rows_BR.repeat_interleave(len(bias_ZQK) // len(rows_BR), dim=0)
    return bias_ZQK.gather(1, index_ZR[:, :, None].expand(-1, -1, bias_ZQK.shape[2]))
