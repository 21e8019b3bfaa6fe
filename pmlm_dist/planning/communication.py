"""What the ranks tell each other in a step: every large collective, its bytes, and which links they cross.

    data parallel     stage 0, 1, 2   all-reduce of the gradients, all-gather of the updated weights (not at stage 0).
                                      DeepSpeed reduces all buckets of stages 1 and 2 by all-reduce; stage 2 does so for
                                      every micro-batch
                      stage 3         all-gather of the weights and reduce-scatter of the gradients, every micro-batch
    tensor parallel   an inner layer: 2 all-reduces of [T, B, E] in the forward pass (behind attention and feed-forward
                      network), 3 in the backward pass (before queries, keys with values, feed-forward network); the
                      same on the R read slots in the last layer, where keys and values still stand for T

Ranks of a tensor-parallel group are neighbours inside a node. A ring sends 2 (n - 1) / n of the bytes from each of n
ranks in an all-reduce, half of that in an all-gather or reduce-scatter (Patarasuk and Yuan, 2009). Where a ring visits
g ranks of every node, one in g of a rank's bytes leaves the node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pmlm_dist.devices import Device
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.parameters import model_parameters, uncut_numbers
from pmlm_dist.planning.workload import Workload

_BUCKET = 500_000_000  # numbers that DeepSpeed reduces at a time where no bucket is set


@dataclass(frozen=True)
class Cluster:
    """Devices and how they are connected."""

    device: Device
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Collective:
    """A collective operation of a step."""

    purpose: str
    group: Literal["data parallel", "tensor parallel"]
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    bytes: float
    """Of the whole tensor, at one time."""
    times: int
    """In a step."""
    calls: int = 1
    """Operations that one time is cut into."""
    is_hidden: bool = False
    """Whether it runs beside the backward pass."""


@dataclass(frozen=True)
class Traffic:
    """A collective on a cluster: bytes that each device sends in a step, by link, and seconds."""

    collective: Collective
    inside: float
    """Over the node's own links."""
    outside: float
    """Over the network."""
    seconds: float


def collectives(work: Workload, zero: Zero, *, dp: int, accumulation: int) -> Iterator[Collective]:
    """The large collectives of a step."""
    if dp > 1:
        yield from _data_parallel(work, zero, accumulation)
    if work.tp > 1:
        yield from _tensor_parallel(work, accumulation)


def _data_parallel(work: Workload, zero: Zero, accumulation: int) -> Iterator[Collective]:
    numbers, w = model_parameters(work).on_rank(work.tp), work.element
    gradients = zero.communicated * numbers
    bucket = _BUCKET if zero.keeper in ("plain", "bf16") else zero.reduce_bucket
    calls = max(1, math.ceil(numbers / bucket))
    if zero.keeper == "stage 3":
        uncut = uncut_numbers(work, threshold=zero.uncut)
        stays = numbers - uncut <= zero.max_live
        times = accumulation * (1 if stays else 2)
        layers = work.model.num_layers
        yield Collective(
            "weights",
            "data parallel",
            "all-gather",
            w * (numbers - uncut),
            times,
            calls=layers,
            is_hidden=zero.overlaps,
        )
        if uncut:
            yield Collective("small weights", "data parallel", "all-gather", w * uncut, 1, calls=layers)
        yield Collective(
            "gradients", "data parallel", "reduce-scatter", gradients, accumulation, calls, is_hidden=zero.overlaps
        )
        return
    times = accumulation if zero.stage == 2 else 1
    yield Collective("gradients", "data parallel", "all-reduce", gradients, times, calls, is_hidden=zero.overlaps)
    if zero.stage:
        yield Collective("weights", "data parallel", "all-gather", w * numbers, 1)


def _tensor_parallel(work: Workload, accumulation: int) -> Iterator[Collective]:
    inner, size = work.model.num_layers - 1, work.element * work.model.hidden_size
    all_slots, read_slots = size * work.tokens, size * work.predicted_tokens
    forward = 4 if work.model.activation_checkpointing else 2
    for purpose, bytes_, times in (
        ("embeddings", all_slots, 1),
        ("inner layers", all_slots, inner * (forward + 3)),
        ("last layer", read_slots, forward + 2),
        ("last layer, keys", all_slots, 1),
        ("head", read_slots, 1),
    ):
        if times:
            yield Collective(purpose, "tensor parallel", "all-reduce", bytes_, times * accumulation)


def traffic(collective: Collective, cluster: Cluster, *, tp: int) -> Traffic:
    """Bytes and seconds of `collective` in a step on `cluster`."""
    device = cluster.device
    ranks = tp if collective.group == "tensor parallel" else cluster.gpus // tp
    in_node = tp if collective.group == "tensor parallel" else min(ranks, cluster.gpus_per_node // tp)
    rounds = 2 if collective.kind == "all-reduce" else 1
    sent = rounds * (ranks - 1) / ranks * collective.bytes
    outside = sent / in_node if ranks > in_node else 0.0
    inside = sent - outside
    on_links = inside / (device.link * device.link_share)
    on_network = outside / (device.network * device.network_share)
    waiting = collective.calls * device.latency * math.ceil(math.log2(ranks))
    times = collective.times
    return Traffic(collective, times * inside, times * outside, times * (max(on_links, on_network) + waiting))
