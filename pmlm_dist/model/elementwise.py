"""Slot-by-slot parts of a layer, on a GPU as one kernel in each direction (`elementwise_kernels.py`).

    ResidualNorm    norm(x + dropout(W u + b))
    linear_gelu     gelu(W x + b)

The kernels add the bias of the product before them, so that their backward pass can sum its gradient. Sums have one
order: equal inputs give equal bits. On a CPU, operations of torch do the same.

Legend: N rows, E hidden size, F width of a GELU, P programs of a backward kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.parallel.layers import ColumnLinear, RowLinear

PROGRAMS = 512
"""P: programs that share the rows in a backward pass; four on each multiprocessor of an H100."""
GELU_PROGRAMS = 128
"""P of GELU's, for each block of columns."""


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of the sum of states and what a sublayer adds to them."""

    def __init__(self, size: int, *, eps: float, dropout: float):
        super().__init__(size, eps=eps)
        self.dropout = dropout

    def forward(self, x: Tensor, linear: RowLinear, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + dropout(linear(inputs))): states [..., E] and the inputs of the sublayer's last product.

        Return the result twice: for the next product, and for the next residual sum. The gradients of both come apart,
        and the kernel adds them.
        """
        dropout = self.dropout if self.training else 0.0
        if _by_kernels(x):
            update = linear(inputs, add_bias=False)
            return residual_norm(x, update, linear.bias, self.weight, self.bias, eps=self.eps, dropout=dropout)
        out = super().forward(x + F.dropout(linear(inputs), dropout, training=dropout > 0))
        return out, out


def linear_gelu(linear: ColumnLinear, x: Tensor) -> Tensor:
    """gelu(linear(x))."""
    if _by_kernels(x):
        return bias_gelu(linear(x, add_bias=False), linear.bias)
    return F.gelu(linear(x))


def _by_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda"


def residual_norm(
    x: Tensor, update: Tensor, update_bias: Tensor, weight: Tensor, bias: Tensor, *, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """norm(x + dropout(update + update_bias)) by kernels, twice: [..., E], parameters [E] -> [..., E]."""
    return _ResidualNorm.apply(x, update, update_bias, weight, bias, eps, dropout)  # pyright: ignore[reportReturnType]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) by kernels: [..., F], [F] -> [..., F]."""
    return _BiasGelu.apply(x, bias)  # pyright: ignore[reportReturnType]


class _ResidualNorm(torch.autograd.Function):
    """Saves the sum and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        """See `residual_norm`; `settings`: bias of the update, weight, bias, epsilon, dropout."""
        update_bias_E, weight_E, bias_E, eps, dropout = settings
        x, update = x.contiguous(), update.contiguous()
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        # Drawn on the host, whose generator activation checkpointing restores.
        seed = int(torch.randint(2**30, ())) if dropout else 0
        out, z = torch.empty_like(x), torch.empty_like(x)
        statistics_2N = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        _kernels().residual_norm[rows,](
            x, update, update_bias_E, weight_E, bias_E, seed, out, z, statistics_2N, rows, size, eps, dropout,
            HAS_DROPOUT=dropout > 0, WIDTH=_power_of_two(size),
        )  # fmt: skip
        ctx.save_for_backward(z, weight_E, statistics_2N)
        ctx.seed, ctx.dropout = seed, dropout
        ctx.set_materialize_grads(False)
        return out, out.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of x, the update (without dropout the same tensor), and the three vectors."""
        z, weight_E, statistics_2N = ctx.saved_tensors
        rows, size = z.numel() // z.shape[-1], z.shape[-1]
        programs = min(rows, PROGRAMS)
        first, *second = (gradient.contiguous() for gradient in gradients if gradient is not None)
        of_out = (first, second[0] if second else None)
        z_gradient = torch.empty_like(z)
        update_gradient = torch.empty_like(z) if ctx.dropout else z_gradient
        sums_3PE = torch.empty(3, programs, size, dtype=torch.float32, device=z.device)
        _kernels().residual_norm_gradients[programs,](
            *of_out, z, weight_E, statistics_2N, ctx.seed, z_gradient, update_gradient, sums_3PE,
            rows, size, ctx.dropout, HAS_DROPOUT=ctx.dropout > 0, WIDTH=_power_of_two(size),
        )  # fmt: skip
        return z_gradient, update_gradient, *sum_parts(sums_3PE, weight_E.dtype), None, None


class _BiasGelu(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_F: Tensor) -> Tensor:
        """See `bias_gelu`."""
        x = x.contiguous()
        ctx.save_for_backward(x, bias_F)
        out, size = torch.empty_like(x), x.shape[-1]
        kernels = _kernels()
        kernels.bias_gelu[x.numel() // size, -(-size // kernels.BLOCK)](x, bias_F, out, size, BLOCK=kernels.BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of input and bias."""
        x, bias_F = ctx.saved_tensors
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        programs, kernels = min(rows, GELU_PROGRAMS), _kernels()
        x_gradient, sums_1PF = torch.empty_like(x), torch.empty(1, programs, size, dtype=torch.float32, device=x.device)
        kernels.bias_gelu_gradients[programs, -(-size // kernels.BLOCK)](
            gradients[0].contiguous(), x, bias_F, x_gradient, sums_1PF, rows, size, BLOCK=kernels.BLOCK
        )
        return x_gradient, sum_parts(sums_1PF, bias_F.dtype)[0]


def sum_parts(parts_KPE: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [K, E] of the P parts that programs of a kernel have written, in a fixed order, rounded once."""
    vectors, programs, size = parts_KPE.shape
    sums_KE = torch.empty(vectors, size, dtype=dtype, device=parts_KPE.device)
    _kernels().sum_parts[vectors, -(-size // 64)](parts_KPE, sums_KE, programs, size, ROWS=32, COLUMNS=64)
    return sums_KE


def _kernels() -> Any:
    """Return the module of the kernels; imported at first use, since the CPU build of torch comes without Triton."""
    from pmlm_dist.model import elementwise_kernels

    return elementwise_kernels


def _power_of_two(size: int) -> int:
    """Return the next power of two: the width of a kernel's row."""
    return 1 << (size - 1).bit_length()
