"""Triton kernels of attention under the visibility rule, with relative bias and dropout (`triton_attention.py`).

    block_lists      which blocks of pairs hold a visible one: those that need no rule, those that need it
    attend           output and log-sum-exp of a block of queries
    query_gradients  gradient of a block of queries; sums of the score gradients by run of distances
    key_gradients    gradients of a block of keys and values

No matrix over all pairs exists, and every sum has one order: equal inputs give equal bits. Gradients have the strides
of queries, keys and values. A *run* is an interval of distances with one bias, that is one bucket. Scores are in units
of log 2, since the hardware computes powers of two.

Legend: B batch, H heads of this rank, D head size, Q queries, T keys, N distances, R runs, QB and KB blocks of queries
and of keys; `_BLOCK` the size of a block.
"""


# pyright: reportUnknownMemberType=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

INVISIBLE = -(2**31)
"""Order of a key that no query attends to: padding, unused slots, and what lies beyond the last slot."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_INVISIBLE = tl.constexpr(INVISIBLE)
_NO_SCORE = tl.constexpr(-1e30)
"""Maximum of no scores: finite, so that its difference from itself is zero."""


@triton.jit
def _visible(q_order, k_order):
    """`masking/visibility.py::visible`, which Triton cannot compile for its annotations."""
    is_text_key = k_order >= 0
    from_text = (q_order >= 0) & is_text_key & (k_order <= q_order)
    from_pseudo = (q_order < 0) & ((is_text_key & (k_order < -q_order)) | (k_order == q_order))
    return from_text | from_pseudo


@triton.jit
def block_lists(
    q_order_ptr, k_order_ptr, lists_ptr, counts_ptr, num_queries, num_keys, Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """For each block of queries the key blocks with a visible pair (`OF_KEYS`: the query blocks of each key block).

    A row of `lists` [B, blocks, blocks of the other side] holds those with visible pairs only from its start, and those
    with invisible ones as well from its end; `counts` [B, blocks, 2] says how many.
    """
    own, sample = tl.program_id(0), tl.program_id(1)
    others = tl.cdiv(num_queries if OF_KEYS else num_keys, Q_BLOCK if OF_KEYS else K_BLOCK)
    row = sample * tl.num_programs(0) + own
    full, partial = 0, 0
    for other in range(others):
        q_block, k_block = (other, own) if OF_KEYS else (own, other)
        rows, columns = q_block * Q_BLOCK + tl.arange(0, Q_BLOCK), k_block * K_BLOCK + tl.arange(0, K_BLOCK)
        q_order = tl.load(q_order_ptr + sample * num_queries + rows, rows < num_queries, other=0)
        k_order = tl.load(k_order_ptr + sample * num_keys + columns, columns < num_keys, other=_INVISIBLE)
        seen = _visible(q_order[:, None], k_order[None, :]).to(tl.int32)
        seen = tl.where((rows < num_queries)[:, None], seen, 0)  # rows beyond the last query need no block
        count = tl.sum(tl.sum(seen, 1), 0)
        is_full = count == Q_BLOCK * K_BLOCK
        is_partial = (count > 0) & (count < Q_BLOCK * K_BLOCK)
        tl.store(lists_ptr + row * others + full, other, is_full)
        tl.store(lists_ptr + row * others + others - 1 - partial, other, is_partial)
        full += is_full.to(tl.int32)
        partial += is_partial.to(tl.int32)
    tl.store(counts_ptr + 2 * row, full)
    tl.store(counts_ptr + 2 * row + 1, partial)


@triton.jit
def _rows(
    pointer, bias_ptr, first, count, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr = 0
):
    """Rows `first`.. of a tensor of `count` rows of HEAD_DIM values, from `OFFSET` on, plus a bias: [BLOCK, HEAD_DIM].

    `bias_ptr` None: no bias. Beyond the last row they are zero.
    """
    rows, columns = first + tl.arange(0, BLOCK), OFFSET + tl.arange(0, HEAD_DIM)
    address = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(address, (rows < count)[:, None], other=0.0)
    if bias_ptr is not None:
        values = tl.where((rows < count)[:, None], values + tl.load(bias_ptr + columns)[None, :], 0.0).to(values.dtype)
    return values


@triton.jit
def _store_rows(pointer, values, first, count, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    address = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), (rows < count)[:, None])


@triton.jit
def _slots(pointer, first, count, BLOCK: tl.constexpr, BEYOND: tl.constexpr):
    """Values of the slots `first`.. of a sample: [BLOCK]; `BEYOND` after the last."""
    slots = first + tl.arange(0, BLOCK)
    return tl.load(pointer + slots, slots < count, other=BEYOND)


@triton.jit
def _of_slots(order_ptr, position_ptr, sample, first, count, BLOCK: tl.constexpr, ORDER_BEYOND: tl.constexpr):
    """Order and position of the slots `first`.. of a sample."""
    order = _slots(order_ptr + sample * count, first, count, BLOCK, ORDER_BEYOND)
    return order, _slots(position_ptr + sample * count, first, count, BLOCK, 0)


@triton.jit
def _own_list(counts_ptr, lists_ptr, sample, size):
    """Counts and list (see `block_lists`) of this program's block."""
    row = sample * tl.num_programs(0) + tl.program_id(0)
    return counts_ptr + 2 * row, lists_ptr + row * size


@triton.jit
def _listed(lists_ptr, number, size, RULE: tl.constexpr):
    """Block `number` of those that need the rule, which a list holds from its end, or of the others."""
    return tl.load(lists_ptr + (size - 1 - number if RULE else number))


@triton.jit
def _scores(
    q, k, distance, bias_ptr, reach, q_order, k_order, scale, HAS_BIAS: tl.constexpr, RULE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [queries, keys] in units of log 2; minus infinity where the rule forbids a pair."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2_E)
    if HAS_BIAS:
        cell = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        scores += tl.load(bias_ptr + cell) * _LOG2_E
    if RULE:
        scores = tl.where(_visible(q_order[:, None], k_order[None, :]), scores, float("-inf"))
    return scores


@triton.jit
def _kept(values, seed, first_row, first_column, num_keys, dropout, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr):
    """`values` of a block of pairs after dropout: zero, or divided by 1 - `dropout`."""
    rows, columns = first_row + tl.arange(0, Q_BLOCK), first_column + tl.arange(0, K_BLOCK)
    drawn = tl.rand(seed, rows[:, None] * num_keys + columns[None, :])
    return tl.where(drawn >= dropout, values / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=["seed"])
def attend(
    q_ptr, kv_ptr, q_bias_ptr, kv_bias_ptr, out_ptr, lse_ptr, q_order_ptr, k_order_ptr, q_position_ptr,
    k_position_ptr, bias_ptr, seed, lists_ptr, counts_ptr, num_queries, num_keys, num_heads, q_row, q_sample, q_head,
    kv_row, kv_sample, kv_head,
    reach, scale, dropout, HEAD_DIM: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mixed values of a block of queries into `out` [Q, B, H, D], log2 of the sum of their exponentials into `lse`."""
    block, sample, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    if q_bias_ptr is not None:
        q_bias_ptr += head * HEAD_DIM
        kv_bias_ptr += 2 * head * HEAD_DIM
    first, key_blocks = block * Q_BLOCK, tl.cdiv(num_keys, K_BLOCK)
    q = _rows(q_ptr + sample * q_sample + head * q_head, q_bias_ptr, first, num_queries, q_row, HEAD_DIM, Q_BLOCK)
    q_order, q_position = _of_slots(q_order_ptr, q_position_ptr, sample, first, num_queries, Q_BLOCK, 0)
    k_ptr = kv_ptr + sample * kv_sample + head * kv_head
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    seed += tl.program_id(1)
    counts_ptr, lists_ptr = _own_list(counts_ptr, lists_ptr, sample, key_blocks)
    mixed = tl.zeros([Q_BLOCK, HEAD_DIM], tl.float32)
    highest = tl.full([Q_BLOCK], _NO_SCORE, tl.float32)
    total = tl.zeros([Q_BLOCK], tl.float32)
    for RULE in tl.static_range(2):
        for number in range(tl.load(counts_ptr + RULE)):
            k_first = _listed(lists_ptr, number, key_blocks, RULE) * K_BLOCK
            k = _rows(k_ptr, kv_bias_ptr, k_first, num_keys, kv_row, HEAD_DIM, K_BLOCK)
            k_order, k_position = _of_slots(k_order_ptr, k_position_ptr, sample, k_first, num_keys, K_BLOCK, _INVISIBLE)
            distance = k_position[None, :] - q_position[:, None]
            scores = _scores(q, k, distance, bias_ptr, reach, q_order, k_order, scale, HAS_BIAS, RULE, PRECISION)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            factor = tl.exp2(highest - new_highest)
            weights = tl.exp2(scores - new_highest[:, None])
            highest, total = new_highest, total * factor + tl.sum(weights, 1)
            if HAS_DROPOUT:
                weights = _kept(weights, seed, first, k_first, num_keys, dropout, Q_BLOCK, K_BLOCK)
            v = _rows(k_ptr, kv_bias_ptr, k_first, num_keys, kv_row, HEAD_DIM, K_BLOCK, HEAD_DIM)
            mixed = tl.dot(weights.to(v.dtype), v, mixed * factor[:, None], input_precision=PRECISION)
    mixed /= total[:, None]
    row_stride = tl.num_programs(1) * HEAD_DIM  # B * H * D: `out` is contiguous
    _store_rows(out_ptr + tl.program_id(1) * HEAD_DIM, mixed, first, num_queries, row_stride, HEAD_DIM, Q_BLOCK)
    rows = first + tl.arange(0, Q_BLOCK)
    tl.store(lse_ptr + tl.program_id(1) * num_queries + rows, highest + tl.log2(total), rows < num_queries)


@triton.jit
def _part(sample, head, num_heads):
    """Row of this program's sums in [H, B, blocks, ...]."""
    samples = tl.num_programs(1) // num_heads
    return (head * samples + sample) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _by_run(gradients, distance, run_ptr, start_ptr, nearest, farthest, reach, RUNS: tl.constexpr):
    """Sums [RUNS] of the score gradients of a block by run of their distance, which lies in `nearest`..`farthest`."""
    runs = tl.arange(0, RUNS)
    low = tl.load(run_ptr + tl.minimum(tl.maximum(nearest, -reach), reach) + reach)
    high = tl.load(run_ptr + tl.minimum(tl.maximum(farthest, -reach), reach) + reach)
    sums = tl.where(runs == low, tl.sum(tl.sum(gradients, 1), 0), 0.0)
    for run in tl.static_range(1, RUNS):  # unrolled: a loop in a loop would keep the outer one from being pipelined
        if (run > low) & (run <= high):
            # The sum of all distances from the run's first one on: it belongs to this run, no longer to the one before.
            beyond = tl.sum(tl.sum(tl.where(distance >= tl.load(start_ptr + run), gradients, 0.0), 1), 0)
            sums += tl.where(runs == run, beyond, 0.0) - tl.where(runs == run - 1, beyond, 0.0)
    return sums


@triton.jit(do_not_specialize=["seed"])
def query_gradients(
    q_ptr, kv_ptr, q_bias_ptr, kv_bias_ptr, out_ptr, out_gradient_ptr, lse_ptr, delta_ptr, q_gradient_ptr,
    q_bias_sums_ptr, run_sums_ptr, q_order_ptr, k_order_ptr, q_position_ptr, k_position_ptr, bias_ptr, run_ptr,
    start_ptr, seed, lists_ptr, counts_ptr,
    num_queries, num_keys, num_heads, q_row, q_sample, q_head, kv_row, kv_sample, kv_head, reach, scale, dropout,
    HEAD_DIM: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, RUNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, the sums `run_sums` [H, B, QB, R], and `delta` [B, H, Q] for `key_gradients`.

    delta = sum(out * gradient of out); the gradient of a score is weight * (gradient of the weight - delta).
    """
    block, sample, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    if q_bias_ptr is not None:
        q_bias_ptr += head * HEAD_DIM
        kv_bias_ptr += 2 * head * HEAD_DIM
    first, key_blocks = block * Q_BLOCK, tl.cdiv(num_keys, K_BLOCK)
    row_stride, offset = tl.num_programs(1) * HEAD_DIM, tl.program_id(1) * HEAD_DIM
    q = _rows(q_ptr + sample * q_sample + head * q_head, q_bias_ptr, first, num_queries, q_row, HEAD_DIM, Q_BLOCK)
    out = _rows(out_ptr + offset, None, first, num_queries, row_stride, HEAD_DIM, Q_BLOCK)
    out_gradient = _rows(out_gradient_ptr + offset, None, first, num_queries, row_stride, HEAD_DIM, Q_BLOCK)
    delta = tl.sum(out.to(tl.float32) * out_gradient.to(tl.float32), 1)
    rows = first + tl.arange(0, Q_BLOCK)
    tl.store(delta_ptr + tl.program_id(1) * num_queries + rows, delta, rows < num_queries)
    lse = _slots(lse_ptr + tl.program_id(1) * num_queries, first, num_queries, Q_BLOCK, float("inf"))
    q_order, q_position = _of_slots(q_order_ptr, q_position_ptr, sample, first, num_queries, Q_BLOCK, 0)
    k_ptr = kv_ptr + sample * kv_sample + head * kv_head
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    seed += tl.program_id(1)
    counts_ptr, lists_ptr = _own_list(counts_ptr, lists_ptr, sample, key_blocks)
    q_gradient = tl.zeros([Q_BLOCK, HEAD_DIM], tl.float32)
    run_sums = tl.zeros([RUNS], tl.float32)
    for RULE in tl.static_range(2):
        for number in range(tl.load(counts_ptr + RULE)):
            k_first = _listed(lists_ptr, number, key_blocks, RULE) * K_BLOCK
            k = _rows(k_ptr, kv_bias_ptr, k_first, num_keys, kv_row, HEAD_DIM, K_BLOCK)
            k_order, k_position = _of_slots(k_order_ptr, k_position_ptr, sample, k_first, num_keys, K_BLOCK, _INVISIBLE)
            distance = k_position[None, :] - q_position[:, None]
            scores = _scores(q, k, distance, bias_ptr, reach, q_order, k_order, scale, HAS_BIAS, RULE, PRECISION)
            weights = tl.exp2(scores - lse[:, None])
            v = _rows(k_ptr, kv_bias_ptr, k_first, num_keys, kv_row, HEAD_DIM, K_BLOCK, HEAD_DIM)
            gradients = tl.dot(out_gradient, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                gradients = _kept(gradients, seed, first, k_first, num_keys, dropout, Q_BLOCK, K_BLOCK)
            gradients = weights * (gradients - delta[:, None])
            q_gradient = tl.dot(gradients.to(k.dtype), k, q_gradient, input_precision=PRECISION)
            if HAS_BIAS:
                nearest = tl.min(k_position, 0) - tl.max(q_position, 0)
                farthest = tl.max(k_position, 0) - tl.min(q_position, 0)
                run_sums += _by_run(gradients, distance, run_ptr, start_ptr, nearest, farthest, reach, RUNS)
    if q_bias_ptr is not None:
        sums_ptr = q_bias_sums_ptr + _part(sample, head, num_heads) * HEAD_DIM
        tl.store(sums_ptr + tl.arange(0, HEAD_DIM), tl.sum(q_gradient, 0) * scale)
    q_gradient_ptr += sample * q_sample + head * q_head
    _store_rows(q_gradient_ptr, q_gradient * scale, first, num_queries, q_row, HEAD_DIM, Q_BLOCK)
    if HAS_BIAS:
        tl.store(run_sums_ptr + _part(sample, head, num_heads) * RUNS + tl.arange(0, RUNS), run_sums)


@triton.jit(do_not_specialize=["seed"])
def key_gradients(
    q_ptr, kv_ptr, q_bias_ptr, kv_bias_ptr, out_gradient_ptr, lse_ptr, delta_ptr, kv_gradient_ptr, kv_bias_sums_ptr,
    q_order_ptr, k_order_ptr, q_position_ptr, k_position_ptr, bias_ptr, seed, lists_ptr, counts_ptr, num_queries,
    num_keys, num_heads, q_row, q_sample, q_head, kv_row, kv_sample, kv_head, reach, scale, dropout,
    HEAD_DIM: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; needs `query_gradients`' delta."""
    block, sample, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    if q_bias_ptr is not None:
        q_bias_ptr += head * HEAD_DIM
        kv_bias_ptr += 2 * head * HEAD_DIM
    first, query_blocks = block * K_BLOCK, tl.cdiv(num_queries, Q_BLOCK)
    row_stride, offset = tl.num_programs(1) * HEAD_DIM, tl.program_id(1) * HEAD_DIM
    k_ptr = kv_ptr + sample * kv_sample + head * kv_head
    k = _rows(k_ptr, kv_bias_ptr, first, num_keys, kv_row, HEAD_DIM, K_BLOCK)
    v = _rows(k_ptr, kv_bias_ptr, first, num_keys, kv_row, HEAD_DIM, K_BLOCK, HEAD_DIM)
    k_order, k_position = _of_slots(k_order_ptr, k_position_ptr, sample, first, num_keys, K_BLOCK, _INVISIBLE)
    if HAS_BIAS:
        bias_ptr += head * (2 * reach + 1)
    seed += tl.program_id(1)
    counts_ptr, lists_ptr = _own_list(counts_ptr, lists_ptr, sample, query_blocks)
    k_gradient = tl.zeros([K_BLOCK, HEAD_DIM], tl.float32)
    v_gradient = tl.zeros([K_BLOCK, HEAD_DIM], tl.float32)
    for RULE in tl.static_range(2):
        for number in range(tl.load(counts_ptr + RULE)):
            q_first = _listed(lists_ptr, number, query_blocks, RULE) * Q_BLOCK
            q = _rows(
                q_ptr + sample * q_sample + head * q_head, q_bias_ptr, q_first, num_queries, q_row, HEAD_DIM, Q_BLOCK
            )
            out_gradient = _rows(out_gradient_ptr + offset, None, q_first, num_queries, row_stride, HEAD_DIM, Q_BLOCK)
            lse = _slots(lse_ptr + tl.program_id(1) * num_queries, q_first, num_queries, Q_BLOCK, float("inf"))
            delta = _slots(delta_ptr + tl.program_id(1) * num_queries, q_first, num_queries, Q_BLOCK, 0.0)
            q_order, q_position = _of_slots(q_order_ptr, q_position_ptr, sample, q_first, num_queries, Q_BLOCK, 0)
            distance = k_position[None, :] - q_position[:, None]
            scores = _scores(q, k, distance, bias_ptr, reach, q_order, k_order, scale, HAS_BIAS, RULE, PRECISION)
            weights = tl.exp2(scores - lse[:, None])
            gradients = tl.dot(out_gradient, tl.trans(v), input_precision=PRECISION)
            kept = weights
            if HAS_DROPOUT:
                kept = _kept(weights, seed, q_first, first, num_keys, dropout, Q_BLOCK, K_BLOCK)
                gradients = _kept(gradients, seed, q_first, first, num_keys, dropout, Q_BLOCK, K_BLOCK)
            v_gradient = tl.dot(tl.trans(kept).to(q.dtype), out_gradient, v_gradient, input_precision=PRECISION)
            gradients = weights * (gradients - delta[:, None])
            k_gradient = tl.dot(tl.trans(gradients).to(q.dtype), q, k_gradient, input_precision=PRECISION)
    if kv_bias_ptr is not None:
        sums_ptr = kv_bias_sums_ptr + _part(sample, head, num_heads) * 2 * HEAD_DIM
        tl.store(sums_ptr + tl.arange(0, HEAD_DIM), tl.sum(k_gradient, 0) * scale)
        tl.store(sums_ptr + HEAD_DIM + tl.arange(0, HEAD_DIM), tl.sum(v_gradient, 0))
    kv_gradient_ptr += sample * kv_sample + head * kv_head
    _store_rows(kv_gradient_ptr, k_gradient * scale, first, num_keys, kv_row, HEAD_DIM, K_BLOCK)
    _store_rows(kv_gradient_ptr + HEAD_DIM, v_gradient, first, num_keys, kv_row, HEAD_DIM, K_BLOCK)
