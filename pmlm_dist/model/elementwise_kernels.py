"""Triton kernels of the slot-by-slot parts of a layer (`elementwise.py`).

Legend: N rows, E hidden size, F width of a GELU, P programs; `WIDTH` is E rounded up to a power of two.
"""

# pyright: reportUnknownMemberType=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

BLOCK = 1024
"""Columns that a program of a GELU holds."""


@triton.jit
def _kept(values, seed, row, dropout, WIDTH: tl.constexpr):
    """`values` of a row after dropout: zero, or divided by 1 - `dropout`."""
    return tl.where(tl.rand(seed + row, tl.arange(0, WIDTH)) >= dropout, values / (1.0 - dropout), 0.0)


@triton.jit
def _loaded(pointer, cells, inside):
    """Values in fp32; zero outside."""
    return tl.load(pointer + cells, inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, cells, values, inside):
    tl.store(pointer + cells, values.to(pointer.dtype.element_ty), inside)


@triton.jit
def sum_parts(parts_ptr, out_ptr, programs, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [.., size] of `parts` [.., P, size] in the precision of `out`: a block of columns of one vector."""
    parts_ptr += tl.program_id(0) * programs * size
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, sums = columns < size, tl.zeros([COLUMNS], tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        cells = rows[:, None] * size + columns[None, :]
        sums += tl.sum(_loaded(parts_ptr, cells, (rows < programs)[:, None] & inside[None, :]), 0)
    _store(out_ptr + tl.program_id(0) * size, columns, sums, inside)


@triton.jit(do_not_specialize=["seed"])
def residual_norm(
    x_ptr, update_ptr, update_bias_ptr, weight_ptr, bias_ptr, seed, out_ptr, z_ptr, statistics_ptr, rows, size, eps,
    dropout, HAS_DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: z = x + dropout(update + its bias), its LayerNorm; mean and 1 / deviation into `statistics` [2, N]."""
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside, cells = columns < size, tl.program_id(0).to(tl.int64) * size + columns
    update = _loaded(update_ptr, cells, inside) + _loaded(update_bias_ptr, columns, inside)
    if HAS_DROPOUT:
        update = _kept(update, seed, row, dropout, WIDTH)
    # Rounded as it is saved, so that both directions see the same.
    z = (_loaded(x_ptr, cells, inside) + update).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + cells, z, inside)
    z = z.to(tl.float32)
    mean = tl.sum(z, 0) / size
    centred = tl.where(inside, z - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    out = centred * scale * _loaded(weight_ptr, columns, inside) + _loaded(bias_ptr, columns, inside)
    _store(out_ptr, cells, out, inside)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + rows + row, scale)


@triton.jit(do_not_specialize=["seed"])
def residual_norm_gradients(
    gradient_ptr, other_gradient_ptr, z_ptr, weight_ptr, statistics_ptr, seed, z_gradient_ptr, update_gradient_ptr,
    sums_ptr, rows, size, dropout, HAS_DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of one program; sums of those of update bias, weight and bias into `sums` [3, P, E]."""
    program, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, WIDTH)
    inside = columns < size
    weight = _loaded(weight_ptr, columns, inside)
    weight_sum, bias_sum = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    update_sum = tl.zeros([WIDTH], tl.float32)
    for row in range(program, rows, programs):
        cells = tl.cast(row, tl.int64) * size + columns
        gradient, z = _loaded(gradient_ptr, cells, inside), _loaded(z_ptr, cells, inside)
        if other_gradient_ptr is not None:
            gradient += _loaded(other_gradient_ptr, cells, inside)
        scale = tl.load(statistics_ptr + rows + row)
        normalized = tl.where(inside, (z - tl.load(statistics_ptr + row)) * scale, 0.0)
        weight_sum += gradient * normalized
        bias_sum += gradient
        gradient *= weight
        mean, projection = tl.sum(gradient, 0) / size, tl.sum(gradient * normalized, 0) / size
        gradient = tl.where(inside, scale * (gradient - mean - normalized * projection), 0.0)
        _store(z_gradient_ptr, cells, gradient, inside)
        if HAS_DROPOUT:
            gradient = _kept(gradient, seed, row, dropout, WIDTH)
            _store(update_gradient_ptr, cells, gradient, inside)
        update_sum += gradient
    tl.store(sums_ptr + program * size + columns, update_sum, inside)
    tl.store(sums_ptr + (programs + program) * size + columns, weight_sum, inside)
    tl.store(sums_ptr + (2 * programs + program) * size + columns, bias_sum, inside)


@triton.jit
def _normal_distribution(x):
    """Probability that a standard normal variable is below x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def bias_gelu(x_ptr, bias_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """gelu(x + bias) of a block of columns of one row."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, cells = columns < size, tl.program_id(0).to(tl.int64) * size + columns
    x = _loaded(x_ptr, cells, inside) + _loaded(bias_ptr, columns, inside)
    _store(out_ptr, cells, x * _normal_distribution(x), inside)


@triton.jit
def bias_gelu_gradients(gradient_ptr, x_ptr, bias_ptr, x_gradient_ptr, sums_ptr, rows, size, BLOCK: tl.constexpr):
    """Gradients of a block of columns of one program's rows, and their sums into `sums` [P, F]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    bias, sums = _loaded(bias_ptr, columns, inside), tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        cells = tl.cast(row, tl.int64) * size + columns
        x = _loaded(x_ptr, cells, inside) + bias
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        gradient = _loaded(gradient_ptr, cells, inside) * (_normal_distribution(x) + x * density)
        _store(x_gradient_ptr, cells, gradient, inside)
        sums += gradient
    tl.store(sums_ptr + program * size + columns, sums, inside)
