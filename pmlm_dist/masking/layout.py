"""Layout: where context, originals and pseudo masks of a sample stand.

    slots   0 ......... S-1 | S ......... S+M-1 | S+M ........ S+2M-1
            context         | originals         | pseudo masks
    order   0               | +k of step k      | -k of step k
    token   corrupted text  | the original      | [MASK]

Appended slots follow the factorization order and have position and segment of their base slot. A short sample leaves
context slots as padding and prediction slots unused: neither is valid, so neither is ever seen
(`masking/visibility.py`). Batches are filled by one compiled loop; no Python runs per token.

Shapes: B batch, S context, M predictions, T = S + 2M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from pmlm_dist.masking.blockwise import MaskRule, corrupt, draw_spans, seed_state


class Layout(NamedTuple):
    """Arrays of a batch of laid-out samples."""

    tokens_BT: np.ndarray
    """Input ids, int64; the pad id in slots that are not valid."""
    positions_BT: np.ndarray
    """Position ids, int64: 0..S-1 in the context, those of the base slot in the appended slots, 0 in unused slots."""
    segments_BT: np.ndarray
    """Segment ids, int64: 0 up to and including the first [SEP], then 1; unused slots 0."""
    order_BT: np.ndarray
    """Signed factorization step, int32: 0 context, +k originals, -k pseudo masks; 0 in slots that are not valid."""
    valid_BT: np.ndarray
    """Whether a slot may be seen, bool: neither padding nor unused."""
    predicted_BM: np.ndarray
    """Index of each predicted position in the context, int64; 0 in unused slots."""
    targets_BM: np.ndarray
    """Original ids at the predicted positions, int64; the pad id in unused slots."""
    weights_BM: np.ndarray
    """1.0 for a prediction, 0.0 for an unused slot, float32."""
    masked_BM: np.ndarray
    """Whether the base slot holds [MASK] (rather than a random or the original token), bool."""


def empty_layout(batch: int, *, sequence_length: int, num_predictions: int, pad_id: int) -> Layout:
    """A layout with `batch` rows in which every slot is padding or unused."""
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

    `sample_ids` and `epochs` are int64 [B]; with `seed` they alone decide the masks. Raises ValueError for a sample
    that is longer than the context.
    """
    lengths = np.array([sample.size for sample in samples], dtype=np.int64)
    context = layout.tokens_BT.shape[1] - 2 * layout.predicted_BM.shape[1]
    if lengths.size and lengths.max() > context:
        row = int(lengths.argmax())
        raise ValueError(
            f"sample {sample_ids[row]} has {lengths[row]} tokens, more than the sequence length ({context}): "
            "use the sequence length of the corpus"
        )
    ends = np.cumsum(lengths)
    tokens = np.concatenate(samples).astype(np.int64, copy=False)
    states = [seed_state(seed, epoch, item) for epoch, item in zip(epochs, sample_ids, strict=True)]
    _fill_rows(layout, tokens, ends, np.array(states, dtype=np.uint64), rule)


@njit(cache=True)
def _fill_rows(layout: Layout, tokens: np.ndarray, ends: np.ndarray, states: np.ndarray, rule: MaskRule) -> None:
    start = 0
    for row in range(ends.size):
        _fill_row(layout, row, tokens[start : ends[row]], states[row : row + 1], rule)
        start = ends[row]


@njit(cache=True)
def _fill_row(layout: Layout, row: int, tokens: np.ndarray, state: np.ndarray, rule: MaskRule) -> None:
    num_predictions = layout.predicted_BM.shape[1]
    num_context = layout.tokens_BT.shape[1] - 2 * num_predictions
    _fill_context(layout, row, tokens, num_context, rule.sep_id)
    predicted = layout.predicted_BM[row]
    steps = layout.order_BT[row, num_context : num_context + num_predictions]
    count = draw_spans(tokens, rule, state, predicted, steps)
    _append_slots(layout, row, tokens, count, rule.mask_id)
    corrupt(layout.tokens_BT[row, :num_context], rule, state, predicted[:count], layout.masked_BM[row])


@njit(cache=True)
def _fill_context(layout: Layout, row: int, tokens: np.ndarray, num_context: int, sep_id: int) -> None:
    segment = 0
    for slot in range(num_context):
        layout.segments_BT[row, slot] = segment
        if slot < tokens.size:
            layout.tokens_BT[row, slot] = tokens[slot]
            layout.valid_BT[row, slot] = True
            if tokens[slot] == sep_id:
                segment = 1


@njit(cache=True)
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
