"""Residual connection and LayerNorm: norm(x + dropout(update)), on a GPU as one kernel in each direction.

    forward    reads x and update, writes the sum z, its normalized value, mean and deviation
    backward   reads z and the gradient, writes the gradient of z and of the update; sums the parameters' gradients

Without dropout both gradients are one tensor. Sums have one order: equal inputs give equal bits. On a CPU, operations
of torch do the same.

Legend: N rows, E hidden size, P programs of the backward kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROGRAMS = 512
"""P: programs that share the rows in the backward pass; enough for four on each multiprocessor of an H100."""


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of a residual sum."""

    def __init__(self, size: int, *, eps: float, dropout: float):
        super().__init__(size, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """States and what a sublayer adds to them, [..., E] -> [..., E]."""
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cuda":
            return residual_norm(x, update, self.weight, self.bias, eps=self.eps, dropout=dropout)
        return super().forward(x + F.dropout(update, dropout, training=dropout > 0))


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout: float) -> Tensor:
    """norm(x + dropout(update)) by kernels: [..., E], weights [E] -> [..., E]."""
    return _ResidualNorm.apply(x, update, weight, bias, eps, dropout)  # pyright: ignore[reportReturnType]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """See `residual_norm`."""
        from pmlm_dist.model import elementwise_kernels as kernels

        x, update = x.contiguous(), update.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        seed = torch.randint(2**31, (1,), device=x.device) if dropout else None
        out, z = torch.empty_like(x), torch.empty_like(x)
        statistics_2N = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        kernels.residual_norm[rows,](
            x, update, weight_E, bias_E, seed, out, z, statistics_2N, rows, size, eps, dropout,
            HAS_DROPOUT=dropout > 0, WIDTH=_power_of_two(size),
        )  # fmt: skip
        ctx.save_for_backward(z, weight_E, statistics_2N, *([] if seed is None else [seed]))
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, the update, weight and bias."""
        from pmlm_dist.model import elementwise_kernels as kernels

        z, weight_E, statistics_2N, *seeds = ctx.saved_tensors
        size = z.shape[-1]
        rows = z.numel() // size
        programs = min(rows, PROGRAMS)
        z_gradient = torch.empty_like(z)
        update_gradient = torch.empty_like(z) if ctx.dropout else None
        sums_2PE = torch.empty(2, programs, size, dtype=torch.float32, device=z.device)
        kernels.residual_norm_gradients[programs,](
            gradients[0].contiguous(), z, weight_E, statistics_2N, seeds[0] if seeds else None, z_gradient,
            update_gradient, sums_2PE, rows, size, ctx.dropout, HAS_DROPOUT=ctx.dropout > 0, WIDTH=_power_of_two(size),
        )  # fmt: skip
        weight_gradient_E, bias_gradient_E = sums_2PE.sum(dim=1).to(weight_E.dtype)
        return z_gradient, z_gradient if update_gradient is None else update_gradient, weight_gradient_E, bias_gradient_E, None, None


def _power_of_two(size: int) -> int:
    """Return the next power of two: the width of a kernel's row."""
    return 1 << (size - 1).bit_length()
