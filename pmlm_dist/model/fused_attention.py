"""Attention over query groups as one differentiable operation.

The same numbers as `attention.attend_plainly`, with fewer passes over memory. Queries, keys and values are laid out by
head once; then the scores are worked on in parts that stay in a core's cache, and only probabilities are written out:

    part of heads and samples:   q k^T -> + bias -> softmax -> probabilities v            (kept: the probabilities)
    backward, the same parts:    g v^T -> softmax backward -> gradients of q, k, v and of the bias

A bias that all samples share gets its gradient summed over them on the spot. Products only: it runs on any device.

Legend: B batch, H heads, Z = H * B of a part, D head size, T slots, Q queries, K keys of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Scores that are worked on at a time, for each thread: 4 MiB in fp32. An accelerator takes all at once.
_SCORES_PER_THREAD = 2**20


@dataclass(frozen=True)
class Pairs:
    """Which queries meet which keys, and the keys' padding [B, K]: zero, or minus infinity (None: no padding)."""

    rows: slice
    keys: slice
    padding_BK: Tensor | None


class GroupedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias + padding) v for each group, with dropout of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q_QBHD: Tensor, kv_TBH2D: Tensor, groups: Sequence[Pairs], dropout: float, *biases: Tensor | None
    ) -> Tensor:
        """Queries [Q, B, H, D], keys and values [T, B, H, 2, D] -> mixed values [Q, B, H, D].

        Biases [H, B, Q, K], with size 1 where heads or samples share them, or None.
        """
        q_HBQD = q_QBHD.permute(2, 1, 0, 3).contiguous().mul_(q_QBHD.shape[-1] ** -0.5)
        kv_2HBTD = kv_TBH2D.permute(3, 2, 1, 0, 4).contiguous()
        mixed_HBQD, kept = torch.empty_like(q_HBQD), []
        for group, bias in zip(groups, biases, strict=True):
            k_HBKD, v_HBKD = kv_2HBTD[..., group.keys, :]
            of_group = (q_HBQD[..., group.rows, :], k_HBKD, v_HBKD, mixed_HBQD[..., group.rows, :])
            kept += _attend(*of_group, bias=bias, padding_BK=group.padding_BK, dropout=dropout)
        ctx.groups, ctx.dropout = groups, dropout
        ctx.bias_shapes = [bias.shape if bias is not None and bias.requires_grad else None for bias in biases]
        ctx.save_for_backward(q_HBQD, kv_2HBTD, *kept)
        return mixed_HBQD.permute(2, 1, 0, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of queries, keys and values, and of each group's bias."""
        mixed_gradient_HBQD = gradients[0].permute(2, 1, 0, 3).contiguous()
        q_HBQD, kv_2HBTD, *kept = ctx.saved_tensors
        q_gradient_HBQD, kv_gradient_2HBTD = torch.empty_like(q_HBQD), torch.zeros_like(kv_2HBTD)
        bias_gradients: list[Tensor | None] = []
        for group, bias_shape in zip(ctx.groups, ctx.bias_shapes, strict=True):
            probabilities_HBQK, drawn_HBQK = kept.pop(0), kept.pop(0) if ctx.dropout else None
            bias_gradients.append(
                _attend_backward(
                    _Operands(q_HBQD[..., group.rows, :], *kv_2HBTD[..., group.keys, :]),
                    _Operands(q_gradient_HBQD[..., group.rows, :], *kv_gradient_2HBTD[..., group.keys, :]),
                    mixed_gradient_HBQD[..., group.rows, :],
                    probabilities_HBQK,
                    drawn_HBQK=drawn_HBQK,
                    dropout=ctx.dropout,
                    bias_shape=bias_shape,
                )
            )
        q_gradient_QBHD = q_gradient_HBQD.mul_(q_HBQD.shape[-1] ** -0.5).permute(2, 1, 0, 3).contiguous()
        kv_gradient_TBH2D = kv_gradient_2HBTD.permute(3, 2, 1, 0, 4).contiguous()
        return q_gradient_QBHD, kv_gradient_TBH2D, None, None, *bias_gradients


@dataclass(frozen=True)
class _Operands:
    """Queries [H, B, Q, D], scaled, keys and values [H, B, K, D] of a group, or the gradients of these."""

    q_HBQD: Tensor
    k_HBKD: Tensor
    v_HBKD: Tensor


def _attend(
    q_HBQD: Tensor,
    k_HBKD: Tensor,
    v_HBKD: Tensor,
    mixed_HBQD: Tensor,
    *,
    bias: Tensor | None,
    padding_BK: Tensor | None,
    dropout: float,
) -> list[Tensor]:
    """Write the mixed values; return the probabilities [H, B, Q, K] and, with `dropout`, which of them were kept."""
    shape_HBQK = (*q_HBQD.shape[:3], k_HBKD.shape[2])
    probabilities_HBQK = q_HBQD.new_empty(shape_HBQK)
    drawn_HBQK = None
    if dropout:
        drawn_HBQK = torch.empty(shape_HBQK, dtype=torch.bool, device=q_HBQD.device).bernoulli_(1.0 - dropout)
    for part in _parts(probabilities_HBQK):
        scores_HBQK = probabilities_HBQK[part]
        scores_ZQK = scores_HBQK.flatten(0, 1)
        torch.bmm(_flat(q_HBQD, part), _flat(k_HBKD, part).transpose(1, 2), out=scores_ZQK)
        if bias is not None:
            scores_HBQK += bias[_narrowed(part, bias.shape)]
        if padding_BK is not None:
            scores_HBQK += padding_BK[part[1], None]
        torch.softmax(scores_ZQK, dim=-1, out=scores_ZQK)
        weights_ZQK = scores_ZQK if drawn_HBQK is None else _dropped(scores_ZQK, drawn_HBQK[part], dropout)
        mixed_HBQD[part] = torch.bmm(weights_ZQK, _flat(v_HBKD, part)).view_as(mixed_HBQD[part])
    return [probabilities_HBQK] if drawn_HBQK is None else [probabilities_HBQK, drawn_HBQK]


def _attend_backward(
    of: _Operands,
    gradients: _Operands,
    mixed_gradient_HBQD: Tensor,
    probabilities_HBQK: Tensor,
    *,
    drawn_HBQK: Tensor | None,
    dropout: float,
    bias_shape: torch.Size | None,
) -> Tensor | None:
    """Write the gradient of the queries, add those of keys and values, return that of the bias where it is wanted.

    The gradient of a bias that nobody shares is that of the scores, written where it stays. Else it is a sum over what
    shares the bias, taken in fp32 at least.
    """
    dtype = probabilities_HBQK.dtype
    precise = torch.promote_types(dtype, torch.float32)
    own_gradient = torch.empty_like(probabilities_HBQK) if bias_shape == probabilities_HBQK.shape else None
    shared_gradient = None
    if bias_shape is not None and own_gradient is None:
        shared_gradient = of.q_HBQD.new_zeros(bias_shape, dtype=precise)
    for part in _parts(probabilities_HBQK):
        probabilities_ZQK = probabilities_HBQK[part].flatten(0, 1)
        gradient_ZQD = _flat(mixed_gradient_HBQD, part)
        scores_gradient_ZQK = torch.empty_like(probabilities_ZQK) if own_gradient is None else _flat(own_gradient, part)
        torch.bmm(gradient_ZQD, _flat(of.v_HBKD, part).transpose(1, 2), out=scores_gradient_ZQK)
        weights_ZQK = probabilities_ZQK
        if drawn_HBQK is not None:
            weights_ZQK = _dropped(probabilities_ZQK, drawn_HBQK[part], dropout)
            scores_gradient_ZQK.copy_(_dropped(scores_gradient_ZQK, drawn_HBQK[part], dropout))
        _add_product(_flat(gradients.v_HBKD, part), weights_ZQK.transpose(1, 2), gradient_ZQD)
        torch.ops.aten._softmax_backward_data.out(
            scores_gradient_ZQK, probabilities_ZQK, -1, dtype, grad_input=scores_gradient_ZQK
        )
        q_gradient_HBQD = gradients.q_HBQD[part]
        q_gradient_HBQD.copy_(torch.bmm(scores_gradient_ZQK, _flat(of.k_HBKD, part)).view_as(q_gradient_HBQD))
        _add_product(_flat(gradients.k_HBKD, part), scores_gradient_ZQK.transpose(1, 2), _flat(of.q_HBQD, part))
        if shared_gradient is not None:
            shared = shared_gradient[_narrowed(part, shared_gradient.shape)]
            shared += scores_gradient_ZQK.view_as(probabilities_HBQK[part]).sum_to_size(shared.shape).to(precise)
    return own_gradient if shared_gradient is None else shared_gradient.to(dtype)


Part = tuple[slice, slice]
"""Heads and samples."""


def _parts(scores_HBQK: Tensor) -> Iterator[Part]:
    """Heads and samples whose scores are worked on together: some samples of one head, or all of several heads."""
    heads, batch, queries, keys = scores_HBQK.shape
    if scores_HBQK.device.type != "cpu":
        yield slice(None), slice(None)
        return
    size = max(1, torch.get_num_threads() * _SCORES_PER_THREAD // (queries * keys))
    if size >= batch:
        step = size // batch
        yield from ((slice(h, h + step), slice(None)) for h in range(0, heads, step))
    else:
        yield from ((slice(h, h + 1), slice(b, b + size)) for h in range(heads) for b in range(0, batch, size))


def _flat(tensor_HBXD: Tensor, part: Part) -> Tensor:
    """View [Z, X, D] of a part: one head, or all samples of the heads, so their strides merge."""
    part_HBXD = tensor_HBXD[part]
    return part_HBXD.view(-1, *part_HBXD.shape[2:])


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.is_contiguous():
        torch.baddbmm(to, left, right, out=to)
    else:  # on a CPU one product after the other would be taken
        to += torch.bmm(left, right)


def _narrowed(part: Part, shape: torch.Size) -> Part:
    """`part` of a tensor that has size 1 where heads or samples share it."""
    heads, samples = part
    return heads if shape[0] > 1 else slice(None), samples if shape[1] > 1 else slice(None)


def _dropped(values_ZQK: Tensor, drawn_HBQK: Tensor, dropout: float) -> Tensor:
    return values_ZQK * drawn_HBQK.flatten(0, 1) * (1.0 / (1.0 - dropout))
