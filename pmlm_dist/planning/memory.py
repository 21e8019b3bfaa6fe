"""Peak memory of one rank: the moments of a step at which the peak can occur, and the bytes allocated at each.

    forward .. loss .. head .. last layer .. top inner layer .. bottom inner layer .. embeddings .. averaging .. update
    activations grow      shrink layer by layer, while gradients grow

From one inner layer to the next, a layer's activations are freed and its gradients are allocated. The bytes change
linearly, so only the top and the bottom inner layer can be the peak. Only torch's allocations are counted; `reserved`
adds the overhead of the allocator and of the device's libraries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pmlm_dist.devices import Device
from pmlm_dist.planning.activations import activations
from pmlm_dist.planning.model_states import ModelStates, Zero, model_states
from pmlm_dist.planning.parameters import rank_parameters
from pmlm_dist.planning.workload import Workload


@dataclass(frozen=True)
class Moment:
    """Bytes beyond weights and optimizer states at one moment of a step."""

    name: str
    gradients: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.head + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step; `moment` names it."""

    moment: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    buffers: float
    reserved: float
    """Overhead of the allocator, including fragmentation."""
    host: float
    """In the host's memory, by offloading."""
    between_steps: float
    """Part of the allocated bytes that exists between steps."""

    @property
    def allocated(self) -> float:
        """Bytes that torch allocates."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.buffers

    @property
    def device(self) -> float:
        """Bytes that the device needs."""
        return self.allocated + self.reserved


def memory(work: Workload, zero: Zero, *, dp: int, accumulation: int, device: Device) -> Memory:
    """Peak memory of a rank with `accumulation` micro-batches `work` a step."""
    states = model_states(work, zero, dp=dp)
    peak = max(moments(work, states, accumulation=accumulation), key=lambda moment: moment.total)
    between_steps = states.weights + states.optimizer + states.gradients + states.buffers
    allocated = states.weights + states.optimizer + peak.total
    # On a CPU offloaded states are in the same memory as the rest.
    host, offloaded = (states.host, 0.0) if device.is_accelerator else (0.0, states.host)
    return Memory(
        moment=peak.name,
        weights=states.weights,
        gradients=peak.gradients,
        optimizer=states.optimizer + offloaded,
        activations=peak.activations,
        head=peak.head,
        buffers=peak.buffers,
        reserved=device.slack * (allocated + offloaded),
        host=host,
        between_steps=between_steps + offloaded,
    )


def moments(work: Workload, states: ModelStates, *, accumulation: int) -> Iterator[Moment]:
    """Bytes beyond weights and optimizer states at each moment of a step's last micro-batch."""
    act, gradients = activations(work), _Gradients(work, states, accumulates=accumulation > 1)
    layers = work.model.num_layers - 1
    recomputed = act.inner_kept if work.model.activation_checkpointing else 0.0  # the output of an inner layer
    below = act.embedding + layers * act.inner_kept
    encoded = below + act.last_kept

    def moment(name: str, *, gradients: float, activations: float, head: float = 0.0, buffers: float = 0.0) -> Moment:
        buffers += states.buffers + states.gathered
        return Moment(name, states.gradients + gradients, activations, head, buffers)

    start, head, buckets = gradients.retained, act.head + act.logits, states.buckets
    yield moment("gathering", gradients=start, activations=act.embedding + act.bias, buffers=states.gathering)
    yield moment("encoding", gradients=start, activations=encoded + act.bias)
    yield moment("loss", gradients=start, activations=encoded + act.bias_saved, head=head + act.loss_work)
    yield moment("head", gradients=start, activations=encoded + act.bias_saved, head=head + act.head_work)
    rest = below + act.bias_saved
    yield moment("last layer", gradients=gradients.head, activations=rest + act.last + act.last_work, buffers=buckets)
    for name, done in (("top", 1), ("bottom", layers)) if layers else ():
        rest = act.embedding + act.bias_saved + (layers - done) * act.inner_kept + act.inner
        for part, needed in (("network", act.network_work), ("attention", act.attention_work)):
            yield moment(
                f"{part} of the {name} inner layer",
                gradients=gradients.inside(done, part=part),
                activations=rest + needed + recomputed,
                buffers=buckets,
            )
    embedding = act.embedding + act.embedding_work
    yield moment("embeddings", gradients=gradients.all, activations=embedding, buffers=buckets)
    yield moment("averaging", gradients=gradients.all, activations=0.0, buffers=states.buckets + states.averaging)
    yield Moment("update", states.gradients + states.updating, buffers=states.buffers)


class _Gradients:
    """Bytes of gradients by progress of the backward pass; from the second micro-batch on all of them exist."""

    def __init__(self, work: Workload, states: ModelStates, *, accumulates: bool):
        size, inner = work.model.hidden_size, work.model.ffn_size
        total = rank_parameters(work)
        self.retained = states.retained_gradients if accumulates else 0.0
        self._bytes_per_number = states.backward_gradients / total
        self._layer = rank_parameters(work, "layers.0.")
        # The head computes the first gradient of the tied matrix, before any layer.
        tied = work.vocabulary * size
        self._head = rank_parameters(work, "head.") + tied
        self._parts = {"network": size * inner // work.tp, "attention": (2 * size * inner + size * size) // work.tp}
        self.head = self._bytes(self._head)
        self.all = self._bytes(total - rank_parameters(work, "embeddings.", "relative_bias.") + tied)

    def inside(self, done: int, *, part: str) -> float:
        """In the backward pass of `part` of an inner layer, after the last layer and `done` - 1 inner layers."""
        return self._bytes(self._head + done * self._layer + self._parts[part])

    def _bytes(self, numbers: float) -> float:
        return max(self.retained, self._bytes_per_number * numbers)
