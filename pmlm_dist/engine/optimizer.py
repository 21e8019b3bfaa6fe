"""Optimizer settings of a step: parameter groups, learning rate, gradient norm and clipping."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pmlm_dist.config import OptimConfig
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices with weight decay; LayerNorm, biases and the relative position table without."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_bias = parameter.ndim < 2 or name.startswith("relative_bias.")
        (plain if is_bias else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]


def learning_rate(step: int, *, steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of update `step`, counted from 1: linear warmup to the peak, linear decay to zero."""
    warm_up = step / max(1, optim.warmup_steps)
    decay = (steps - step + 1) / (steps - optim.warmup_steps)
    return optim.peak_lr * max(0.0, min(1.0, warm_up, decay))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of a torch or DeepSpeed optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(model: nn.Module, topology: Topology) -> float:
    """Return the 2-norm of the model's gradient; gradients must already be reduced over data-parallel ranks."""
    own = [(parameter.grad, is_sharded(parameter)) for parameter in model.parameters() if parameter.grad is not None]
    return norm_over_ranks(own, topology, copies=topology.dp)


def norm_over_ranks(own: Sequence[tuple[Tensor, bool]], topology: Topology, *, copies: int = 1) -> float:
    """Return the 2-norm of a gradient that all ranks hold together, the same on all ranks; every rank must call.

    `own`: gradients on this rank, and whether its tensor-parallel peers hold different ones instead of copies.
    `copies`: data-parallel ranks that hold the same gradients. If a value of any rank is not finite, the norm is not:
    ranks that decided by a norm of their own could disagree, for example after an error in the memory of one.
    """
    different, copied = (
        nn.utils.get_total_norm([values for values, is_sharded in own if is_sharded == kind]).double().square()
        for kind in (True, False)
    )
    square = different.to(topology.device) / copies + copied.to(topology.device) / (copies * topology.tp)
    return float(topology.all_reduce_dp(topology.all_reduce_tp(square)).sqrt())


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return the factor that reduces gradients of 2-norm `norm` to `max_norm` at most; `max_norm` 0: no clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0  # the epsilon of torch and DeepSpeed


@torch.no_grad()
def clip_or_drop_gradients(model: nn.Module, *, norm: float, max_norm: float) -> None:
    """Clip gradients of 2-norm `norm`; drop them when they are not finite. From ZeRO-1 on the engine does both."""
    scale = clip_coefficient(norm, max_norm)
    for parameter in model.parameters():
        if not math.isfinite(norm):
            parameter.grad = None  # AdamW skips it: neither weights nor moments nor its step change
        elif scale < 1.0 and parameter.grad is not None:
            parameter.grad.mul_(scale)
