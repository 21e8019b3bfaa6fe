"""Layout of source-target pairs, for fine-tuning on generation tasks.

    slots      0 ........... S-1 | S ......... S+M-1 | S+M ........ S+2M-1
               source            | target            | pseudo masks
    token      [CLS] SRC [SEP]   | TGT [SEP]         | [MASK], a random or the target token
    order      0                 | +t                | -t             (t = 1 for the first target token)
    position   0 .. n-1          | n + t - 1         | n + t - 1      (n: length of the source without padding)
    segment    0                 | 1                 | 1

This is the layout of pre-training (`masking/layout.py`) in which every target token is a factorization step of its own
and has no base slot. Decoding step t feeds token t - 1 and the pseudo mask of step t, at the same positions.

Noise counters copying and exposure bias (the model's reliance on correct earlier tokens). A pseudo mask is [MASK] in
80 % of the slots, a random token in 10 % and the target token in 10 %. With `target_mask_prob` the token drawn for the
pseudo mask also replaces the target token in the input, except the closing [SEP]. Both draws are a function of (seed,
epoch, sample id).

Shapes: B samples, S source slots, M target slots, T = S + 2M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.masking.layout import Layout, empty_layout

Pair = tuple[np.ndarray, np.ndarray]
"""Token ids of a source and of its target, without special tokens."""

_RANDOM_SHARE, _KEPT_SHARE = 0.1, 0.1


@dataclass(frozen=True)
class Seq2SeqRule:
    """Lengths and noise of the layout of pairs."""

    max_source: int
    """S: maximum number of source tokens, including [CLS] and [SEP]. Longer sources are truncated at the end."""
    max_target: int
    """M: maximum number of target tokens, including the closing [SEP]. Longer targets are truncated before it."""
    target_mask_prob: float = 0.5
    """Probability that the token drawn for its pseudo mask replaces a target token in the input."""
    noise: bool = True
    """Draw noise. Off: every pseudo mask is [MASK] and the input holds the target itself, as in decoding."""


def build_seq2seq_layout(
    pairs: Sequence[Pair],
    *,
    sample_ids: Sequence[int],
    epochs: Sequence[int],
    seed: int,
    rule: Seq2SeqRule,
    special: SpecialIds,
    trim: bool = False,
) -> Layout:
    """Lay out `pairs`; used target slots have weight 1.

    `trim`: use the lengths of the longest source and target of the batch instead of the rule's.
    """
    cls, sep = np.array([special.cls]), np.array([special.sep])
    sources = [np.concatenate([cls, source[: rule.max_source - 2], sep]) for source, _ in pairs]
    targets = [np.concatenate([target[: rule.max_target - 1], sep]) for _, target in pairs]
    layout = empty_layout(
        len(pairs),
        sequence_length=max(map(len, sources)) if trim else rule.max_source,
        num_predictions=max(map(len, targets)) if trim else rule.max_target,
        pad_id=special.pad,
    )
    replacements = np.setdiff1d(np.arange(special.vocab_size), special.special)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        shown, pseudo = target, np.full_like(target, special.mask)
        if rule.noise:
            # One generator for each sample: its noise must not depend on the batch around it.
            random = np.random.default_rng((seed, epochs[row], sample_ids[row]))
            shown, pseudo = _noise(target, pseudo, random, replacements, replaced_share=rule.target_mask_prob)
        fill_pair(layout, row, source, target, shown=shown, pseudo=pseudo)
    return layout


def _noise(
    target: np.ndarray, pseudo: np.ndarray, random: np.random.Generator, tokens: np.ndarray, *, replaced_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the noisy target as the model's input, and the pseudo masks: [m] each; `tokens` may replace others."""
    drawn = random.random(target.size)
    # Tokens are drawn for all slots, needed or not, so that the number of draws does not depend on `drawn`.
    others = tokens[random.integers(tokens.size, size=target.size)]
    kept_below = _RANDOM_SHARE + _KEPT_SHARE
    pseudo = np.where(drawn < _RANDOM_SHARE, others, np.where(drawn < kept_below, target, pseudo))
    replaced = random.random(target.size) < replaced_share
    replaced[-1] = False  # the closing [SEP]: decoding stops at it, so it is never fed
    return np.where(replaced, pseudo, target), pseudo


def fill_pair(
    layout: Layout,
    row: int,
    source: np.ndarray,
    target: np.ndarray,
    *,
    shown: np.ndarray,
    pseudo: np.ndarray,
    segment: int = 1,
) -> None:
    """Write one pair of ids, special tokens included, into an empty row.

    `shown`, `pseudo`: what the input holds in place of the target and at its pseudo masks, [m] each. `segment`: that of
    the target.
    """
    num_predictions = layout.predicted_BM.shape[1]
    num_context = layout.tokens_BT.shape[1] - 2 * num_predictions
    steps = np.arange(1, target.size + 1)
    layout.tokens_BT[row, : source.size] = source
    layout.valid_BT[row, : source.size] = True
    for start, tokens, order in ((num_context, shown, steps), (num_context + num_predictions, pseudo, -steps)):
        slots = slice(start, start + target.size)
        layout.tokens_BT[row, slots] = tokens
        layout.positions_BT[row, slots] = source.size + steps - 1
        layout.segments_BT[row, slots] = segment
        layout.order_BT[row, slots] = order
        layout.valid_BT[row, slots] = True
    layout.targets_BM[row, : target.size] = target
    layout.weights_BM[row, : target.size] = 1.0
