"""Peak memory of one rank: the moments of a step at which it can stand highest, and what is held at each.

    forward .. loss .. head .. last layer .. top inner layer .. bottom inner layer .. embeddings .. averaging .. update
    activations grow      fall layer by layer, while gradients grow

Between two neighbouring inner layers a layer's activations go and its gradients come, so one of the two ends stands
highest. Only what torch allocates is counted; `reserved` adds what the allocator and the device's libraries hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pmlm_dist.devices import Device
from pmlm_dist.planning.activations import Activations, activations
from pmlm_dist.planning.model_states import ModelStates, Zero, model_states
from pmlm_dist.planning.parameters import embedding_parameters, head_parameters, layer_parameters, model_parameters
from pmlm_dist.planning.workload import Workload


@dataclass(frozen=True)
class Moment:
    """Bytes beyond weights and optimizer at one moment of a step."""

    name: str
    gradients: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.activations + self.head + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its highest moment."""

    moment: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    buffers: float
    reserved: float
    """Held by allocator, fragmentation included."""
    host: float
    """In the host's memory, by offloading."""
    standing: float
    """What of the allocated bytes stands between steps."""

    @property
    def allocated(self) -> float:
        """What torch has handed out."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.buffers

    @property
    def device(self) -> float:
        """What the device must have."""
        return self.allocated + self.reserved


def memory(work: Workload, zero: Zero, *, dp: int, accumulation: int, device: Device) -> Memory:
    """Peak memory of a rank that works on micro-batches `work`, `accumulation` of them a step."""
    states = model_states(work, zero, dp=dp)
    highest = max(moments(work, states, accumulation=accumulation), key=lambda moment: moment.total)
    standing = states.weights + states.optimizer + states.gradients + states.buffers
    allocated = states.weights + states.optimizer + highest.total
    host, offloaded = (states.host, 0.0) if device.is_accelerator else (0.0, states.host)
    return Memory(
        moment=highest.name,
        weights=states.weights,
        gradients=highest.gradients,
        optimizer=states.optimizer + offloaded,
        activations=highest.activations,
        head=highest.head,
        buffers=highest.buffers,
        reserved=device.slack * (allocated + offloaded),
        host=host,
        standing=standing + offloaded,
    )


def moments(work: Workload, states: ModelStates, *, accumulation: int) -> Iterator[Moment]:
    """What is held at each moment of a step's last micro-batch beyond weights and optimizer."""
    act, gradients = activations(work), _Gradients(work, states, carried=accumulation > 1)
    layers, kept = work.model.num_layers - 1, _kept_layers(work, act)
    below = act.embedding + layers * kept.inner
    encoded = below + kept.last

    def moment(name: str, *, gradients: float, activations: float, head: float = 0.0, buffers: float = 0.0) -> Moment:
        buffers += states.buffers + states.gathered
        return Moment(name, states.gradients + gradients, activations, head, buffers)

    start, head, buckets = gradients.standing, act.head + act.logits, states.buckets
    yield moment("gathering", gradients=start, activations=act.embedding + act.bias, buffers=states.gathering)
    yield moment("encoding", gradients=start, activations=encoded + act.bias)
    yield moment("loss", gradients=start, activations=encoded + act.bias_kept, head=head + act.loss_work)
    yield moment("head", gradients=start, activations=encoded + act.bias_kept, head=head + act.head_work)
    rest = below + act.bias_kept
    yield moment("last layer", gradients=gradients.head, activations=rest + act.last + act.last_work, buffers=buckets)
    for name, done in (("top", 1), ("bottom", layers)) if layers else ():
        rest = act.embedding + act.bias_kept + (layers - done) * kept.inner + act.inner
        for part, needed in (("network", act.network_work), ("attention", act.attention_work)):
            yield moment(
                f"{part} of the {name} inner layer",
                gradients=gradients.inside(done, part=part),
                activations=rest + needed + kept.again,
                buffers=buckets,
            )
    work_there = act.embedding + act.embedding_work
    yield moment("embeddings", gradients=gradients.all, activations=work_there, buffers=buckets)
    yield moment("averaging", gradients=gradients.all, activations=0.0, buffers=states.buckets + states.averaging)
    yield Moment("update", states.gradients + states.updating, buffers=states.buffers)


@dataclass(frozen=True)
class _Kept:
    """Bytes of a layer that stand until its backward pass, and of its output where that was computed again."""

    inner: float
    last: float
    again: float


def _kept_layers(work: Workload, act: Activations) -> _Kept:
    if work.model.activation_checkpointing:
        return _Kept(act.layer_input, act.last_input, act.layer_input)
    return _Kept(act.inner, act.last, 0.0)


class _Gradients:
    """Bytes of gradients when the backward pass has come so far; from the second micro-batch on all of them stand."""

    def __init__(self, work: Workload, states: ModelStates, *, carried: bool):
        size, inner = work.model.hidden_size, work.model.ffn_size
        whole = model_parameters(work).on_rank(work.tp)
        self.standing = states.carried if carried else 0.0
        self._of_number = states.grown / whole
        self._layer = layer_parameters(work.model).on_rank(work.tp)
        # The tied matrix gets its gradient first from the head.
        tied = work.vocabulary * size
        self._head = head_parameters(work).on_rank(work.tp) + tied
        self._of_part = {"network": size * inner // work.tp, "attention": (2 * size * inner + size * size) // work.tp}
        self.head = self._grown(self._head)
        self.all = self._grown(whole - embedding_parameters(work).on_rank(work.tp) + tied)

    def inside(self, done: int, *, part: str) -> float:
        """Where the last layer and `done` - 1 inner ones are done, and the next is in the midst of `part`."""
        return self._grown(self._head + done * self._layer + self._of_part[part])

    def _grown(self, numbers: float) -> float:
        return max(self.standing, self._of_number * numbers)
