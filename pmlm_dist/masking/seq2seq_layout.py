"""Layout of a source and its target, for learning to write the one from the other.

    slots      0 ........... S-1 | S ......... S+M-1 | S+M ........ S+2M-1
               source            | target            | pseudo masks
    token      [CLS] SRC [SEP]   | TGT [SEP]         | [MASK], a random or the true token
    order      0                 | +t                | -t             (t = 1 for the first token of the target)
    position   0 .. n-1          | n + t - 1         | n + t - 1      (n: the source's own length)
    segment    0                 | 1                 | 1

It is the layout of pre-training (`masking/layout.py`) with every token of the target a factorization step of its own,
and no base slots. Decoding step t feeds token t - 1 and the pseudo mask of step t, at the same places.

Noise, against learning to copy and against trusting every token written before: a pseudo mask is [MASK] in 80 % of the
places, a random token in 10 %, the true one in 10 %; and a token of the target (not its closing [SEP]) is shown as what
was drawn for its pseudo mask with `target_mask_prob`. Both are a function of (seed, epoch, sample id) alone.

Shapes: B samples, S source slots, M target slots, T = S + 2M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.masking.layout import Layout, empty_layout

Pair = tuple[np.ndarray, np.ndarray]
"""Token ids of a source and of its target, neither with special tokens."""

_RANDOM, _KEPT = 0.1, 0.1


@dataclass(frozen=True)
class Seq2SeqRule:
    """How pairs are laid out."""

    max_source: int
    """S: source tokens at most, [CLS] and [SEP] counted. More are cut off at the end."""
    max_target: int
    """M: target tokens at most, the closing [SEP] counted. More are cut off at the end, before the [SEP]."""
    target_mask_prob: float = 0.5
    """Probability that a token of the target is shown as what was drawn for its pseudo mask."""
    noise: bool = True
    """Draw pseudo masks and shown tokens; off: [MASK] everywhere and the true target, as when decoding."""


def source_ids(words: np.ndarray, *, rule: Seq2SeqRule, special: SpecialIds) -> np.ndarray:
    """[CLS] SRC [SEP], cut to the rule's length."""
    return np.concatenate([[special.cls], words[: rule.max_source - 2], [special.sep]]).astype(np.int64)


def target_ids(words: np.ndarray, *, rule: Seq2SeqRule, special: SpecialIds) -> np.ndarray:
    """TGT [SEP], cut to the rule's length."""
    return np.concatenate([words[: rule.max_target - 1], [special.sep]]).astype(np.int64)


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
    """Lay out `pairs`; targets that count have weight 1.

    `trim`: as many slots as the longest source and target of the batch need, instead of the rule's.
    """
    sources = [source_ids(source, rule=rule, special=special) for source, _ in pairs]
    targets = [target_ids(target, rule=rule, special=special) for _, target in pairs]
    layout = empty_layout(
        len(pairs),
        sequence_length=max(map(len, sources)) if trim else rule.max_source,
        num_predictions=max(map(len, targets)) if trim else rule.max_target,
        pad_id=special.pad,
    )
    choices = np.setdiff1d(np.arange(special.vocab_size), special.special)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        shown, pseudo = target, np.full_like(target, special.mask)
        if rule.noise:
            random = np.random.default_rng((seed, epochs[row], sample_ids[row]))
            shown, pseudo = _noise(target, pseudo, random, choices=choices, shown_as_drawn=rule.target_mask_prob)
        _fill_row(layout, row, source, target, shown=shown, pseudo=pseudo)
    return layout


def _noise(
    target: np.ndarray, pseudo: np.ndarray, random: np.random.Generator, *, choices: np.ndarray, shown_as_drawn: float
) -> tuple[np.ndarray, np.ndarray]:
    """What is shown of the target, and its pseudo masks."""
    drawn = random.random(target.size)
    words = choices[random.integers(choices.size, size=target.size)]
    pseudo = np.where(drawn < _RANDOM, words, np.where(drawn < _RANDOM + _KEPT, target, pseudo))
    replaced = random.random(target.size) < shown_as_drawn
    replaced[-1] = False  # the closing [SEP]
    return np.where(replaced, pseudo, target), pseudo


def _fill_row(
    layout: Layout, row: int, source: np.ndarray, target: np.ndarray, *, shown: np.ndarray, pseudo: np.ndarray
) -> None:
    num_predictions = layout.predicted_BM.shape[1]
    num_context = layout.tokens_BT.shape[1] - 2 * num_predictions
    steps = np.arange(1, target.size + 1)
    layout.tokens_BT[row, : source.size] = source
    layout.valid_BT[row, : source.size] = True
    for start, tokens, order in ((num_context, shown, steps), (num_context + num_predictions, pseudo, -steps)):
        slots = slice(start, start + target.size)
        layout.tokens_BT[row, slots] = tokens
        layout.positions_BT[row, slots] = source.size + steps - 1
        layout.segments_BT[row, slots] = 1
        layout.order_BT[row, slots] = order
        layout.valid_BT[row, slots] = True
    layout.targets_BM[row, : target.size] = target
    layout.weights_BM[row, : target.size] = 1.0
