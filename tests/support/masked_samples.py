"""Masks of one sample, by the compiled functions that mask batches."""

from typing import NamedTuple

import numpy as np

from pmlm_dist.masking.blockwise import MaskRule, corrupt, draw_prefix, draw_spans, is_prefix_sample
from pmlm_dist.masking.random_state import seed_state


class MaskedSample(NamedTuple):
    """One sample after masking; m = number of predicted positions, n = number of tokens."""

    predicted: np.ndarray
    """Predicted positions [m], int64, in factorization order; ascending inside a span."""
    steps: np.ndarray
    """Factorization step [m], int32, of each predicted position; counts from 1."""
    context: np.ndarray
    """Corrupted tokens [n], int64; only those before the cut in a prefix sample."""
    masked: np.ndarray
    """True where the context slot of a predicted position holds [MASK]: [m], bool."""


def mask_sample(tokens: np.ndarray, *, rule: MaskRule, seed: int, epoch: int, sample_id: int) -> MaskedSample:
    """Mask one sample of token ids [n], with the same result as in any batch that contains it."""
    context = tokens.astype(np.int64)
    slots = max(1, context.size)
    predicted, steps, masked = np.zeros(slots, np.int64), np.zeros(slots, np.int32), np.zeros(slots, np.bool_)
    state = np.array([seed_state(seed, epoch, sample_id)], dtype=np.uint64)
    if is_prefix_sample(rule, state):
        count = draw_prefix(context, rule, state, predicted, steps)
        context = context[: predicted[0] if count else context.size]
    else:
        count = draw_spans(context, rule, state, predicted, steps)
        corrupt(context, rule, state, predicted[:count], masked)
    return MaskedSample(predicted[:count], steps[:count], context, masked[:count])
