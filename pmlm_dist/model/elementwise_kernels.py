"""Triton kernels of residual connection and LayerNorm (`residual_norm.py`).

Legend: N rows, E hidden size, P programs; `WIDTH` is E rounded up to a power of two.
"""

# pyright: reportUnknownMemberType=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def _kept(values, seed_ptr, row, size, dropout, WIDTH: tl.constexpr):
    """`values` of a row after dropout: zero, or divided by 1 - `dropout`."""
    drawn = tl.rand(tl.load(seed_ptr) + row, tl.arange(0, WIDTH))
    return tl.where(drawn >= dropout, values / (1.0 - dropout), 0.0)


@triton.jit
def residual_norm(
    x_ptr, update_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, z_ptr, statistics_ptr, rows, size, eps, dropout,
    HAS_DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: z = x + dropout(update), its LayerNorm, and mean and 1 / deviation into `statistics` [2, N]."""
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside, cells = columns < size, tl.program_id(0).to(tl.int64) * size + columns
    update = tl.load(update_ptr + cells, inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        update = _kept(update, seed_ptr, row, size, dropout, WIDTH)
    z = tl.load(x_ptr + cells, inside, other=0.0).to(tl.float32) + update
    z = z.to(z_ptr.dtype.element_ty)  # rounded as it is saved, so that both directions see the same
    tl.store(z_ptr + cells, z, inside)
    z = z.to(tl.float32)
    mean = tl.sum(z, 0) / size
    centred = tl.where(inside, z - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + cells, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), inside)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + rows + row, scale)


@triton.jit
def residual_norm_gradients(
    gradient_ptr, z_ptr, weight_ptr, statistics_ptr, seed_ptr, z_gradient_ptr, update_gradient_ptr, sums_ptr, rows,
    size, dropout, HAS_DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of one program: gradients of z and the update; sums of those of weight and bias into `sums` [2, P, E]."""
    program, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, WIDTH)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in range(program, rows, programs):
        cells = tl.cast(row, tl.int64) * size + columns
        gradient = tl.load(gradient_ptr + cells, inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + cells, inside, other=0.0).to(tl.float32)
        scale = tl.load(statistics_ptr + rows + row)
        normalized = tl.where(inside, (z - tl.load(statistics_ptr + row)) * scale, 0.0)
        weight_sum += gradient * normalized
        bias_sum += gradient
        gradient *= weight
        mean, projection = tl.sum(gradient, 0) / size, tl.sum(gradient * normalized, 0) / size
        gradient = scale * (gradient - mean - normalized * projection)
        tl.store(z_gradient_ptr + cells, gradient.to(z_gradient_ptr.dtype.element_ty), inside)
        if HAS_DROPOUT:
            gradient = _kept(gradient, seed_ptr, row, size, dropout, WIDTH)
            tl.store(update_gradient_ptr + cells, gradient.to(update_gradient_ptr.dtype.element_ty), inside)
    tl.store(sums_ptr + program * size + columns, weight_sum, inside)
    tl.store(sums_ptr + (programs + program) * size + columns, bias_sum, inside)
