"""Attention under the visibility rule: query groups, their biases, and the backends that compute them.

A *query group* is a range of queries, a range of keys that contains all that are visible to them, and the bias of their
scores: the relative position bias, with minus infinity where the rule forbids a pair. A *plan* is the list of groups of
a layer, built once per step and shared by all layers. The attention backends differ in how they form the groups:

    reference   all T slots against all T slots: the specification
    fused       context queries against the S context keys, appended queries against all T keys: pairs of a context
                query and an appended key, which the rule always forbids, are never computed
    triton      all against all in blocks, skipping those without a visible pair (`triton_attention.py`)

The last layer has queries for the predicted slots only: AE slots first, then PAR slots.

Legend: B batch, H heads of this rank, D head size, S context slots, M predictions, A = 2M appended slots, T = S + A
slots, R predicted slots, Q and K queries and keys of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pmlm_dist.config import ModelConfig
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.visibility import visible
from pmlm_dist.model.fused_attention import GroupedAttention, Pairs
from pmlm_dist.model.relative_position import RelativeBias
from pmlm_dist.model.triton_attention import BlockGroup, attention_triton, block_group


@dataclass(frozen=True)
class QueryGroup:
    """Queries `rows` of a layer's query tensor against the keys `keys`."""

    rows: slice
    keys: slice
    bias: Tensor | None
    """Added to the scores: [H, B, Q, K], with size 1 where heads or samples share it."""
    padding_BK: Tensor | None = None
    """Added to the scores of all queries: minus infinity for keys that are padding, else zero."""


Groups = tuple[QueryGroup, ...] | tuple[BlockGroup]
"""Input of a layer beside queries, keys and values. The only differentiable tensor of a group is its `bias`."""


@dataclass(frozen=True)
class AttentionPlan:
    """Groups of the inner layers (queries for all slots) and of the last one (queries for the predicted slots)."""

    inner: Groups
    last: Groups


@dataclass(frozen=True)
class Slots:
    """The slots of a batch by kind, and the objectives that predict from them.

    An objective's predicted slots are the base slots `inputs.predicted_BM` ("ae") or the pseudo masks ("par"). Without
    `predicted_BM` all slots are predicted slots.
    """

    inputs: SlotInputs[Tensor]
    num_context: int
    objectives: tuple[str, ...] = ("ae", "par")

    @property
    def num_slots(self) -> int:
        """T."""
        return self.inputs.order_BT.shape[1]

    @property
    def context(self) -> slice:
        """Context slots."""
        return slice(0, self.num_context)

    @property
    def everything(self) -> slice:
        """All slots."""
        return slice(0, self.num_slots)

    @property
    def appended(self) -> slice:
        """Originals and pseudo masks."""
        return slice(self.num_context, self.num_slots)

    @property
    def pseudo(self) -> slice:
        """Pseudo masks: the second half of the appended slots."""
        return slice((self.num_context + self.num_slots) // 2, self.num_slots)

    @property
    def has_appended(self) -> bool:
        """True if there are slots beyond the context."""
        return self.num_slots > self.num_context

    def predicted_slots_BR(self) -> Tensor | None:
        """Indices of the predicted slots: AE slots, then PAR slots. None: all slots."""
        predicted_BM = self.inputs.predicted_BM
        if predicted_BM is None:
            return None
        pseudo = torch.arange(self.pseudo.start, self.pseudo.stop, device=predicted_BM.device)
        by_name = {"ae": predicted_BM, "par": pseudo.expand(len(predicted_BM), -1)}
        return torch.cat([by_name[name] for name in self.objectives], dim=1)

    def forbidden(self, rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
        """Minus infinity where a key of `keys` is not visible to a query of `rows`, else zero: [1, B, Q, K]."""
        order_BT = self.inputs.order_BT
        visible_BQK = visible(order_BT[:, rows, None], order_BT[:, None, keys])
        return _minus_infinity(~(visible_BQK & self.inputs.valid_BT[:, None, keys]), dtype)[None]

    def padding_BS(self, dtype: torch.dtype) -> Tensor | None:
        """Minus infinity for padding among the context, else zero. None: no padding (detected on the CPU only)."""
        valid_BS = self.inputs.valid_BT[:, self.context]
        # On an accelerator the check would synchronize with the host in every step, so padding is always added there.
        if valid_BS.device.type == "cpu" and bool(valid_BS.all()):
            return None
        return _minus_infinity(~valid_BS, dtype)


def plan_reference(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group: all slots against all slots."""
    everything, positions_BT = slots.everything, slots.inputs.positions_BT
    bias = slots.forbidden(everything, everything, dtype)
    if relative_bias is not None:
        bias = relative_bias(positions_BT, positions_BT).to(dtype) + bias
    inner = (QueryGroup(everything, everything, bias),)
    rows_BR = slots.predicted_slots_BR()
    if rows_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    last = QueryGroup(slice(0, rows_BR.shape[1]), everything, bias.take_along_dim(rows_BR[None, :, :, None], dim=2))
    return AttentionPlan(inner=inner, last=(last,))


def plan_fused(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """Two groups: the context against itself, the appended slots against everything.

    Relies on properties of the layout: context slots have positions 0, 1, 2, ... in every sample and are all visible to
    each other; original and pseudo mask of a prediction have the same position.
    """
    context, everything, padding_BS = slots.context, slots.everything, slots.padding_BS(dtype)
    predicted_BM = slots.inputs.predicted_BM
    # The context's bias is the same for all samples, so it has no batch dimension: [H, S, S] instead of [H, B, S, S].
    context_HSS = None if relative_bias is None else relative_bias.for_contiguous(slots.num_context).to(dtype)
    shared = None if context_HSS is None else context_HSS[:, None]
    inner = [QueryGroup(context, context, shared, padding_BS)]
    appended = None
    if slots.has_appended:
        appended = _appended_bias(slots, relative_bias, dtype)
        inner.append(QueryGroup(slots.appended, everything, appended))
    if predicted_BM is None:
        return AttentionPlan(inner=tuple(inner), last=tuple(inner))
    num_predicted, last = predicted_BM.shape[1], []
    for number, name in enumerate(slots.objectives):
        rows = slice(number * num_predicted, (number + 1) * num_predicted)
        if name == "ae":
            ae = None if context_HSS is None else _take_rows(context_HSS, predicted_BM)
            last.append(QueryGroup(rows, context, ae, padding_BS))
        else:
            assert appended is not None
            last.append(QueryGroup(rows, everything, appended[:, :, num_predicted:]))
    return AttentionPlan(inner=tuple(inner), last=tuple(last))


def _appended_bias(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> Tensor:
    """Bias [H | 1, B, A, T] of the appended queries for all keys.

    An original and its pseudo mask share a position, so each bias is looked up once, for [M, S + M] pairs instead of
    [2M, S + 2M], and repeated.
    """
    forbidden_1BAT = slots.forbidden(slots.appended, slots.everything, dtype)
    if relative_bias is None:
        return forbidden_1BAT
    positions_BM = slots.inputs.positions_BT[:, slots.pseudo]
    keys_BK = slots.inputs.positions_BT[:, : slots.pseudo.start]  # context and originals
    bias_HBMK = relative_bias(positions_BM, keys_BK).to(dtype)
    bias_HBMT = torch.cat([bias_HBMK, bias_HBMK[..., slots.num_context :]], dim=-1)
    return (bias_HBMT[:, :, None] + forbidden_1BAT.unflatten(2, (2, -1))).flatten(2, 3)


def plan_triton(slots: Slots, relative_bias: RelativeBias | None, dtype: torch.dtype) -> AttentionPlan:
    """One group of blocks: all slots against all slots. The bias stays in fp32 for any `dtype` of the activations."""
    inner = (block_group(slots.inputs, rows_BQ=None, relative_bias=relative_bias),)
    rows_BR = slots.predicted_slots_BR()
    if rows_BR is None:
        return AttentionPlan(inner=inner, last=inner)
    last = block_group(slots.inputs, rows_BQ=rows_BR, relative_bias=relative_bias)
    return AttentionPlan(inner=inner, last=(last,))


def attention_reference(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v for each group: queries [Q, B, H, D], keys and values [T, B, H, 2, D].

    Return the mixed values [Q, B, H, D]. Differentiated by autograd. At least one key must be visible to every query:
    a softmax over minus infinities only is NaN.
    """
    scale = q_QBHD.shape[-1] ** -0.5
    parts = []
    for group in groups:
        q_HBQD = q_QBHD[group.rows].permute(2, 1, 0, 3)
        k_HBKD, v_HBKD = kv_TBH2D[group.keys].permute(3, 2, 1, 0, 4)
        scores_HBQK = scale * q_HBQD @ k_HBKD.transpose(2, 3)  # scaled before the product: Q x D instead of Q x K
        if group.bias is not None:
            scores_HBQK = scores_HBQK + group.bias
        if group.padding_BK is not None:
            scores_HBQK = scores_HBQK + group.padding_BK[:, None]
        mixed_HBQD = F.dropout(scores_HBQK.softmax(dim=-1), dropout) @ v_HBKD
        parts.append(mixed_HBQD.permute(2, 1, 0, 3))
    return torch.cat(parts)


def attention_fused(q_QBHD: Tensor, kv_TBH2D: Tensor, groups: tuple[QueryGroup, ...], *, dropout: float) -> Tensor:
    """Compute the same as `attention_reference` in one operation with its own backward pass (`fused_attention.py`)."""
    pairs = [Pairs(group.rows, group.keys, group.padding_BK) for group in groups]
    # Autograd tracks only tensors that are arguments themselves, hence the biases outside of `pairs`.
    biases = [group.bias for group in groups]
    return GroupedAttention.apply(q_QBHD, kv_TBH2D, pairs, dropout, *biases)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation of attention: `plan` forms the query groups, `attend` computes them."""

    plan: Callable[[Slots, RelativeBias | None, torch.dtype], AttentionPlan]
    attend: Callable[..., Tensor]


ATTENTION_BACKENDS = {
    "reference": AttentionBackend(plan_reference, attention_reference),
    "fused": AttentionBackend(plan_fused, attention_fused),
    "triton": AttentionBackend(plan_triton, attention_triton),
}


def attention_backend(config: ModelConfig, device: torch.device) -> AttentionBackend:
    """Backend of a model on `device`."""
    return ATTENTION_BACKENDS[config.attention_on(accelerator=device.type != "cpu")]


def _take_rows(bias_HSS: Tensor, rows_BM: Tensor) -> Tensor:
    """Rows [H, B, M, S] of a bias that all samples share."""
    return bias_HSS.index_select(1, rows_BM.flatten()).unflatten(1, rows_BM.shape)


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, float("-inf"))
