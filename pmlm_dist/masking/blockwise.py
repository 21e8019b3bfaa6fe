"""Blockwise masking: which tokens are predicted, in what order, and what replaces them in the context.

    tokens --draw_spans---> predicted positions + factorization steps --corrupt--> corrupted context
           `-draw_prefix--> the same for a prefix sample (`prefix_share`), whose context ends before them

Algorithm 1 of UniLMv2 (Bao et al., 2020): spans are drawn until a share `rate` of the tokens is masked, and the order
of drawing is the factorization order. The random numbers of a sample are a function of (seed, epoch, sample id)
(`masking/random_state.py`), so its masks do not depend on batch, rank or worker. The compiled functions work on one
sample; `masking/layout.py` runs them over whole batches.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pmlm_dist.config import MaskingConfig
from pmlm_dist.masking.machine_code import compiled
from pmlm_dist.masking.random_state import below, uniform

MASK_SHARE = 0.8
"""Share of the predicted positions whose context slot becomes [MASK] with `corruption: paper`."""
RANDOM_SHARE = 0.1
"""Share whose context slot becomes a random token; the others keep the original."""

_MAX_REJECTIONS_PER_TOKEN = 16
_ROUNDING = 1e-9
"""Subtracted before rounding up: 0.07 * 100 is 7.000000000000001 in binary floating point and must give 7."""
_PREFIX_STREAM = np.uint64(0x5052454649580001)
"""Separates the random numbers of prefix samples from those of the spans."""


@dataclass(frozen=True)
class SpecialIds:
    """Token ids of a vocabulary that masking depends on."""

    pad: int
    """Padding of short samples; never masked."""
    cls: int
    """First token of a sample; never masked."""
    sep: int
    """Last token of a segment; never masked."""
    mask: int
    """[MASK], in the context and in the pseudo masks."""
    vocab_size: int
    """Number of tokens, without the rows that pad the embedding."""
    special: tuple[int, ...]
    """All special ids; excluded from the random replacements."""


class MaskRule(NamedTuple):
    """`MaskingConfig` and `SpecialIds` in the types that compiled code accepts: scalars and one array."""

    rate: float
    span_probability: float
    min_span: int
    max_span: int
    exact: bool
    mask_only: bool
    prefix_share: float
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    replacement_ids: np.ndarray


@lru_cache(maxsize=8)
def mask_rule(masking: MaskingConfig, special: SpecialIds) -> MaskRule:
    """Convert the settings for compiled code. Raises ValueError for a vocabulary of special tokens only.

    Cached: listing the replacements, all ids that are not special, takes longer than masking a batch.
    """
    replacements = np.setdiff1d(
        np.arange(special.vocab_size, dtype=np.int64), np.array(special.special, dtype=np.int64)
    )
    replacements.flags.writeable = False  # the cached array is shared by all callers
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
        prefix_share=float(masking.prefix_share),
        pad_id=int(special.pad),
        cls_id=int(special.cls),
        sep_id=int(special.sep),
        mask_id=int(special.mask),
        replacement_ids=replacements,
    )


def max_predictions(sequence_length: int, masking: MaskingConfig) -> int:
    """M: upper bound on the predicted positions of a sample of at most `sequence_length` tokens.

    `stop: exact` predicts ceil(rate * S); `stop: paper` can overshoot by all but one token of the longest span.
    """
    wanted = max(1, math.ceil(masking.rate * sequence_length - _ROUNDING))
    overshoot = masking.max_span - 1 if masking.stop == "paper" and masking.span_probability > 0 else 0
    return min(sequence_length, wanted + overshoot)


@compiled
def is_prefix_sample(rule: MaskRule, state: np.ndarray) -> bool:
    """Decide whether a sample is a prefix sample; `state` is not advanced."""
    # From a stream of its own: the spans of the other samples are the same whatever the share.
    return rule.prefix_share > 0 and uniform(state ^ _PREFIX_STREAM) < rule.prefix_share


@compiled
def draw_prefix(tokens: np.ndarray, rule: MaskRule, state: np.ndarray, predicted: np.ndarray, steps: np.ndarray) -> int:
    """Draw the cut of a prefix sample of `tokens` [n]. Return the number of predicted tokens, at most ceil(rate * n).

    They follow the cut from left to right, special tokens included, each in a step of its own; at least one token
    stands before the cut. Written as by `draw_spans`.
    """
    count = min(_num_wanted(tokens, rule), tokens.size - 1)
    cut = 1 + below(state, tokens.size - count) if count > 0 else 0
    for target in range(count):
        predicted[target] = cut + target
        steps[target] = target + 1
    return count


@compiled
def _num_wanted(tokens: np.ndarray, rule: MaskRule) -> int:
    return max(1, int(np.ceil(rule.rate * tokens.size - _ROUNDING)))


@compiled
def _maskable(tokens: np.ndarray, rule: MaskRule) -> np.ndarray:
    """True for each token that may be masked: bool [n]."""
    free = np.empty(tokens.size, np.bool_)
    for position in range(tokens.size):
        token = tokens[position]
        free[position] = token != rule.cls_id and token != rule.sep_id and token != rule.pad_id  # noqa: PLR1714
    return free


@compiled
def _draw_length(rule: MaskRule, state: np.ndarray) -> int:
    """Length of a span: uniform in min_span .. max_span with `span_probability`, else 1."""
    if uniform(state) < rule.span_probability:
        return rule.min_span + below(state, rule.max_span - rule.min_span + 1)
    return 1


@compiled
def _all_free(free: np.ndarray, start: int, length: int) -> bool:
    """True if the span lies inside the sample and all of its tokens may be masked."""
    if start + length > free.size:
        return False
    for position in range(start, start + length):  # noqa: SIM110 (compiled: no generator expressions)
        if not free[position]:
            return False
    return True


@compiled
def draw_spans(tokens: np.ndarray, rule: MaskRule, state: np.ndarray, predicted: np.ndarray, steps: np.ndarray) -> int:
    """Draw spans of `tokens` [n] until ceil(rate * n) tokens are masked. Return the number of masked tokens.

    Writes the predicted positions to `predicted` and their steps (from 1) to `steps`; both must have at least
    `max_predictions` entries. A span that overlaps a special or masked token, or the end of the sample, is drawn again.
    n includes special tokens. With fewer maskable tokens than ceil(rate * n), all of them are masked.
    """
    free = _maskable(tokens, rule)
    wanted = min(_num_wanted(tokens, rule), free.sum())
    count, step, rejected = 0, 0, 0
    while count < wanted:
        start = below(state, tokens.size)
        # With span_probability near 1, no remaining gap may fit a span. Single tokens then guarantee termination.
        length = _draw_length(rule, state) if rejected < _MAX_REJECTIONS_PER_TOKEN * tokens.size else 1
        # Rejected whole, never shortened: a shortened span would change the distribution of lengths.
        if not _all_free(free, start, length):
            rejected += 1
            continue
        rejected = 0
        step += 1
        if rule.exact:  # only the last span is cut, so that the number of predictions is exact
            length = min(length, wanted - count)
        for position in range(start, start + length):
            free[position] = False
            predicted[count] = position
            steps[count] = step
            count += 1
    return count


@compiled
def corrupt(context: np.ndarray, rule: MaskRule, state: np.ndarray, predicted: np.ndarray, masked: np.ndarray) -> None:
    """Corrupt the `predicted` positions of `context` in place: 80 % [MASK], 10 % random, 10 % kept.

    Every position is drawn independently, also within a span. `masked` is set to True where [MASK] was written; with
    `mask_only` it is written everywhere.
    """
    for slot in range(predicted.size):
        draw = 0.0 if rule.mask_only else uniform(state)
        masked[slot] = draw < MASK_SHARE
        if masked[slot]:
            context[predicted[slot]] = rule.mask_id
        elif draw < MASK_SHARE + RANDOM_SHARE:
            context[predicted[slot]] = rule.replacement_ids[below(state, rule.replacement_ids.size)]
