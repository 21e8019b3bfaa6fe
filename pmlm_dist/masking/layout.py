"""Layout: the slots of a sample, that is context, originals and pseudo masks.

    slots   0 ......... S-1 | S ......... S+M-1 | S+M ........ S+2M-1
            context         | originals         | pseudo masks
    order   0               | +k of step k      | -k of step k
    token   corrupted text  | the original      | [MASK]

Appended slots (originals and pseudo masks) follow the factorization order. They have the position and segment of their
base slot, the context slot of the same predicted position. In a short sample the last context slots are padding and the
last prediction slots are unused. Neither is valid, so no query attends to them (`masking/visibility.py`). In a prefix
sample (`MaskingConfig.prefix_share`) the context ends before the first predicted position: there are no base slots, and
the sample looks like a pair of `masking/seq2seq_layout.py`. One compiled loop fills a batch; no Python runs per token.

Shapes: B batch, S context, M predictions, T = S + 2M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple

import numpy as np

from pmlm_dist.masking.blockwise import MaskRule, corrupt, draw_prefix, draw_spans, is_prefix_sample
from pmlm_dist.masking.machine_code import compiled
from pmlm_dist.masking.random_state import seed_state
from pmlm_dist.masking.visibility import Array


class SlotInputs(NamedTuple, Generic[Array]):
    """The model's input: the slots of B samples, as tensors or arrays."""

    tokens_BT: Array
    """Input ids, int64; the pad id in slots that are not valid."""
    positions_BT: Array
    """Position ids, int64: 0..S-1 in the context, those of the base slot in the appended slots, 0 in unused slots."""
    segments_BT: Array
    """Segment ids, int64: 0 up to and including the first [SEP], then 1; unused slots 0."""
    order_BT: Array
    """Signed factorization step, int32: 0 context, +k originals, -k pseudo masks; 0 in slots that are not valid."""
    valid_BT: Array
    """True for slots that queries may attend to, bool: neither padding nor unused."""
    predicted_BM: Array | None = None
    """Index of each predicted position in the context, int64, in factorization order; 0 in unused slots. None: all
    slots are context."""

    @classmethod
    def of(cls, tensors: Mapping[str, Array]) -> SlotInputs[Array]:
        """Select the model's input from named tensors, of a `Layout` for example."""
        return cls(**{name: tensors[name] for name in cls._fields})


class Layout(NamedTuple):
    """Arrays of a batch: the fields of `SlotInputs`, then the targets."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    order_BT: np.ndarray
    valid_BT: np.ndarray
    predicted_BM: np.ndarray
    targets_BM: np.ndarray
    """Original ids at the predicted positions, int64; the pad id in unused slots."""
    weights_BM: np.ndarray
    """1.0 for a prediction, 0.0 for an unused slot, float32."""
    masked_BM: np.ndarray
    """True where the base slot holds [MASK] (not a random or the original token), bool."""


def empty_layout(batch: int, *, sequence_length: int, num_predictions: int, pad_id: int) -> Layout:
    """Return a layout with `batch` rows in which every slot is padding or unused."""
    slots = (batch, sequence_length + 2 * num_predictions)
    predictions = (batch, num_predictions)
    layout = Layout(
        tokens_BT=np.full(slots, pad_id, np.int64),
        positions_BT=np.zeros(slots, np.int64),
        segments_BT=np.zeros(slots, np.int64),
        order_BT=np.zeros(slots, np.int32),
        valid_BT=np.zeros(slots, np.bool_),
        predicted_BM=np.zeros(predictions, np.int64),
        targets_BM=np.full(predictions, pad_id, np.int64),
        weights_BM=np.zeros(predictions, np.float32),
        masked_BM=np.zeros(predictions, np.bool_),
    )
    layout.positions_BT[:, :sequence_length] = np.arange(sequence_length)
    return layout


def build_layout(
    samples: Sequence[np.ndarray],
    *,
    sample_ids: np.ndarray,
    epochs: np.ndarray,
    seed: int,
    rule: MaskRule,
    layout: Layout,
) -> None:
    """Mask `samples` (token ids [n], n <= S, with [CLS] and [SEP]) and write them into the rows of an empty `layout`.

    The masks are a function of `seed`, `epochs` and `sample_ids` (int64 [B]). Raises ValueError for a sample that is
    longer than the context.
    """
    lengths = np.array([sample.size for sample in samples], dtype=np.int64)
    context = layout.tokens_BT.shape[1] - 2 * layout.predicted_BM.shape[1]
    if lengths.size and lengths.max() > context:
        row = int(lengths.argmax())
        raise ValueError(
            f"sample {sample_ids[row]} has {lengths[row]} tokens, more than the sequence length ({context}): "
            "use the sequence length of the corpus"
        )
    # One flat array and its row ends: compiled code cannot take a list of arrays without copying each.
    ends = np.cumsum(lengths)
    tokens = np.concatenate(samples).astype(np.int64, copy=False)
    states = [seed_state(seed, epoch, item) for epoch, item in zip(epochs, sample_ids, strict=True)]
    _fill_rows(layout, tokens, ends, np.array(states, dtype=np.uint64), rule)


@compiled
def _fill_rows(layout: Layout, tokens: np.ndarray, ends: np.ndarray, states: np.ndarray, rule: MaskRule) -> None:
    start = 0
    for row in range(ends.size):
        _fill_row(layout, row, tokens[start : ends[row]], states[row : row + 1], rule)
        start = ends[row]


@compiled
def _fill_row(layout: Layout, row: int, tokens: np.ndarray, state: np.ndarray, rule: MaskRule) -> None:
    """Mask one sample into row `row`; the slices below are views, so the functions write into the batch itself."""
    num_predictions = layout.predicted_BM.shape[1]
    num_context = layout.tokens_BT.shape[1] - 2 * num_predictions
    predicted = layout.predicted_BM[row]
    steps = layout.order_BT[row, num_context : num_context + num_predictions]
    is_prefix = is_prefix_sample(rule, state)
    if is_prefix:
        count = draw_prefix(tokens, rule, state, predicted, steps)
        context_end = predicted[0] if count else tokens.size
    else:
        count = draw_spans(tokens, rule, state, predicted, steps)
        context_end = tokens.size
    _fill_context(layout, row, tokens, context_end, rule.sep_id)
    _append_slots(layout, row, tokens, count, rule.mask_id)
    # Last: the originals above are copied from `tokens`, and corruption draws after the spans from the same state.
    if not is_prefix:
        corrupt(layout.tokens_BT[row, :num_context], rule, state, predicted[:count], layout.masked_BM[row])


@compiled
def _fill_context(layout: Layout, row: int, tokens: np.ndarray, end: int, sep_id: int) -> None:
    """Write the context up to `end`; segments continue, as appended slots have those of their base slots."""
    segment = 0
    for slot in range(layout.tokens_BT.shape[1] - 2 * layout.predicted_BM.shape[1]):
        layout.segments_BT[row, slot] = segment
        if slot < end:
            layout.tokens_BT[row, slot] = tokens[slot]
            layout.valid_BT[row, slot] = True
        if slot < tokens.size and tokens[slot] == sep_id:
            segment = 1


@compiled
def _append_slots(layout: Layout, row: int, tokens: np.ndarray, count: int, mask_id: int) -> None:
    num_predictions = layout.predicted_BM.shape[1]
    num_context = layout.tokens_BT.shape[1] - 2 * num_predictions
    for prediction in range(count):
        position = layout.predicted_BM[row, prediction]
        original, pseudo = num_context + prediction, num_context + num_predictions + prediction
        layout.tokens_BT[row, original] = tokens[position]
        layout.tokens_BT[row, pseudo] = mask_id
        layout.order_BT[row, pseudo] = -layout.order_BT[row, original]
        for slot in (original, pseudo):
            layout.positions_BT[row, slot] = position
            layout.segments_BT[row, slot] = layout.segments_BT[row, position]
            layout.valid_BT[row, slot] = True
        layout.targets_BM[row, prediction] = tokens[position]
        layout.weights_BM[row, prediction] = 1.0
