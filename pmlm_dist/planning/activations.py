"""Bytes of activations: saved for the backward pass, and temporary during it, by part of the model.

Counted tensor by tensor, as the layers in `model/` allocate them:

    inner layer   norm inputs 2, norm outputs 2                       [T, B, E] each
                  queries, keys, values, attention output             [T, B, E / t] each
                  GELU's input and output                             [T, B, F / t] each
                  attention probabilities                             [H / t, B, Q, K], and the dropout mask
    last layer    keys and values for T slots, the rest for the R predicted slots
    head          three times [R, B, E] and one buffer of logits [R, B, V / t]
    attention     biases of the scores and their indices into the bias table, shared by all layers

With activation checkpointing a layer saves only its input; the rest exists while the layer is recomputed. Legend:
`workload.py`.
"""

from dataclasses import dataclass

from pmlm_dist.planning.workload import Workload

_INDEX, _FULL, _FLAG = 8, 4, 1
"""Bytes of an int64, of an fp32 number, of a bool."""
# Elements that attention and loss process at a time (model/fused_attention.py, parallel/cross_entropy.py).
_PART_ON_CPU, _LOGITS_ON_ACCELERATOR = 2**18, 2**27
_NORM_STATISTICS = 2 * _FULL  # mean and reciprocal deviation of a token


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch. `*_work`: temporary bytes of a backward pass beyond the saved ones."""

    embedding: float
    """Saved by the embeddings."""
    bias: float
    """Attention biases, until the last layer has run."""
    bias_saved: float
    """Part of the attention biases that is saved for the backward pass."""
    inner: float
    """Saved by an inner layer, its output included."""
    last: float
    """Saved by the last layer."""
    head: float
    """Saved by the head, without its logits."""
    logits: float
    """Saved logits."""
    inner_kept: float
    """Part of `inner` that exists until the backward pass of the layer: its input under activation checkpointing."""
    last_kept: float
    """The same part of `last`."""
    loss_work: float
    """Temporary, in the computation of the loss."""
    head_work: float
    """Of the head."""
    network_work: float
    """Of the feed-forward network; tensors freed by then are subtracted."""
    attention_work: float
    """Of attention, including the gradient of the bias; tensors freed by then are subtracted."""
    last_work: float
    """Of the last layer's attention; tensors freed by then are subtracted."""
    embedding_work: float
    """Of the embeddings."""


def activations(work: Workload) -> Activations:
    """Saved and temporary bytes of a micro-batch of `work`."""
    model, a, recomputes = work.model, work.element, work.model.activation_checkpointing
    inner = _Layer(work, work.tokens, work.inner_pairs)
    last = _Layer(work, work.predicted_tokens, work.last_pairs)
    keys_values = a * 2 * work.tokens * inner.own
    logits = work.predicted_tokens * work.vocabulary
    token_gradient = a * work.vocabulary * model.hidden_size
    # Activation checkpointing saves the biases themselves as well as their indices.
    bias, indices = _bias(work), _bias_indices(work)
    at_a_time = _LOGITS_ON_ACCELERATOR if work.on_accelerator else _PART_ON_CPU
    return Activations(
        embedding=inner.norm + a * inner.wide + inner.dropped,
        bias=bias,
        bias_saved=bias if recomputes else indices,
        inner=inner.saved + keys_values,
        last=last.saved + keys_values + a * last.wide,
        head=last.norm + 2 * a * last.wide,
        logits=a * logits,
        inner_kept=a * inner.wide if recomputes else inner.saved + keys_values,
        last_kept=a * last.wide if recomputes else last.saved + keys_values + a * last.wide,
        loss_work=0.0 if a == _FULL else _FULL * min(logits, at_a_time),
        head_work=token_gradient + (a + 2 * _FULL) * last.wide,
        network_work=a * (inner.hidden - inner.wide) + a * sum(bias_numbers(work)),
        attention_work=_attention_work(work, inner) + _bias_gradient(work),
        last_work=_attention_work(work, last) + _last_bias_gradient(work) + 2 * keys_values + a * inner.wide,
        embedding_work=token_gradient + 2 * a * inner.wide,
    )


@dataclass(frozen=True)
class _Layer:
    """A layer with queries at `tokens` slots; keys and values are added by the caller."""

    work: Workload
    tokens: int
    pairs: int

    @property
    def own(self) -> int:
        """Total width of this rank's heads: E / t."""
        return self.work.model.hidden_size // self.work.tp

    @property
    def wide(self) -> int:
        """Elements of a tensor [tokens, E]."""
        return self.tokens * self.work.model.hidden_size

    @property
    def hidden(self) -> int:
        """Elements of a tensor [tokens, F / t]."""
        return self.tokens * self.work.model.ffn_size // self.work.tp

    @property
    def norm(self) -> float:
        """Bytes that a LayerNorm saves: its input, mean and deviation of each token."""
        return self.work.element * self.wide + _NORM_STATISTICS * self.tokens

    @property
    def dropped(self) -> float:
        """Bytes that one dropout saves: a bool for each element, on a CPU the scale factors."""
        if not self.work.model.hidden_dropout:
            return 0.0
        return (_FLAG if self.work.on_accelerator else self.work.element) * self.wide

    @property
    def probabilities(self) -> float:
        """Bytes that attention saves of its probabilities; the Triton kernel saves one fp32 number a query instead."""
        if self.work.attention == "triton":
            return _FULL * self.tokens * self.work.heads
        bytes_per_pair = self.work.element
        if self.work.model.attention_dropout:
            bytes_per_pair += _FLAG if self.work.attention == "fused" else 2 * self.work.element
        return bytes_per_pair * self.pairs

    @property
    def saved(self) -> float:
        """Saved bytes, without keys and values."""
        numbers = 2 * self.wide + 2 * self.tokens * self.own + 2 * self.hidden
        return self.work.element * numbers + 2 * self.norm + 2 * self.dropped + self.probabilities


def _attention_work(work: Workload, layer: _Layer) -> float:
    """Gradients of q, k, v and of the attention output, each in two layouts (by head, by slot), and of the scores.

    The tensors of the feed-forward network and the input of the first norm are freed by then and are subtracted.
    """
    a, own = work.element, layer.tokens * layer.own
    gradients = a * (layer.wide + 2 * own + 2 * 3 * own)
    freed = 2 * layer.norm + a * (2 * layer.wide + own + 2 * layer.hidden) + 2 * layer.dropped
    return gradients - freed + _scores_work(work, layer.pairs)


def _scores_work(work: Workload, pairs: int) -> float:
    """Bytes of score gradients that exist at a time.

    An accelerator processes a whole group of queries, the larger of two; a CPU a part that fits its cache.
    """
    if work.attention == "triton":
        return 0.0
    copies = 2 if work.model.attention_dropout else 1
    if work.attention == "reference":
        return work.element * 2 * pairs
    part = max(pairs * work.appended * work.slots / (work.context**2 + work.appended * work.slots), pairs / 2)
    return work.element * copies * (part if work.on_accelerator else min(part, _PART_ON_CPU))


def bias_numbers(work: Workload) -> tuple[float, float]:
    """Elements of the attention biases that require a gradient: (shared by all samples, one for each sample)."""
    if work.attention == "triton" or not work.model.relative_bias:
        return 0.0, 0.0
    if work.attention == "reference":
        return 0.0, work.heads * work.micro_batch * work.slots**2
    return work.heads * work.context**2, work.heads * work.micro_batch * work.appended * work.slots


def _bias(work: Workload) -> float:
    """Bytes of all attention biases; without relative positions only the mask, which all heads share."""
    if work.attention == "triton":
        return 0.0
    is_reference = work.attention == "reference"
    if not work.model.relative_bias:
        return work.element * work.micro_batch * (work.slots if is_reference else work.appended) * work.slots
    rows = work.last_pairs if is_reference else work.heads * work.micro_batch * work.predictions * work.context
    return work.element * (sum(bias_numbers(work)) + rows) + _bias_indices(work)


def _bias_indices(work: Workload) -> float:
    """Bytes of the indices into the bias table."""
    if work.attention == "triton" or not work.model.relative_bias:
        return 0.0
    is_reference = work.attention == "reference"
    keys = work.slots**2 if is_reference else work.predictions * (work.context + work.predictions)
    return _INDEX * work.micro_batch * keys


def _bias_gradient(work: Workload) -> float:
    """Bytes of the sum over layers, and of one inner layer's gradient in fp32 and rounded."""
    return (work.element + _gradient_element(work)) * sum(bias_numbers(work))


def _last_bias_gradient(work: Workload) -> float:
    if work.attention == "triton" or not work.model.relative_bias:
        return 0.0
    return _gradient_element(work) * work.last_pairs


def _gradient_element(work: Workload) -> int:
    """Bytes of an element of the bias gradient: in fp32, and rounded unless the model is in fp32 too."""
    return _FULL + (0 if work.element == _FULL else work.element)
