"""Attention of all slots in one kernel on a GPU: visibility rule, relative bias and dropout (`triton_kernels.py`).

    order, valid --block lists--> which blocks of 64 x 64 pairs have only visible pairs, some, or none
    positions    --> distance of a pair --> bias of its bucket, added to its score

Built once per step and shared by all layers. On a CPU the kernels run in Triton's interpreter, for tests.

Legend: B batch, H heads of this rank, D head size, Q queries, T slots (all of them keys), U buckets, N distances,
R runs of distances with one bucket, rounded up to a power of two.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.elementwise import sum_parts
from pmlm_dist.model.relative_position import RelativeBias, relative_bucket

Q_BLOCK, K_BLOCK = 64, 64
"""Queries and keys of a block. Appended slots are few: blocks of 128 would compute 13 % more pairs."""


@dataclass(frozen=True)
class BlockList:
    """For each block of one side, the blocks of the other that hold a visible pair (`triton_kernels.block_lists`)."""

    lists: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Runs:
    """Intervals of distances with one bucket, for distances of -`reach`..`reach`; farther ones belong to the ends."""

    reach: int
    run_N: Tensor
    """Run of each distance, int32."""
    start_R: Tensor
    """First distance of each run, int32."""
    one_hot_RU: Tensor
    """1 where a run has a bucket, fp32, R rounded up to a power of two."""


@dataclass(frozen=True)
class BlockGroup:
    """Queries against all slots."""

    q_order_BQ: Tensor
    k_order_BT: Tensor
    q_positions_BQ: Tensor
    k_positions_BT: Tensor
    of_queries: BlockList
    of_keys: BlockList
    bias: Tensor | None
    """By head and run [H, R], in fp32: the tensor that the gradient is of. None without relative bias."""
    bias_HN: Tensor | None
    """The same by distance, for the kernels."""
    runs: Runs | None


@cache
def distance_runs(buckets: int, max_distance: int, device: torch.device) -> Runs:
    """Runs of a relative bias, on `device`."""
    distance_N = torch.arange(-max_distance, max_distance + 1)
    bucket_N = relative_bucket(distance_N, buckets=buckets, max_distance=max_distance)
    starts_N = torch.cat([torch.tensor([True]), bucket_N[1:] != bucket_N[:-1]])
    of_run = bucket_N[starts_N]
    one_hot_RU = torch.zeros(1 << (len(of_run) - 1).bit_length(), buckets)
    one_hot_RU[torch.arange(len(of_run)), of_run] = 1.0
    run_N, start_R = (starts_N.cumsum(0) - 1).int(), distance_N[starts_N].int()
    return Runs(max_distance, run_N.to(device), start_R.to(device), one_hot_RU.to(device))


def block_group(
    inputs: SlotInputs[Tensor], *, rows_BQ: Tensor | None, relative_bias: RelativeBias | None
) -> BlockGroup:
    """Group of the slots `rows_BQ` (None: all) of a batch as queries against all T slots."""
    kernels = _kernels()
    order_BT, positions_BT = inputs.order_BT.int().contiguous(), inputs.positions_BT.int().contiguous()
    k_order_BT = order_BT.masked_fill(~inputs.valid_BT, kernels.INVISIBLE)
    q_order_BQ, q_positions_BQ = order_BT, positions_BT
    if rows_BQ is not None:
        q_order_BQ, q_positions_BQ = order_BT.gather(1, rows_BQ), positions_BT.gather(1, rows_BQ)
    bias_HR, bias_HN, runs = None, None, None
    if relative_bias is not None:
        bias_HN = relative_bias.by_distance(relative_bias.max_distance).detach().float().contiguous()
        runs = distance_runs(relative_bias.weight.shape[1], relative_bias.max_distance, order_BT.device)
        bias_HR = relative_bias.weight.float() @ runs.one_hot_RU.t()
    return BlockGroup(
        q_order_BQ=q_order_BQ,
        k_order_BT=k_order_BT,
        q_positions_BQ=q_positions_BQ,
        k_positions_BT=positions_BT,
        of_queries=_block_list(q_order_BQ, k_order_BT, of_keys=False),
        of_keys=_block_list(q_order_BQ, k_order_BT, of_keys=True),
        bias=bias_HR,
        bias_HN=bias_HN,
        runs=runs,
    )


def attention_triton(
    q_QBHD: Tensor,
    kv_TBH2D: Tensor | None,
    groups: tuple[BlockGroup],
    *,
    dropout: float,
    q_bias: Tensor | None = None,
    kv_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the visible pairs: queries [Q, B, H, D], keys and values [T, B, H, 2, D].

    Or both in one tensor [T, B, 3H, D], queries first. `q_bias` [HD] and `kv_bias` [2HD] are
    added to them, if they are products without. Return the mixed values [Q, B, H, D]. `dropout`:
    probability that a weight is dropped; the numbers are drawn by pair, again in the backward pass, from a seed of
    torch's generator on the host.
    """
    (group,) = groups
    return _Attention.apply(q_QBHD, kv_TBH2D, q_bias, kv_bias, group.bias, group, dropout)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """Saves queries, keys, values, output and one number per query; weights are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_QBHD: Tensor, kv_TBH2D: Tensor | None, *others: Any) -> Tensor:
        """See `attention_triton`. `others`: biases, `group.bias` (autograd tracks arguments only), group, dropout."""
        q_bias, kv_bias, _, group, dropout = others
        ctx.is_joint = kv_TBH2D is None
        ctx.group, ctx.dropout = group, dropout
        ctx.seed = int(torch.randint(2**30, ())) if dropout else 0
        tensors = [t.contiguous() for t in (q_QBHD, kv_TBH2D) if t is not None]
        q_QBHD, kv_TBH2D = _separate(tensors)
        queries, batch, heads, _ = q_QBHD.shape
        out_QBHD = torch.empty(q_QBHD.shape, dtype=q_QBHD.dtype, device=q_QBHD.device)
        lse_BHQ = torch.empty(batch, heads, queries, dtype=torch.float32, device=q_QBHD.device)
        _kernels().attend[-(-queries // Q_BLOCK), batch * heads](
            q_QBHD, kv_TBH2D, q_bias, kv_bias, out_QBHD, lse_BHQ, *_pairs(group), ctx.seed, group.of_queries.lists,
            group.of_queries.counts, *_sizes(q_QBHD, kv_TBH2D, group), dropout, **_constants(q_QBHD, group, dropout),
        )  # fmt: skip
        ctx.save_for_backward(out_QBHD, lse_BHQ, q_bias, kv_bias, *tensors)
        return out_QBHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of queries, keys and values, their biases, and the bias of scores."""
        out_QBHD, lse_BHQ, q_bias, kv_bias, *tensors = ctx.saved_tensors
        out_gradient_QBHD = gradients[0].contiguous()
        group, dropout, kernels = ctx.group, ctx.dropout, _kernels()
        q_QBHD, kv_TBH2D = _separate(tensors)
        of_tensors = [torch.empty_like(tensor) for tensor in tensors]
        q_gradient, kv_gradient = _separate(of_tensors)
        queries, batch, heads, head_dim = q_QBHD.shape
        q_blocks, k_blocks = -(-queries // Q_BLOCK), -(-len(kv_TBH2D) // K_BLOCK)
        runs = group.runs
        num_runs = 1 if runs is None else len(runs.one_hot_RU)

        def parts(blocks: int, width: int, *, needed: bool) -> Tensor | None:
            """Sums of each program, to be added up over samples and blocks."""
            return lse_BHQ.new_empty(heads, batch * blocks, width) if needed else None

        run_sums = parts(q_blocks, num_runs, needed=runs is not None)
        q_sums = parts(q_blocks, head_dim, needed=q_bias is not None)
        kv_sums = parts(k_blocks, 2 * head_dim, needed=kv_bias is not None)
        delta_BHQ = torch.empty_like(lse_BHQ)
        sizes, constants = _sizes(q_QBHD, kv_TBH2D, group), _constants(q_QBHD, group, dropout)
        tables = (None, None) if runs is None else (runs.run_N, runs.start_R)
        kernels.query_gradients[q_blocks, batch * heads](
            q_QBHD, kv_TBH2D, q_bias, kv_bias, out_QBHD, out_gradient_QBHD, lse_BHQ, delta_BHQ, q_gradient, q_sums,
            run_sums, *_pairs(group), *tables, ctx.seed, group.of_queries.lists, group.of_queries.counts, *sizes,
            dropout, RUNS=num_runs, **constants,
        )  # fmt: skip
        kernels.key_gradients[k_blocks, batch * heads](
            q_QBHD, kv_TBH2D, q_bias, kv_bias, out_gradient_QBHD, lse_BHQ, delta_BHQ, kv_gradient, kv_sums,
            *_pairs(group), ctx.seed, group.of_keys.lists, group.of_keys.counts, *sizes, dropout, **constants,
        )  # fmt: skip
        of_biases = [part if part is None else sum_parts(part, out_QBHD.dtype).flatten() for part in (q_sums, kv_sums)]
        of_scores = None if run_sums is None else sum_parts(run_sums, torch.float32)
        return of_tensors[0], None if ctx.is_joint else of_tensors[1], *of_biases, of_scores, None, None


def _separate(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Queries [Q, B, H, D], keys and values [T, B, H, 2, D]: as they are, or views of one tensor [T, B, 3H, D]."""
    if len(tensors) == 2:
        return tensors[0], tensors[1]
    heads = tensors[0].shape[2] // 3
    return tensors[0][:, :, :heads], tensors[0][:, :, heads:].unflatten(2, (heads, 2))


def _pairs(group: BlockGroup) -> tuple[Tensor | None, ...]:
    """Arguments of a kernel that describe the slots."""
    return group.q_order_BQ, group.k_order_BT, group.q_positions_BQ, group.k_positions_BT, group.bias_HN


def _sizes(q_QBHD: Tensor, kv_TBH2D: Tensor, group: BlockGroup) -> tuple[float, ...]:
    """Arguments of a kernel that describe the tensors: sizes, strides, reach of the bias, scale."""
    reach = group.runs.reach if group.runs else 0
    head_dim = q_QBHD.shape[-1]
    return (
        len(q_QBHD), len(kv_TBH2D), q_QBHD.shape[2], *q_QBHD.stride()[:3], *kv_TBH2D.stride()[:3], reach, head_dim**-0.5
    )  # fmt: skip


def _constants(q_QBHD: Tensor, group: BlockGroup, dropout: float) -> dict[str, Any]:
    """Constants that a kernel is compiled for."""
    return {
        "HEAD_DIM": q_QBHD.shape[-1],
        "Q_BLOCK": Q_BLOCK,
        "K_BLOCK": K_BLOCK,
        "HAS_BIAS": group.runs is not None,
        "HAS_DROPOUT": dropout > 0,
        # fp32 is computed as fp32, not rounded to TF32.
        "PRECISION": "ieee" if q_QBHD.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }


def _block_list(q_order_BQ: Tensor, k_order_BT: Tensor, *, of_keys: bool) -> BlockList:
    (batch, queries), slots = q_order_BQ.shape, k_order_BT.shape[1]
    q_blocks, k_blocks = -(-queries // Q_BLOCK), -(-slots // K_BLOCK)
    own, others = (k_blocks, q_blocks) if of_keys else (q_blocks, k_blocks)
    lists, counts = (q_order_BQ.new_empty(batch, own, size, dtype=torch.int32) for size in (others, 2))
    _kernels().block_lists[own, batch](
        q_order_BQ, k_order_BT, lists, counts, queries, slots, Q_BLOCK=Q_BLOCK, K_BLOCK=K_BLOCK, OF_KEYS=of_keys
    )
    return BlockList(lists, counts)


@cache
def _kernels() -> Any:
    """The module of the kernels; imported at first use, since the CPU build of torch comes without Triton."""
    from pmlm_dist.model import triton_kernels

    return triton_kernels
