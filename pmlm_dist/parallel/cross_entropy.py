"""Logits and cross entropy with a vocabulary that is split over the tensor-parallel ranks.

    x [N, E] --product with the token embedding--> logits [N, V] --in place, chunk by chunk--> exp(logits - maximum)
                                                                    |
                                       nll [N], correct [N]     saved for the backward pass: one buffer [N, V] in all

The logits are the largest tensor of a step. `tied_cross_entropy` processes them once while they are in the cache and
overwrites them with the left factor of its backward pass. Its slow reference is `tied_logits` with any cross entropy.

Legend: N predicted slots, E hidden size, V vocabulary rows of this rank, C rows of a chunk or block, B blocks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from pmlm_dist.parallel.layers import tp_group, tp_rank, tp_size

# Logits of a chunk: on a CPU 2 MiB in fp32, which stay in the cache; on an accelerator few large launches are faster.
_CHUNK_ON_CPU, _CHUNK_ON_ACCELERATOR = 2**19, 2**27
_BLOCK = 128  # rows that one product of `_sums_by_target` sums


def tied_logits(x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor) -> Tensor:
    """x W^T + b for this rank's vocabulary rows: [..., E], equal on every rank -> [..., V]."""
    return F.linear(_copy_to_shards(x_NE), weight_VE, bias_V)


def tied_cross_entropy(x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [N] in nats of the targets (ids of the full vocabulary), and where argmax is correct [N].

    Logits are x W^T + b. A prediction is correct if its target's logit exceeds all others; a tie is not correct.
    Computed in fp32, or in fp64 for fp64 `x`. Any number of leading dimensions.
    """
    flat_NE = _copy_to_shards(x_NE).reshape(-1, x_NE.shape[-1])
    nll_N, correct_N = _TiedCrossEntropy.apply(flat_NE, weight_VE, bias_V, targets_N.reshape(-1))  # pyright: ignore[reportGeneralTypeIssues]
    return nll_N.view(targets_N.shape), correct_N.view(targets_N.shape)


@torch.no_grad()
def vocab_parallel_argmax(logits_NV: Tensor) -> Tensor:
    """Ids [N] with the highest logit in the whole vocabulary; in a tie between ranks the highest id."""
    best_N, ids_N = logits_NV.max(dim=-1)
    if tp_size() == 1:
        return ids_N
    # Two reductions of [N] instead of gathering the logits: ranks without the maximum contribute -1.
    best_of_all_N = _all_reduce_shards(best_N.clone(), dist.ReduceOp.MAX)
    ids_N = torch.where(best_N == best_of_all_N, ids_N + tp_rank() * logits_NV.shape[-1], -1)
    return _all_reduce_shards(ids_N, dist.ReduceOp.MAX)


@torch.no_grad()
def gather_logits(logits_NV: Tensor) -> Tensor:
    """Logits [..., tp * V] over the whole vocabulary, equal on every rank, from those of this rank's rows [..., V]."""
    if tp_size() == 1:
        return logits_NV
    parts = [torch.empty_like(logits_NV) for _ in range(tp_size())]
    dist.all_gather(parts, logits_NV.contiguous(), group=tp_group())
    return torch.cat(parts, dim=-1)


def smoothing_nll(x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor, *, vocab_size: int) -> Tensor:
    """Term of label smoothing, to be multiplied with its strength and added to the negative log-likelihood: [N].

    The smoothed target is (1 - s) of the target token and s of the uniform distribution over the `vocab_size` tokens
    (Szegedy et al., 2016). Its cross entropy is nll + s (l_t - mean l), with l the logits x W^T + b. Logits are linear
    in W and b, so their mean follows from the mean row and no logits are needed. Rows that pad the vocabulary are
    excluded. Computed at least in fp32.
    """
    precise = torch.promote_types(x_NE.dtype, torch.float32)
    x_NE, rows = _copy_to_shards(x_NE).to(precise), len(weight_VE)
    first = tp_rank() * rows
    counted = max(0, min(rows, vocab_size - first))  # 0 on a rank that holds padding only
    own_N = targets_N - first
    is_own_N = (own_N >= 0) & (own_N < rows)
    own_N = own_N.masked_fill(~is_own_N, 0)
    mean_E = weight_VE[:counted].sum(dim=0, dtype=precise) / vocab_size
    mean = bias_V[:counted].sum(dtype=precise) / vocab_size
    target_N = (x_NE * weight_VE[own_N].to(precise)).sum(dim=-1) + bias_V[own_N].to(precise)
    # Exactly one rank holds the target's row, and each holds a part of the mean: the sum over ranks is l_t - mean l.
    target_N = target_N.masked_fill(~is_own_N, 0.0)
    return reduce_from_tensor_model_parallel_region(target_N - x_NE @ mean_E - mean, group=tp_group())


class _TiedCrossEntropy(torch.autograd.Function):
    """Cross entropy of softmax(x W^T + b) whose only large buffer is that of the logits.

    With E = exp(logits - m), m the row maximum on this rank, the probabilities are p = f E (f: one factor per row). The
    gradients are products with E; f and the incoming gradient g are applied to the small operand:

        dx = g f (E W) + g (p_t - 1) W[t]        dW = E^T (g f x), row t + g (p_t - 1) x        db likewise

    The entry of the target t in E is zero. Its term is computed apart, since p_t - 1 would cancel in low precision.
    """

    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N, E], [V, E], [V], [N] -> loss [N] and where argmax is correct [N]."""
        precise = torch.promote_types(x_NE.dtype, torch.float32)
        rows = len(weight_VE)
        own_N = targets_N - tp_rank() * rows
        elsewhere_N = (own_N < 0) | (own_N >= rows)
        own_N = own_N.masked_fill(elsewhere_N, 0)
        logits_NV = x_NE @ weight_VE.t()
        target_N, others_N, sums_N = _exponentiate(logits_NV, bias_V.to(precise), own_N, elsewhere_N)
        # A target's logit is minus infinity on the ranks without its row, so the maximum is its value.
        target_N = _all_reduce_shards(target_N, dist.ReduceOp.MAX)
        highest_N = _all_reduce_shards(others_N.clone(), dist.ReduceOp.MAX)
        top_N = torch.maximum(highest_N, target_N)
        # Row sums are relative to the maximum of each rank; this factor rescales them to the common maximum.
        to_top_N = (others_N - top_N).exp()
        total_N = _all_reduce_shards(sums_N * to_top_N, dist.ReduceOp.SUM) + (target_N - top_N).exp()
        nll_N = total_N.log() + top_N - target_N
        # 1 - p_t by expm1, since 1 - exp(-nll) loses its digits near p_t = 1. Zero where another rank has row t.
        error_N = (-torch.expm1(-nll_N)).masked_fill(elsewhere_N, 0.0)
        ctx.save_for_backward(x_NE, weight_VE, logits_NV, to_top_N / total_N, error_N, own_N)
        correct_N = target_N > highest_N
        ctx.mark_non_differentiable(correct_N)
        return nll_N, correct_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x (summed over ranks by `_copy_to_shards`), the matrix and its bias."""
        x_NE, weight_VE, exponentials_NV, factor_N, error_N, own_N = ctx.saved_tensors
        scale_N, target_scale_N = gradients[0] * factor_N, gradients[0] * error_N
        # Scaling rows of [N, E] instead of [N, V]: the large buffer is read only.
        x_gradient_NE = (exponentials_NV @ weight_VE) * scale_N[:, None]
        x_gradient_NE -= target_scale_N[:, None] * weight_VE[own_N]
        weight_gradient_VE = exponentials_NV.t() @ (scale_N[:, None] * x_NE).to(x_NE.dtype)
        bias_gradient_V = scale_N.to(x_NE.dtype) @ exponentials_NV
        _subtract_target_terms(weight_gradient_VE, bias_gradient_V, own_N, target_scale_N, x_NE)
        return x_gradient_NE.to(x_NE.dtype), weight_gradient_VE, bias_gradient_V, None


def _subtract_target_terms(
    weight_gradient_VE: Tensor, bias_gradient_V: Tensor, own_N: Tensor, scale_N: Tensor, x_NE: Tensor
) -> None:
    """Subtract `scale` x from the target's row, and `scale` from its bias; scales are at least fp32."""
    if x_NE.device.type == "cpu" and x_NE.dtype == scale_N.dtype:  # here index_add_ is precise and adds in order
        weight_gradient_VE.index_add_(0, own_N, -scale_N[:, None] * x_NE)
        bias_gradient_V.index_add_(0, own_N, -scale_N)
        return
    ones_N1 = torch.ones_like(x_NE[:, :1])
    targets_N, sums_NE = _sums_by_target(own_N, scale_N[:, None] * torch.cat([x_NE, ones_N1], dim=1))
    for gradient, sums in ((weight_gradient_VE, sums_NE[:, :-1]), (bias_gradient_V, sums_NE[:, -1])):
        # Every row of a target has its whole sum, so it does not matter which one is written last.
        gradient[targets_N] = (gradient[targets_N] - sums).to(gradient.dtype)


def _sums_by_target(targets_N: Tensor, addends_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets in ascending order, and for each of them the sum of all addends of its target.

    The sums have a fixed order and the precision of the addends. `index_add_` into a gradient in low precision rounds
    every addend, and on a GPU it adds them in no fixed order. No size here depends on the targets, which would need a
    synchronization with the host. Rows are sorted, so matrices of zeros and ones sum the rows of a target: first within
    each of B blocks of C rows, then over the blocks that a target spans.
    """
    sorted_N, order_N = targets_N.sort(stable=True)
    num_rows = len(sorted_N)
    blocks = math.ceil(num_rows / _BLOCK)
    padding = blocks * _BLOCK - num_rows
    targets_BC = F.pad(sorted_N, (0, padding), value=-1).view(blocks, _BLOCK)
    addends_BCE = addends_NE[F.pad(order_N, (0, padding))].view(blocks, _BLOCK, -1)  # padding: a target of its own
    sums_BCE = (targets_BC[:, :, None] == targets_BC[:, None, :]).to(addends_BCE.dtype) @ addends_BCE
    # The last row of a target is in its last block. The earlier blocks of the target end with it.
    starts_B, ends_B = targets_BC[:, 0], targets_BC[:, -1]
    earlier_BE = (starts_B[:, None] == ends_B).tril(-1).to(sums_BCE.dtype) @ sums_BCE[:, -1]
    sums_BCE += (targets_BC == starts_B[:, None])[:, :, None] * earlier_BE[:, None]
    last_N = torch.searchsorted(sorted_N, sorted_N, right=True) - 1
    return sorted_N, sums_BCE.flatten(0, 1)[last_N]


def _exponentiate(logits_NV: Tensor, bias_V: Tensor, own_N: Tensor, elsewhere_N: Tensor) -> tuple[Tensor, ...]:
    """Overwrite logits without bias by exp(logit + bias - m), zero at the target; m is the maximum of the others.

    Return, in the precision of the bias: the target's logit [N] (minus infinity where `elsewhere_N`), m [N], and the
    row sums [N].
    """
    if logits_NV.device.type == "cuda" and bias_V.dtype == torch.float32:
        from pmlm_dist.parallel.cross_entropy_kernel import exponentiate

        return exponentiate(logits_NV, bias_V, own_N, elsewhere_N)
    target_N, others_N, sums_N = (bias_V.new_empty(len(logits_NV)) for _ in range(3))
    budget = _CHUNK_ON_CPU if logits_NV.device.type == "cpu" else _CHUNK_ON_ACCELERATOR
    size = max(1, budget // logits_NV.shape[1])
    for start in range(0, len(logits_NV), size):
        rows = slice(start, start + size)
        # `to` copies only if the precision differs: fp32 logits are overwritten in place.
        chunk_CV = logits_NV[rows].to(bias_V.dtype).add_(bias_V)
        own_C1 = own_N[rows, None]
        target_C1 = chunk_CV.gather(1, own_C1)
        hidden_C1 = target_C1.masked_fill(~elsewhere_N[rows, None], float("-inf"))
        # The target is excluded from maximum and sum; a row whose target is elsewhere gets its own value back.
        chunk_CV.scatter_(1, own_C1, hidden_C1)
        # Clamped to a finite value: on a rank with padding only, minus infinity minus itself would be NaN.
        others_N[rows] = chunk_CV.amax(dim=1).clamp_(min=torch.finfo(chunk_CV.dtype).min)
        chunk_CV.sub_(others_N[rows, None]).exp_()
        sums_N[rows] = chunk_CV.sum(dim=1)
        target_N[rows] = target_C1[:, 0].masked_fill(elsewhere_N[rows], float("-inf"))
        if chunk_CV.dtype != logits_NV.dtype:  # lower precision: the chunk was a copy
            logits_NV[rows] = chunk_CV
    return target_N, others_N, sums_N


def _copy_to_shards(x: Tensor) -> Tensor:
    """`x` itself; its gradient is summed over the tensor-parallel ranks."""
    return copy_to_tensor_model_parallel_region(x, group=tp_group())


def _all_reduce_shards(values: Tensor, reduce: dist.ReduceOp.RedOpType) -> Tensor:
    """Reduce `values` over the tensor-parallel ranks in place."""
    if tp_size() > 1:
        dist.all_reduce(values, op=reduce, group=tp_group())
    return values
