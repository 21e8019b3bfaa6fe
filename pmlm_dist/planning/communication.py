"""Communication of a step: every large collective, its bytes, and the links that carry them.

    data parallel     stage 0, 1, 2   all-reduce of the gradients, all-gather of the updated weights (not at stage 0).
                                      DeepSpeed all-reduces the buckets of stages 1 and 2, at stage 2 in every
                                      micro-batch
                      stage 3         all-gather of the weights and reduce-scatter of the gradients, every micro-batch
    tensor parallel   an inner layer: 2 all-reduces of [T, B, E] in the forward pass (after attention and feed-forward
                      network), 3 in the backward pass (before queries, keys with values, feed-forward network); the
                      last layer the same on the R predicted slots, but its keys and values on T slots

Ranks of a tensor-parallel group are adjacent inside a node. In a ring all-reduce each of n ranks sends 2 (n - 1) / n of
the bytes, in an all-gather or reduce-scatter half of that (Patarasuk and Yuan, 2009). Where a ring visits g ranks of
every node, one in g of a rank's bytes leaves the node.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pmlm_dist.devices import Device
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.parameters import persistent_numbers, rank_parameters
from pmlm_dist.planning.workload import Workload

_BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time where no bucket size is set


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices."""

    device: Device
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Collective:
    """A collective operation of a step."""

    purpose: str
    group: Literal["data parallel", "tensor parallel"]
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    bytes: float
    """Of the whole tensor, once."""
    times: int
    """Repetitions in a step."""
    calls: int = 1
    """Operations (buckets) of each repetition."""
    is_hidden: bool = False
    """True if it overlaps with the backward pass."""


@dataclass(frozen=True)
class Traffic:
    """A collective on a cluster: bytes that each device sends in a step, by kind of link, and seconds."""

    collective: Collective
    inside: float
    """Bytes over links inside the node."""
    outside: float
    """Bytes over the network."""
    seconds: float


def collectives(work: Workload, zero: Zero, *, dp: int, accumulation: int) -> Iterator[Collective]:
    """The large collectives of a step."""
    if dp > 1:
        yield from _data_parallel(work, zero, accumulation)
    if work.tp > 1:
        yield from _tensor_parallel(work, accumulation)


def _data_parallel(work: Workload, zero: Zero, accumulation: int) -> Iterator[Collective]:
    numbers, w = rank_parameters(work), work.element
    gradients = zero.communicated * numbers
    bucket = _BUCKET if zero.optimizer_class == "plain" else zero.reduce_bucket
    calls = max(1, math.ceil(numbers / bucket))
    if zero.optimizer_class == "stage 3":
        persistent = persistent_numbers(work, threshold=zero.persistence_threshold)
        # A model within `max_live_parameters` stays gathered from the forward to the end of the backward pass.
        stays_gathered = numbers - persistent <= zero.max_live
        times = accumulation * (1 if stays_gathered else 2)
        layers = work.model.num_layers
        gathered = w * (numbers - persistent)
        yield Collective("weights", "data parallel", "all-gather", gathered, times, layers, is_hidden=zero.overlaps)
        if persistent:
            yield Collective("small weights", "data parallel", "all-gather", w * persistent, 1, calls=layers)
        yield Collective(
            "gradients", "data parallel", "reduce-scatter", gradients, accumulation, calls, is_hidden=zero.overlaps
        )
        return
    times = accumulation if zero.stage == 2 else 1
    if zero.optimizer_class == "bf16" and zero.overlaps:
        # The gradient of the tied matrix is complete at the end of the backward pass.
        last = gradients * min(1.0, max(bucket, rank_parameters(work, "embeddings.")) / numbers)
        yield Collective("last gradients", "data parallel", "all-reduce", last, 1)
        gradients, calls = gradients - last, max(1, math.ceil((gradients - last) / zero.communicated / bucket))
    if gradients:
        yield Collective("gradients", "data parallel", "all-reduce", gradients, times, calls, is_hidden=zero.overlaps)
    if zero.stage:
        yield Collective("weights", "data parallel", "all-gather", w * numbers, 1)


def _tensor_parallel(work: Workload, accumulation: int) -> Iterator[Collective]:
    inner, size = work.model.num_layers - 1, work.element * work.model.hidden_size
    all_slots, predicted_slots = size * work.tokens, size * work.predicted_tokens
    forward = 4 if work.model.activation_checkpointing else 2  # recomputation repeats those of the forward pass
    for purpose, bytes_, times in (
        ("embeddings", all_slots, 1),
        ("inner layers", all_slots, inner * (forward + 3)),
        ("last layer", predicted_slots, forward + 2),
        ("last layer, keys", all_slots, 1),
        ("head", predicted_slots, 1),
    ):
        if times:
            yield Collective(purpose, "tensor parallel", "all-reduce", bytes_, times * accumulation)


def traffic(collective: Collective, cluster: Cluster, *, tp: int) -> Traffic:
    """Bytes and seconds of `collective` in a step on `cluster`.

    A ring uses links and network at the same time, so the slower of the two sets the time; each call adds the latency
    of log2(ranks) rounds.
    """
    device = cluster.device
    ranks = tp if collective.group == "tensor parallel" else cluster.gpus // tp
    in_node = tp if collective.group == "tensor parallel" else min(ranks, cluster.gpus_per_node // tp)
    rounds = 2 if collective.kind == "all-reduce" else 1
    sent = rounds * (ranks - 1) / ranks * collective.bytes
    outside = sent / in_node if ranks > in_node else 0.0
    inside = sent - outside
    on_links = inside / (device.link * device.link_share)
    on_network = outside / (device.network * device.network_share)
    latency = collective.calls * device.latency * math.ceil(math.log2(ranks))
    times = collective.times
    return Traffic(collective, times * inside, times * outside, times * (max(on_links, on_network) + latency))
