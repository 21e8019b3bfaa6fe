"""What is updated how fast: parameter groups, the learning rate of a step, the gradient's norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pmlm_dist.config import OptimConfig
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and LayerNorm without; the relative table without and with its own rate.

    `rate_scale` of a group multiplies the learning rate of the step.
    """
    decayed, plain, relative = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("relative_bias."):
            relative.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 and not name.endswith("bias") else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "rate_scale": 1.0, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "rate_scale": 1.0, "name": "plain"},
        {"params": relative, "weight_decay": 0.0, "rate_scale": optim.relative_bias_rate, "name": "relative_bias"},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, *, steps: int, optim: OptimConfig) -> float:
    """Learning rate of the update `step` (1 is the first): linear warm-up to the peak, then decay towards zero."""
    warm_up = step / max(1, optim.warmup_steps)
    decay = (steps - step + 1) / (steps - optim.warmup_steps)
    return optim.peak_lr * max(0.0, min(1.0, warm_up, decay))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of a torch or DeepSpeed optimizer the learning rate `rate`, times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


@torch.no_grad()
def gradient_norm(model: nn.Module, topology: Topology) -> float:
    """2-norm of the gradient of the whole model, from gradients that are reduced over data-parallel ranks already.

    Tensor-parallel ranks add the squares of their own shards; what they hold in common is counted once.
    """
    shared = torch.zeros((), dtype=torch.float64, device=topology.device)
    own = torch.zeros((), dtype=torch.float64, device=topology.device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            (own if is_sharded(parameter) else shared).add_(parameter.grad.double().square().sum())
    return float((topology.sum_over_tp(own) + shared).sqrt())
