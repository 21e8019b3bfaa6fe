"""Blockwise masking: which tokens are hidden, in what order, and what stands in their place.

    tokens --draw_spans--> predicted positions + factorization steps --corrupt--> corrupted context

Algorithm 1 of UniLMv2 (Bao et al., 2020): spans are drawn until a share `rate` of the tokens is masked, and the order
of drawing is the factorization order. All randomness of a sample comes from (seed, epoch, sample id), so its masks do
not depend on batch, rank or worker. NumPy and numba only; the compiled functions work on one sample, and
`masking/layout.py` runs them over whole batches.

numba keeps the machine code beside this file, or in `NUMBA_CACHE_DIR` where that folder cannot be written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pmlm_dist.config import MaskingConfig

MASK_SHARE = 0.8
"""Share of the predicted positions whose context slot becomes [MASK] under `corruption: paper`."""
RANDOM_SHARE = 0.1
"""Share that becomes a random token; the rest is kept."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_PATIENCE = 16


@dataclass(frozen=True)
class SpecialIds:
    """The ids that masking needs to know of a vocabulary."""

    pad: int
    """Fills short samples; never masked."""
    cls: int
    """Opens a sample; never masked."""
    sep: int
    """Closes a segment; never masked."""
    mask: int
    """Stands in for hidden tokens, in the context and in the pseudo masks."""
    vocab_size: int
    """Number of tokens, without rows that pad the embedding."""
    special: tuple[int, ...]
    """Every special id; none of them serves as a random replacement."""


class MaskRule(NamedTuple):
    """`MaskingConfig` and `SpecialIds` as the scalars and the one array that compiled code takes."""

    rate: float
    span_probability: float
    min_span: int
    max_span: int
    exact: bool
    mask_only: bool
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    replacement_ids: np.ndarray


class MaskedSample(NamedTuple):
    """One sample after masking; m = number of predicted positions, n = number of tokens."""

    predicted: np.ndarray
    """Predicted positions [m], int64, in factorization order; ascending inside a span."""
    steps: np.ndarray
    """Factorization step [m], int32, of each predicted position; counts from 1."""
    context: np.ndarray
    """Corrupted tokens [n], int64."""
    masked: np.ndarray
    """Whether the context slot of each predicted position holds [MASK]: [m], bool."""


@lru_cache(maxsize=8)
def mask_rule(masking: MaskingConfig, special: SpecialIds) -> MaskRule:
    """The compiled code's view of the settings; replacements are drawn from all ids that are not special.

    Kept from call to call, since listing the replacements takes longer than masking a batch.
    """
    replacements = np.setdiff1d(
        np.arange(special.vocab_size, dtype=np.int64), np.array(special.special, dtype=np.int64)
    )
    replacements.flags.writeable = False
    if not replacements.size:
        raise ValueError(
            f"the vocabulary of {special.vocab_size} tokens has special tokens only: nothing can replace a token"
        )
    return MaskRule(
        rate=float(masking.rate),
        span_probability=float(masking.span_probability),
        min_span=int(masking.min_span),
        max_span=int(masking.max_span),
        exact=masking.stop == "exact",
        mask_only=masking.corruption == "mask_only",
        pad_id=int(special.pad),
        cls_id=int(special.cls),
        sep_id=int(special.sep),
        mask_id=int(special.mask),
        replacement_ids=replacements,
    )


def max_predictions(sequence_length: int, masking: MaskingConfig) -> int:
    """M: the most predicted positions that a sample of at most `sequence_length` tokens can have.

    `stop: exact` predicts ceil(rate * S); `stop: paper` can overshoot by all but one token of the longest span.
    """
    wanted = max(1, math.ceil(masking.rate * sequence_length - 1e-9))
    overshoot = masking.max_span - 1 if masking.stop == "paper" and masking.span_probability > 0 else 0
    return min(sequence_length, wanted + overshoot)


def mask_sample(tokens: np.ndarray, *, rule: MaskRule, seed: int, epoch: int, sample_id: int) -> MaskedSample:
    """Mask one sample of token ids [n]; equal to what a batch with this sample holds."""
    context = tokens.astype(np.int64)
    slots = max(1, context.size)
    predicted, steps, masked = np.zeros(slots, np.int64), np.zeros(slots, np.int32), np.zeros(slots, np.bool_)
    state = np.array([seed_state(seed, epoch, sample_id)], dtype=np.uint64)
    count = draw_spans(context, rule, state, predicted, steps)
    corrupt(context, rule, state, predicted[:count], masked)
    return MaskedSample(predicted[:count], steps[:count], context, masked[:count])


# Random numbers: splitmix64 (Steele, Lea and Flood, 2014), a counter run through a mixer. A state is one uint64, so
# seeding costs three mixes, and the numbers are the same under every version of NumPy and numba.


@njit(cache=True)
def _mix(bits: Any) -> Any:
    """splitmix64's finaliser: a bijection of uint64 in which every input bit moves every output bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
    return bits ^ (bits >> np.uint64(31))


@njit(cache=True)
def seed_state(seed: int, epoch: int, item: int) -> Any:
    """Generator state (uint64) of an item in an epoch; all three must be at least 0."""
    state = _mix(np.uint64(seed) + _GAMMA)
    state = _mix((state ^ np.uint64(epoch)) + _GAMMA)
    return _mix((state ^ np.uint64(item)) + _GAMMA)


@njit(cache=True)
def _next_bits(state: np.ndarray) -> Any:
    state[0] += _GAMMA
    return _mix(state[0])


@njit(cache=True)
def uniform(state: np.ndarray) -> float:
    """Next number in [0, 1): the high 53 bits, all that a double holds. `state` is uint64 [1] and moves on."""
    return np.float64(_next_bits(state) >> np.uint64(11)) * 2.0**-53


@njit(cache=True)
def below(state: np.ndarray, bound: int) -> Any:
    """Next integer in 0 .. bound-1 by multiply-shift (Lemire, 2019); bound < 2^32, bias below bound / 2^32."""
    return np.int64(((_next_bits(state) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@njit(cache=True)
def _maskable(tokens: np.ndarray, rule: MaskRule) -> np.ndarray:
    free = np.empty(tokens.size, np.bool_)
    for position in range(tokens.size):
        token = tokens[position]
        free[position] = token != rule.cls_id and token != rule.sep_id and token != rule.pad_id  # noqa: PLR1714
    return free


@njit(cache=True)
def _draw_length(rule: MaskRule, state: np.ndarray) -> int:
    if uniform(state) < rule.span_probability:
        return rule.min_span + below(state, rule.max_span - rule.min_span + 1)
    return 1


@njit(cache=True)
def _all_free(free: np.ndarray, start: int, length: int) -> bool:
    if start + length > free.size:
        return False
    for position in range(start, start + length):  # noqa: SIM110 (compiled: no generator expressions)
        if not free[position]:
            return False
    return True


@njit(cache=True)
def draw_spans(tokens: np.ndarray, rule: MaskRule, state: np.ndarray, predicted: np.ndarray, steps: np.ndarray) -> int:
    """Draw spans of `tokens` [n] until ceil(rate * n) tokens are masked; returns how many are.

    Writes the predicted positions to `predicted` and their steps (from 1) to `steps`, both at least `max_predictions`
    long. A span that touches a special token or a masked one, or ends past the sample, is drawn again. n counts special
    tokens; a sample with fewer maskable tokens than ceil(rate * n) has all of them masked.
    """
    free = _maskable(tokens, rule)
    wanted = min(max(1, int(np.ceil(rule.rate * tokens.size - 1e-9))), free.sum())
    count, step, rejected = 0, 0, 0
    while count < wanted:
        start = below(state, tokens.size)
        # With span_probability near 1 no gap may be left that fits a span: single tokens then end the search.
        length = _draw_length(rule, state) if rejected < _PATIENCE * tokens.size else 1
        if not _all_free(free, start, length):
            rejected += 1
            continue
        rejected = 0
        step += 1
        if rule.exact:
            length = min(length, wanted - count)
        for position in range(start, start + length):
            free[position] = False
            predicted[count] = position
            steps[count] = step
            count += 1
    return count


@njit(cache=True)
def corrupt(context: np.ndarray, rule: MaskRule, state: np.ndarray, predicted: np.ndarray, masked: np.ndarray) -> None:
    """Hide the `predicted` positions of `context` in place, each for itself: 80 % [MASK], 10 % random, 10 % kept.

    `masked` tells which became [MASK]; with `mask_only` all of them do.
    """
    for slot in range(predicted.size):
        draw = 0.0 if rule.mask_only else uniform(state)
        masked[slot] = draw < MASK_SHARE
        if masked[slot]:
            context[predicted[slot]] = rule.mask_id
        elif draw < MASK_SHARE + RANDOM_SHARE:
            context[predicted[slot]] = rule.replacement_ids[below(state, rule.replacement_ids.size)]
