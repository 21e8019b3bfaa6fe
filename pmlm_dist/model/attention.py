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
from pmlm_dist.model.relative_position import RelativeBias
from pmlm_dist.parallel.seeding import different_on_tp_peers


@dataclass(frozen=True)
class QueryGroup:
    """Queries `rows` of a layer's query tensor against the keys `keys`, under one additive bias."""

    rows: slice
    keys: slice
    bias_BHQK: Tensor


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
        """Additive bias [B, H, Q, K] of the slots `rows` towards the slots `keys` (H = 1 without relative bias)."""
        seen_BQK = visible(self.order_BT[:, rows, None], self.order_BT[:, None, keys])
        seen_BQK = seen_BQK & self.valid_BT[:, None, keys]
        forbidden_BQK = torch.zeros(seen_BQK.shape, dtype=dtype, device=seen_BQK.device)
        forbidden_BQK.masked_fill_(~seen_BQK, float("-inf"))
        if relative_bias is None:
            return forbidden_BQK[:, None]
        bias_HBQK = relative_bias(self.positions_BT[:, rows], self.positions_BT[:, keys])
        return (bias_HBQK.to(dtype) + forbidden_BQK).transpose(0, 1).contiguous()


def plan_dense(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group: every slot against every slot."""
    everything = slots.everything
    bias_BHTT = slots.bias(everything, everything, relative_bias, dtype)
    inner = (QueryGroup(everything, everything, bias_BHTT),)
    read_BR = slots.read_BR()
    if read_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    read = QueryGroup(slice(0, read_BR.shape[1]), everything, _take_rows(bias_BHTT, read_BR))
    return AttentionPlan(inner=inner, last=(read,))


def plan_split(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """Two groups: the context among itself, the appended slots against everything."""
    context_BHSS = slots.bias(slots.context, slots.context, relative_bias, dtype)
    inner = [QueryGroup(slots.context, slots.context, context_BHSS)]
    if slots.has_appended:
        appended_BHAT = slots.bias(slots.appended, slots.everything, relative_bias, dtype)
        inner.append(QueryGroup(slots.appended, slots.everything, appended_BHAT))
    if slots.predicted_BM is None:
        return AttentionPlan(inner=tuple(inner), last=tuple(inner))
    num_predicted, last = slots.predicted_BM.shape[1], []
    for number, name in enumerate(slots.reads):
        rows = slice(number * num_predicted, (number + 1) * num_predicted)
        if name == "ae":
            last.append(QueryGroup(rows, slots.context, _take_rows(context_BHSS, slots.predicted_BM)))
        else:
            last.append(QueryGroup(rows, slots.everything, appended_BHAT[:, :, num_predicted:]))
    return AttentionPlan(inner=tuple(inner), last=tuple(last))


PLANS: dict[str, Callable[[Slots, RelativeBias | None, torch.dtype], AttentionPlan]] = {
    "dense": plan_dense,
    "split": plan_split,
}


def attend(q_ZQD: Tensor, k_ZKD: Tensor, v_ZKD: Tensor, bias_BHQK: Tensor, *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: [Z, Q, D]. Every query must see at least one key."""
    scale = q_ZQD.shape[-1] ** -0.5
    bias_ZQK = bias_BHQK.expand(-1, len(q_ZQD) // len(bias_BHQK), -1, -1).flatten(0, 1)
    probabilities_ZQK = torch.baddbmm(bias_ZQK, q_ZQD, k_ZKD.transpose(1, 2), alpha=scale).softmax(dim=-1)
    if dropout > 0.0:
        with different_on_tp_peers():
            probabilities_ZQK = F.dropout(probabilities_ZQK, dropout)
    return torch.bmm(probabilities_ZQK, v_ZKD)


def _take_rows(bias_BHQK: Tensor, rows_BR: Tensor) -> Tensor:
    index = rows_BR[:, None, :, None].expand(-1, bias_BHQK.shape[1], -1, bias_BHQK.shape[3])
    return bias_BHQK.gather(2, index)
