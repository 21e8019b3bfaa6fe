"""Loss and argmax over a vocabulary whose logits are split over the tensor-parallel ranks.

Legend: N predicted slots (any leading shape), V vocabulary rows of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from pmlm_dist.parallel.layers import tp_rank, tp_size


def token_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood [N] in nats of each target (an id of the whole vocabulary), in fp32.

    The logits may be overwritten: they are the largest tensor of a step and nobody else needs them.
    """
    if tp_size() > 1:
        return vocab_parallel_cross_entropy(logits_NV.float(), targets_N.contiguous())
    flat = F.cross_entropy(logits_NV.float().flatten(0, -2), targets_N.flatten(), reduction="none")
    return flat.view(targets_N.shape)


@torch.no_grad()
def most_likely(logits_NV: Tensor) -> Tensor:
    """The id [N] with the highest logit in the whole vocabulary; the highest id among equals of different ranks."""
    best_N, ids_N = logits_NV.max(dim=-1)
    if tp_size() == 1:
        return ids_N
    group = parallel_state.get_tensor_model_parallel_group()
    best_of_all_N = best_N.clone()
    dist.all_reduce(best_of_all_N, op=dist.ReduceOp.MAX, group=group)
    ids_N = torch.where(best_N == best_of_all_N, ids_N + tp_rank() * logits_NV.shape[-1], -1)
    dist.all_reduce(ids_N, op=dist.ReduceOp.MAX, group=group)
    return ids_N


def tied_logits(x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor) -> Tensor:
    """x W^T + b for this rank's vocabulary rows: [..., E], equal on every rank -> [..., V]."""
    group = parallel_state.get_tensor_model_parallel_group()
    return F.linear(copy_to_tensor_model_parallel_region(x_NE, group=group), weight_VE, bias_V)
