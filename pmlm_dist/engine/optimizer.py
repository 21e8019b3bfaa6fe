"""Optimizer settings of a step: parameter groups, learning rate, gradient norm and clipping."""

import math
from typing import Any

import torch
from torch import nn

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
    """Return the 2-norm of the model's gradient; gradients must already be reduced over data-parallel ranks.

    Squares of sharded parameters are summed over tensor-parallel ranks; replicated ones are counted once.
    """
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients[is_sharded(parameter)].append(parameter.grad)
    own, shared = (nn.utils.get_total_norm(gradients[sharded]).double().square() for sharded in (True, False))
    return float((topology.all_reduce_tp(own.to(topology.device)) + shared.to(topology.device)).sqrt())


@torch.no_grad()
def clip_or_drop_gradients(model: nn.Module, *, norm: float, max_norm: float) -> None:
    """Scale gradients of 2-norm `norm` down to `max_norm` (0: no clipping); drop them when they are not finite.

    DeepSpeed does the same by itself from ZeRO-1 on.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not math.isfinite(norm):
        for parameter in model.parameters():
            parameter.grad = None  # AdamW skips it: neither weights nor moments nor its step change
    elif 0 < max_norm < norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))  # the epsilon of torch and DeepSpeed
