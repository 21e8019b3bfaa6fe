"""What is updated how fast: parameter groups, the learning rate of a step, the gradient's norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pmlm_dist.config import OptimConfig
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, the relative position table among them, and LayerNorm without."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_bias = parameter.ndim < 2 or name.startswith("relative_bias.")
        (plain if is_bias else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]


def learning_rate(step: int, *, steps: int, optim: OptimConfig) -> float:
    """Learning rate of the update `step` (1 is the first): linear warm-up to the peak, then decay towards zero."""
    warm_up = step / max(1, optim.warmup_steps)
    decay = (steps - step + 1) / (steps - optim.warmup_steps)
    return optim.peak_lr * max(0.0, min(1.0, warm_up, decay))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of a torch or DeepSpeed optimizer the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(model: nn.Module, topology: Topology) -> float:
    """2-norm of the gradient of the whole model, from gradients that are reduced over data-parallel ranks already.

    Tensor-parallel ranks add the squares of their own shards; what they hold in common is counted once.
    """
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradients[is_sharded(parameter)].append(parameter.grad)
    own, shared = (nn.utils.get_total_norm(gradients[sharded]).double().square() for sharded in (True, False))
    return float((topology.all_reduce_tp(own.to(topology.device)) + shared.to(topology.device)).sqrt())


@torch.no_grad()
def clip_or_drop_gradients(model: nn.Module, *, norm: float, largest: float) -> None:
    """Scale gradients of 2-norm `norm` down to `largest` (0: any size is fine); drop them when they are not finite.

    What DeepSpeed does by itself from ZeRO-1 on.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not math.isfinite(norm):
        for parameter in model.parameters():
            parameter.grad = None
    elif 0 < largest < norm:
        for gradient in gradients:
            gradient.mul_(largest / (norm + 1e-6))
