"""Bytes of activations: what each part of the model keeps for its backward pass, and what it needs for a moment there.

Counted tensor by tensor, as the layers in `model/` make them:

    inner layer   norm inputs 2, norm outputs 2                       [T, B, E] each
                  queries, keys, values, mixed values                 [T, B, E / t] each
                  GELU's input and output                             [T, B, F / t] each
                  probabilities of all scored pairs                   [H / t, B, Q, K], and which dropout kept
    last layer    keys and values for T slots, the rest for the R read ones
    head          three times [R, B, E] and one buffer of logits [R, B, V / t]
    attention     biases of the scores and where they were looked up, shared by all layers

With activation checkpointing a layer keeps its input alone and the rest lives while it is recomputed. Legend:
`workload.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmlm_dist.planning.workload import Workload

_INDEX, _FULL, _FLAG = 8, 4, 1
"""Bytes of an int64, of an fp32 number, of a bool."""
# Numbers that attention and loss work on at a time (model/fused_attention.py, parallel/cross_entropy.py).
_PART_ON_CPU, _LOGITS_ON_ACCELERATOR = 2**18, 2**27
_SLACK_OF_NORM = 2 * _FULL  # mean and reciprocal deviation of a token


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    embedding: float
    """Kept by the embeddings."""
    bias: float
    """The attention's biases, until the last layer is done."""
    bias_kept: float
    """What of them is kept for the backward pass."""
    inner: float
    """Kept by an inner layer, its output included."""
    last: float
    """Kept by the last layer."""
    head: float
    """Kept by the head, without its logits."""
    logits: float
    """Kept of the logits."""
    layer_input: float
    """What of an inner layer stays under activation checkpointing."""
    last_input: float
    """What of the last layer stays under activation checkpointing."""
    loss_work: float
    """Beyond what is kept, while the loss is taken."""
    head_work: float
    """Beyond what is kept, in the head's backward pass."""
    network_work: float
    """Beyond what is kept, in the feed-forward network's backward pass; what is freed by then counts against it."""
    attention_work: float
    """The same of attention, including the gradient of the bias."""
    last_work: float
    """The same of the last layer's attention."""
    embedding_work: float
    """Beyond the embeddings' own, in their backward pass."""


def activations(work: Workload) -> Activations:
    """What a micro-batch of `work` keeps and needs."""
    model, a = work.model, work.element
    inner_layer, last_layer = (
        _Layer(work, work.tokens, work.inner_pairs),
        _Layer(work, work.predicted_tokens, work.last_pairs),
    )
    last_kept = last_layer.kept + a * (2 * work.tokens * inner_layer.own + last_layer.wide)
    logits = a * work.predicted_tokens * work.vocabulary
    token_gradient = a * work.vocabulary * model.hidden_size
    return Activations(
        embedding=inner_layer.norm + a * inner_layer.wide + inner_layer.dropped,
        bias=_bias(work),
        bias_kept=_bias_kept(work),
        inner=inner_layer.kept + a * 2 * work.tokens * inner_layer.own,
        last=last_kept,
        head=last_layer.norm + 2 * a * last_layer.wide,
        logits=logits,
        layer_input=a * inner_layer.wide,
        last_input=a * last_layer.wide,
        loss_work=0.0 if a == _FULL else _FULL * min(logits / a, _logits_at_a_time(work)),
        head_work=token_gradient + (a + 2 * _FULL) * last_layer.wide,
        network_work=a * (inner_layer.hidden - inner_layer.wide) + a * sum(bias_numbers(work)),
        attention_work=_attention_work(work, inner_layer) + _bias_gradient(work),
        last_work=_attention_work(work, last_layer)
        + _last_bias_gradient(work)
        + a * (4 * work.tokens * inner_layer.own + inner_layer.wide),
        embedding_work=token_gradient + 2 * a * inner_layer.wide,
    )


@dataclass(frozen=True)
class _Layer:
    """A layer whose queries are `tokens` slots; keys and values are counted by the caller."""

    work: Workload
    tokens: int
    pairs: int

    @property
    def own(self) -> int:
        """Width of this rank's heads together: E / t."""
        return self.work.model.hidden_size // self.work.tp

    @property
    def wide(self) -> int:
        """Numbers of a tensor [tokens, E]."""
        return self.tokens * self.work.model.hidden_size

    @property
    def hidden(self) -> int:
        """Numbers of a tensor [tokens, F / t]."""
        return self.tokens * self.work.model.ffn_size // self.work.tp

    @property
    def norm(self) -> float:
        """Bytes that a LayerNorm keeps: its input, mean and deviation of each token."""
        return self.work.element * self.wide + _SLACK_OF_NORM * self.tokens

    @property
    def dropped(self) -> float:
        """Bytes that one dropout keeps: a flag a number, or on a CPU the factors."""
        if not self.work.model.hidden_dropout:
            return 0.0
        return (_FLAG if self.work.on_accelerator else self.work.element) * self.wide

    @property
    def probabilities(self) -> float:
        """Bytes that attention keeps of the scored pairs; FlexAttention keeps a number a query."""
        if self.work.model.attention == "flex":
            return _FULL * self.tokens * self.work.heads
        kept = self.work.element
        if self.work.model.attention_dropout:
            kept += _FLAG if self.work.model.attention == "fused" else 2 * self.work.element
        return kept * self.pairs

    @property
    def kept(self) -> float:
        """Bytes kept, without keys and values."""
        numbers = 2 * self.wide + 2 * self.tokens * self.own + 2 * self.hidden
        return self.work.element * numbers + 2 * self.norm + 2 * self.dropped + self.probabilities


def _attention_work(work: Workload, layer: _Layer) -> float:
    """Gradients of q, k, v and of the mixed values, each twice (by head and by slot), of the scores and of the bias.

    By then the feed-forward network has given back its tensors and the first norm its input.
    """
    a, own = work.element, layer.tokens * layer.own
    gradients = a * (layer.wide + 2 * own + 2 * 3 * own)
    given_back = 2 * layer.norm + a * (2 * layer.wide + own + 2 * layer.hidden) + 2 * layer.dropped
    return gradients - given_back + _scores_work(work, layer.pairs)


def _scores_work(work: Workload, pairs: int) -> float:
    """Gradients of the scores that are worked on at a time; an accelerator takes a whole group, the larger of two."""
    if work.model.attention == "flex":
        return 0.0
    copies = 2 if work.model.attention_dropout else 1
    if work.model.attention == "reference":
        return work.element * 2 * pairs
    part = max(pairs * work.appended * work.slots / (work.context**2 + work.appended * work.slots), pairs / 2)
    return work.element * copies * (part if work.on_accelerator else min(part, _PART_ON_CPU))


def bias_numbers(work: Workload) -> tuple[float, float]:
    """Numbers of the biases that want a gradient: what the samples share, and what they do not."""
    if work.model.attention == "flex" or not work.model.relative_bias:
        return 0.0, 0.0
    if work.model.attention == "reference":
        return 0.0, work.heads * work.micro_batch * work.slots**2
    return work.heads * work.context**2, work.heads * work.micro_batch * work.appended * work.slots


def _bias(work: Workload) -> float:
    """All biases; without relative positions only what is forbidden, the same for all heads."""
    if work.model.attention == "flex":
        return 0.0
    dense = work.model.attention == "reference"
    if not work.model.relative_bias:
        return work.element * work.micro_batch * (work.slots if dense else work.appended) * work.slots
    rows = work.last_pairs if dense else work.heads * work.micro_batch * work.predictions * work.context
    return work.element * (sum(bias_numbers(work)) + rows) + _looked_up(work)


def _bias_kept(work: Workload) -> float:
    """Where in the table the biases were looked up; activation checkpointing keeps the biases themselves as well."""
    return _bias(work) if work.model.activation_checkpointing else _looked_up(work)


def _looked_up(work: Workload) -> float:
    if work.model.attention == "flex" or not work.model.relative_bias:
        return 0.0
    dense = work.model.attention == "reference"
    keys = work.slots**2 if dense else work.predictions * (work.context + work.predictions)
    return _INDEX * work.micro_batch * keys


def _bias_gradient(work: Workload) -> float:
    """The layers' sum so far, and an inner layer's own in fp32 and rounded."""
    return (work.element + _FULL + _rounded(work)) * sum(bias_numbers(work))


def _last_bias_gradient(work: Workload) -> float:
    if work.model.attention == "flex" or not work.model.relative_bias:
        return 0.0
    return (_FULL + _rounded(work)) * work.last_pairs


def _rounded(work: Workload) -> int:
    return 0 if work.element == _FULL else work.element


def _logits_at_a_time(work: Workload) -> float:
    return _LOGITS_ON_ACCELERATOR if work.on_accelerator else _PART_ON_CPU
