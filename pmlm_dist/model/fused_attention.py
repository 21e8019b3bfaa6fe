"""Attention over query groups as one differentiable operation.

The same numbers as `attention.attend` group by group, with fewer passes over memory: queries, keys and values are read
where they lie, every group writes its rows of the one output, and the backward pass adds the gradients of keys and
values up in place. What autograd would keep of the scores (before and after softmax) is kept once. Products only: it
runs on any device.

Legend: Z batch x heads, D head size, T slots, Q queries, K keys of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = tuple[slice, slice]
"""Queries and keys of a group."""


class GroupedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v for each group, with dropout of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q_QZD: Tensor, kv_TZ2D: Tensor, groups: Sequence[Rows], dropout: float, *biases_ZQK: Tensor
    ) -> Tensor:
        """Queries [Q, Z, D], keys and values [T, Z, 2, D] -> mixed values [Q, Z, D]."""
        q_ZQD, k_ZTD, v_ZTD = _by_head(q_QZD, kv_TZ2D)
        mixed_QZD = torch.empty_like(q_QZD)
        kept: list[Tensor] = []
        for (rows, keys), bias_ZQK in zip(groups, biases_ZQK, strict=True):
            probabilities_ZQK = _probabilities(q_ZQD[:, rows], k_ZTD[:, keys], bias_ZQK)
            dropped_ZQK = F.dropout(probabilities_ZQK, dropout) if dropout else probabilities_ZQK
            mixed_QZD[rows] = torch.bmm(dropped_ZQK, v_ZTD[:, keys]).transpose(0, 1)
            kept += [probabilities_ZQK, dropped_ZQK] if dropout else [probabilities_ZQK]
        ctx.groups, ctx.dropout = groups, dropout
        ctx.save_for_backward(q_QZD, kv_TZ2D, *kept)
        return mixed_QZD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of queries, keys and values, and of each group's bias."""
        (mixed_gradient_QZD,) = gradients
        q_QZD, kv_TZ2D, *kept = ctx.saved_tensors
        q_ZQD, k_ZTD, v_ZTD = _by_head(q_QZD, kv_TZ2D)
        q_gradient_QZD, kv_gradient_TZ2D = torch.empty_like(q_QZD), torch.zeros_like(kv_TZ2D)
        _, k_gradient_ZTD, v_gradient_ZTD = _by_head(q_QZD, kv_gradient_TZ2D)
        scale = q_ZQD.shape[-1] ** -0.5
        bias_gradients: list[Tensor] = []
        for number, (rows, keys) in enumerate(ctx.groups):
            probabilities_ZQK, dropped_ZQK = _kept(kept, number, dropout=ctx.dropout)
            gradient_ZQD = mixed_gradient_QZD[rows].transpose(0, 1)
            v_gradient_ZTD[:, keys] += torch.bmm(dropped_ZQK.transpose(1, 2), gradient_ZQD)
            scores_gradient_ZQK = torch.bmm(gradient_ZQD, v_ZTD[:, keys].transpose(1, 2))
            if ctx.dropout:
                scores_gradient_ZQK.mul_(dropped_ZQK != 0).mul_(1.0 / (1.0 - ctx.dropout))
            torch.ops.aten._softmax_backward_data.out(
                scores_gradient_ZQK,
                probabilities_ZQK,
                -1,
                probabilities_ZQK.dtype,
                grad_input=scores_gradient_ZQK,
            )
            q_gradient_QZD[rows] = torch.bmm(scores_gradient_ZQK, k_ZTD[:, keys]).mul_(scale).transpose(0, 1)
            k_gradient_ZTD[:, keys] += torch.bmm(scores_gradient_ZQK.transpose(1, 2), q_ZQD[:, rows]).mul_(scale)
            bias_gradients.append(scores_gradient_ZQK)
        return q_gradient_QZD, kv_gradient_TZ2D, None, None, *bias_gradients


def _probabilities(q_ZQD: Tensor, k_ZKD: Tensor, bias_ZQK: Tensor) -> Tensor:
    scores_ZQK = torch.baddbmm(bias_ZQK, q_ZQD, k_ZKD.transpose(1, 2), alpha=q_ZQD.shape[-1] ** -0.5)
    return torch.softmax(scores_ZQK, dim=-1, out=scores_ZQK)


def _kept(kept: list[Tensor], number: int, *, dropout: float) -> tuple[Tensor, Tensor]:
    if dropout:
        return kept[2 * number], kept[2 * number + 1]
    return kept[number], kept[number]


def _by_head(q_QZD: Tensor, kv_TZ2D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [Z, slots, D] of queries, keys and values; nothing is copied."""
    k_ZTD, v_ZTD = kv_TZ2D.transpose(0, 1).unbind(dim=2)
    return q_QZD.transpose(0, 1), k_ZTD, v_ZTD
