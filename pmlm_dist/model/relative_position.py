"""Relative position bias: one learned scalar per head and bucket of distances, shared by all layers.

Distances are differences of *position ids*, so the three slots of one predicted position are at distance 0.

Legend: B batch, H heads of this rank, N buckets or distances, S context slots, Q and K query and key slots.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from pmlm_dist.parallel.layers import sharded

NEIGHBOR_BIAS = 7.0
"""Initial bias of a neighbor: with 512 keys and equal scores it has two thirds of the attention, with 64 keys 95 %."""


def relative_bucket(distance: Tensor, *, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Bucket of each `distance` (key position - query position), any shape, int64.

    T5's bidirectional rule (Raffel et al., 2020): half of the buckets are for keys after the query. With h = buckets /
    2, e = h / 2 and a = |distance|: a if a < e, else min(h - 1, e + floor(e ln(a / e) / ln(max_distance / e))).
    """
    half = buckets // 2
    exact = half // 2

    def bucket(a: int) -> int:
        if a < exact:
            return a
        growth = exact * math.log(a / exact) / math.log(max_distance / exact)
        # Distances on a boundary (16, 32, 64 with the defaults) give a whole number, which may be rounded down.
        return min(half - 1, exact + math.floor(growth + 1e-9))

    # A table instead of the logarithm of every pair: exact, and cheaper than a transcendental function.
    table = torch.tensor([bucket(a) for a in range(max_distance + 1)], device=distance.device)
    return table[distance.abs().clamp(max=max_distance)] + half * (distance > 0)


def neighbor_bias(num_heads: int, *, buckets: int, max_distance: int) -> Tensor:
    """Bias [H, N] with which half of the heads look at one neighbor each, at distances -1, 1, -2, 2, ...; else zero.

    Of a masked language model attention must find the neighbors before anything but the frequencies of tokens can be
    learned. Adam moves a bias of zero by the learning rate in a step, so this takes thousands of steps.
    """
    distances = [sign * size for size in range(1, buckets // 4) for sign in (-1, 1)]  # with a bucket of their own
    bias_HN = torch.zeros(num_heads, buckets)
    for head, distance in zip(range((num_heads + 1) // 2), itertools.cycle(distances), strict=False):
        bucket = relative_bucket(torch.tensor(distance, device="cpu"), buckets=buckets, max_distance=max_distance)
        bias_HN[head, bucket] = NEIGHBOR_BIAS
    return bias_HN


class RelativeBias(nn.Module):
    """Table [H, N] of biases, split over tensor-parallel ranks by head."""

    bucket_N: Tensor
    """Bucket of each distance -max_distance .. max_distance."""

    def __init__(self, num_heads: int, *, buckets: int, max_distance: int, std: float, local: bool = False):
        super().__init__()
        self.max_distance = max_distance
        table = torch.empty(num_heads, buckets).normal_(0.0, std)
        if local:
            table += neighbor_bias(num_heads, buckets=buckets, max_distance=max_distance)
        self.weight = sharded(table)  # [H, N]
        # On the device with the model: a table made in every step would be copied from the host, which waits for it.
        bucket_N = relative_bucket(
            torch.arange(-max_distance, max_distance + 1), buckets=buckets, max_distance=max_distance
        )
        self.register_buffer("bucket_N", bucket_N, persistent=False)

    def by_distance(self, reach: int) -> Tensor:
        """Bias [H, 2 * reach + 1] of the distances (key position - query position) -reach .. reach, at least in fp32.

        Its gradient is a sum over all pairs of slots and all layers. In bf16 that sum would stop growing at 256 times
        its addends.
        """
        distance_N = torch.arange(-reach, reach + 1, device=self.weight.device)
        # All distances beyond `max_distance` share a bucket.
        bucket_N = self.bucket_N[distance_N.clamp_(-self.max_distance, self.max_distance).add_(self.max_distance)]
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).index_select(1, bucket_N)

    def forward(self, q_positions_BQ: Tensor, k_positions_BK: Tensor) -> Tensor:
        """Bias [H, B, Q, K] of all pairs of queries and keys; unscaled, to be added to the scaled scores."""
        # All distances beyond `max_distance` share a bucket, and the look-up clamps to it.
        return look_up(self.by_distance(self.max_distance), q_positions_BQ, k_positions_BK)

    def for_contiguous(self, length: int) -> Tensor:
        """Bias [H, S, S] of `length` = S slots at consecutive positions."""
        # Row q holds the distances -q .. S-1-q: a Toeplitz matrix, made of windows over the distances in reverse order.
        # No index per pair is needed, and the backward pass sums the diagonals.
        return self.by_distance(length - 1).unfold(1, length, 1).flip(1)


def look_up(bias_HN: Tensor, q_positions_BQ: Tensor, k_positions_BK: Tensor) -> Tensor:
    """Bias [H, B, Q, K] from `RelativeBias.by_distance`; distances beyond its reach are clamped to it."""
    reach = bias_HN.shape[1] // 2
    distance_BQK = k_positions_BK[:, None, :] - q_positions_BQ[:, :, None]
    index_BQK = distance_BQK.clamp_(-reach, reach).add_(reach)
    return bias_HN.index_select(1, index_BQK.flatten()).view(-1, *index_BQK.shape)
