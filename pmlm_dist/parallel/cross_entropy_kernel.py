"""Triton kernel of the cross entropy: a row of logits becomes the left factor of its backward pass in two passes."""

# pyright: reportUnknownMemberType=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at a time."""


def exponentiate(logits_NV: Tensor, bias_V: Tensor, own_N: Tensor, elsewhere_N: Tensor) -> tuple[Tensor, ...]:
    """See `cross_entropy._exponentiate`."""
    results = [bias_V.new_empty(len(logits_NV)) for _ in range(3)]
    targets_N = own_N.masked_fill(elsewhere_N, -1).int()
    _exponentiate[len(logits_NV),](
        logits_NV, bias_V, targets_N, *results, logits_NV.shape[1], torch.finfo(bias_V.dtype).min, BLOCK=BLOCK
    )
    return tuple(results)


@triton.jit
def _exponentiate(
    logits_ptr, bias_ptr, targets_ptr, target_logit_ptr, highest_ptr, total_ptr, size, lowest, BLOCK: tl.constexpr
):
    """One row; `targets`: column of the target, -1 if this rank does not hold it; `lowest`: the maximum is no less."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * size
    target = tl.load(targets_ptr + row)
    highest = lowest
    total = 0.0
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        is_other = (columns < size) & (columns != target)
        logits = tl.load(logits_ptr + columns, is_other, other=float("-inf")).to(tl.float32)
        logits += tl.load(bias_ptr + columns, is_other, other=0.0)
        new_highest = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - new_highest) + tl.sum(tl.exp(logits - new_highest), 0)
        highest = new_highest
    own = tl.maximum(target, 0)
    target_logit = tl.load(logits_ptr + own).to(tl.float32) + tl.load(bias_ptr + own)
    tl.store(target_logit_ptr + row, tl.where(target >= 0, target_logit, float("-inf")))
    tl.store(highest_ptr + row, highest)
    tl.store(total_ptr + row, total)
    tl.debug_barrier()  # all threads have read the target's logit before it is overwritten
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        is_other = (columns < size) & (columns != target)
        logits = tl.load(logits_ptr + columns, is_other, other=float("-inf")).to(tl.float32)
        logits += tl.load(bias_ptr + columns, is_other, other=0.0)
        weights = tl.exp(logits - highest)
        tl.store(logits_ptr + columns, weights.to(logits_ptr.dtype.element_ty), columns < size)
