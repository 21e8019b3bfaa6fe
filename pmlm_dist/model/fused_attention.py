"""Attention over query groups as one differentiable operation.

It computes what `attention.attention_reference` does with fewer passes over memory. Queries, keys and values are copied
once into a layout by head. The scores are then computed in parts that fit the cache of a core, and only probabilities
are written to memory:

    part of heads and samples:   q k^T -> + bias -> softmax -> probabilities v            (saved: the probabilities)
    backward, the same parts:    g v^T -> softmax backward -> gradients of q, k, v and of the bias

The gradient of a bias that all samples share is summed over them within each part. The operation consists of matrix
products and elementwise functions, so it runs on any device.

Legend: B batch, H heads, Z = H * B of a part, D head size, T slots, Q queries, K keys of a group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Scores of a part, for each thread: 4 MiB in fp32. On an accelerator all scores are one part.
_SCORES_PER_THREAD = 2**20


@dataclass(frozen=True)
class Pairs:
    """Ranges of queries and keys of a group, and the keys' padding [B, K]: zero or minus infinity. None: no padding."""

    rows: slice
    keys: slice
    padding_BK: Tensor | None


class GroupedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias + padding) v for each group, with dropout of the probabilities.

    The gradient of the scores s with probabilities p, incoming gradient g and h = g v^T is p (h - sum(p h)).
    """

    @staticmethod
    def forward(
        ctx: Any, q_QBHD: Tensor, kv_TBH2D: Tensor, groups: Sequence[Pairs], dropout: float, *biases: Tensor | None
    ) -> Tensor:
        """Queries [Q, B, H, D], keys and values [T, B, H, 2, D] -> mixed values [Q, B, H, D].

        Biases [H, B, Q, K], with size 1 where heads or samples share them, or None.
        """
        # The scale is folded into the copy of q: D values per query instead of K scores per query.
        q_HBQD = q_QBHD.permute(2, 1, 0, 3).contiguous().mul_(q_QBHD.shape[-1] ** -0.5)
        kv_2HBTD = kv_TBH2D.permute(3, 2, 1, 0, 4).contiguous()
        mixed_HBQD, saved = torch.empty_like(q_HBQD), []
        for group, bias in zip(groups, biases, strict=True):
            operands = _Operands(q_HBQD[..., group.rows, :], *kv_2HBTD[..., group.keys, :])
            mixed = mixed_HBQD[..., group.rows, :]
            saved += _attend(operands, mixed, bias=bias, padding_BK=group.padding_BK, dropout=dropout)
        # Scaled queries are saved: the gradient of k needs them scaled, and only that of q needs the factor again.
        ctx.groups, ctx.dropout = groups, dropout
        ctx.bias_shapes = [bias.shape if bias is not None and bias.requires_grad else None for bias in biases]
        ctx.save_for_backward(q_HBQD, kv_2HBTD, *saved)
        return mixed_HBQD.permute(2, 1, 0, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of queries, keys and values, and of each group's bias."""
        mixed_gradient_HBQD = gradients[0].permute(2, 1, 0, 3).contiguous()
        q_HBQD, kv_2HBTD, *saved = ctx.saved_tensors
        # A query belongs to one group, so its gradient is written; keys belong to several, so theirs are added up.
        q_gradient_HBQD, kv_gradient_2HBTD = torch.empty_like(q_HBQD), torch.zeros_like(kv_2HBTD)
        bias_gradients: list[Tensor | None] = []
        for group, bias_shape in zip(ctx.groups, ctx.bias_shapes, strict=True):
            probabilities_HBQK, kept_HBQK = saved.pop(0), saved.pop(0) if ctx.dropout else None
            bias_gradients.append(
                _attend_backward(
                    _Operands(q_HBQD[..., group.rows, :], *kv_2HBTD[..., group.keys, :]),
                    _Operands(q_gradient_HBQD[..., group.rows, :], *kv_gradient_2HBTD[..., group.keys, :]),
                    mixed_gradient_HBQD[..., group.rows, :],
                    probabilities_HBQK,
                    kept_HBQK=kept_HBQK,
                    dropout=ctx.dropout,
                    bias_shape=bias_shape,
                )
            )
        q_gradient_QBHD = q_gradient_HBQD.mul_(q_HBQD.shape[-1] ** -0.5).permute(2, 1, 0, 3).contiguous()
        kv_gradient_TBH2D = kv_gradient_2HBTD.permute(3, 2, 1, 0, 4).contiguous()
        return q_gradient_QBHD, kv_gradient_TBH2D, None, None, *bias_gradients


@dataclass(frozen=True)
class _Operands:
    """Scaled queries [H, B, Q, D], keys and values [H, B, K, D] of a group, or their gradients."""

    q_HBQD: Tensor
    k_HBKD: Tensor
    v_HBKD: Tensor


def _attend(
    operands: _Operands, mixed_HBQD: Tensor, *, bias: Tensor | None, padding_BK: Tensor | None, dropout: float
) -> list[Tensor]:
    """Write the mixed values. Return the probabilities [H, B, Q, K] and, with `dropout`, the mask of those kept."""
    shape_HBQK = (*operands.q_HBQD.shape[:3], operands.k_HBKD.shape[2])
    probabilities_HBQK = operands.q_HBQD.new_empty(shape_HBQK)
    kept_HBQK = None
    if dropout:
        # Drawn for all parts at once: the mask must not depend on the number of threads, which decides the parts.
        kept_HBQK = torch.empty_like(probabilities_HBQK, dtype=torch.bool).bernoulli_(1.0 - dropout)
    for part in _parts(probabilities_HBQK):
        # Scores and probabilities share one buffer, a view of the result: a part is read and written in the cache.
        scores_HBQK = probabilities_HBQK[part]
        scores_ZQK = scores_HBQK.flatten(0, 1)
        torch.bmm(_flat(operands.q_HBQD, part), _flat(operands.k_HBKD, part).transpose(1, 2), out=scores_ZQK)
        if bias is not None:
            scores_HBQK += bias[_narrowed(part, bias.shape)]
        if padding_BK is not None:
            scores_HBQK += padding_BK[part[1], None]
        torch.softmax(scores_ZQK, dim=-1, out=scores_ZQK)
        # Dropout makes a copy: the backward pass of the softmax needs the probabilities before dropout.
        weights_ZQK = scores_ZQK if kept_HBQK is None else _drop(scores_ZQK, kept_HBQK[part], dropout)
        mixed_HBQD[part] = torch.bmm(weights_ZQK, _flat(operands.v_HBKD, part)).view_as(mixed_HBQD[part])
    return [probabilities_HBQK] if kept_HBQK is None else [probabilities_HBQK, kept_HBQK]


def _attend_backward(
    operands: _Operands,
    gradients: _Operands,
    mixed_gradient_HBQD: Tensor,
    probabilities_HBQK: Tensor,
    *,
    kept_HBQK: Tensor | None,
    dropout: float,
    bias_shape: torch.Size | None,
) -> Tensor | None:
    """Write the gradient of the queries, add those of keys and values, and return that of the bias.

    `bias_shape` None: no gradient of the bias. If heads or samples share the bias, its gradient is their sum, computed
    at least in fp32.
    """
    dtype = probabilities_HBQK.dtype
    precise = torch.promote_types(dtype, torch.float32)
    # The gradient of an unshared bias is that of the scores, so both share one buffer without a copy.
    own_gradient = torch.empty_like(probabilities_HBQK) if bias_shape == probabilities_HBQK.shape else None
    shared_gradient = None
    if bias_shape is not None and own_gradient is None:
        shared_gradient = operands.q_HBQD.new_zeros(bias_shape, dtype=precise)
    for part in _parts(probabilities_HBQK):
        probabilities_ZQK = probabilities_HBQK[part].flatten(0, 1)
        gradient_ZQD = _flat(mixed_gradient_HBQD, part)
        scores_gradient_ZQK = torch.empty_like(probabilities_ZQK) if own_gradient is None else _flat(own_gradient, part)
        torch.bmm(gradient_ZQD, _flat(operands.v_HBKD, part).transpose(1, 2), out=scores_gradient_ZQK)
        weights_ZQK = probabilities_ZQK
        if kept_HBQK is not None:  # recomputed from a mask of one byte per pair instead of saved
            weights_ZQK = _drop(probabilities_ZQK, kept_HBQK[part], dropout)
            scores_gradient_ZQK.copy_(_drop(scores_gradient_ZQK, kept_HBQK[part], dropout))
        _add_product(_flat(gradients.v_HBKD, part), weights_ZQK.transpose(1, 2), gradient_ZQD)
        # The operator of autograd's softmax, with its output in place of its input; no public function does this.
        torch.ops.aten._softmax_backward_data.out(
            scores_gradient_ZQK, probabilities_ZQK, -1, dtype, grad_input=scores_gradient_ZQK
        )
        q_gradient_HBQD = gradients.q_HBQD[part]
        q_gradient_HBQD.copy_(torch.bmm(scores_gradient_ZQK, _flat(operands.k_HBKD, part)).view_as(q_gradient_HBQD))
        _add_product(_flat(gradients.k_HBKD, part), scores_gradient_ZQK.transpose(1, 2), _flat(operands.q_HBQD, part))
        if shared_gradient is not None:  # fp32: in bf16 a sum over many samples loses its small addends
            shared = shared_gradient[_narrowed(part, shared_gradient.shape)]
            shared += scores_gradient_ZQK.view_as(probabilities_HBQK[part]).sum_to_size(shared.shape).to(precise)
    return own_gradient if shared_gradient is None else shared_gradient.to(dtype)


Part = tuple[slice, slice]
"""Heads and samples."""


def _parts(scores_HBQK: Tensor) -> Iterator[Part]:
    """Split the scores into parts: some samples of one head, or all samples of several heads."""
    heads, batch, queries, keys = scores_HBQK.shape
    if scores_HBQK.device.type != "cpu":
        yield slice(None), slice(None)  # many small launches cost more than the caches save
        return
    size = max(1, torch.get_num_threads() * _SCORES_PER_THREAD // (queries * keys))
    if size >= batch:
        step = size // batch
        yield from ((slice(h, h + step), slice(None)) for h in range(0, heads, step))
    else:
        yield from ((slice(h, h + 1), slice(b, b + size)) for h in range(heads) for b in range(0, batch, size))


def _flat(tensor_HBXD: Tensor, part: Part) -> Tensor:
    """View [Z, X, D] of a part. Parts are samples of one head or all samples of heads, so the strides merge."""
    part_HBXD = tensor_HBXD[part]
    return part_HBXD.view(-1, *part_HBXD.shape[2:])


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.is_contiguous():
        torch.baddbmm(to, left, right, out=to)
    else:  # on a CPU baddbmm into a tensor with gaps falls back to one product after the other
        to += torch.bmm(left, right)


def _narrowed(part: Part, shape: torch.Size) -> Part:
    """Index of `part` in a tensor that has size 1 where heads or samples share it."""
    heads, samples = part
    return heads if shape[0] > 1 else slice(None), samples if shape[1] > 1 else slice(None)


def _drop(values_ZQK: Tensor, kept_HBQK: Tensor, dropout: float) -> Tensor:
    return values_ZQK * kept_HBQK.flatten(0, 1) * (1.0 / (1.0 - dropout))
