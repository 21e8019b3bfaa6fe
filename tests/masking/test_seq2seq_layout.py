"""The layout of source-target pairs, slot by slot, and its noise."""

from dataclasses import replace

import numpy as np
from support.batches import SPECIAL

from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout

RULE = Seq2SeqRule(max_source=6, max_target=3, noise=False)
PAIR = (np.array([10, 11]), np.array([20, 21]))
LONG = (np.arange(10, 20), np.arange(30, 40))


def laid_out(pairs, *, rule=RULE, seed=0, epoch=0, first=0, trim=False):
    ids = [first + n for n in range(len(pairs))]
    epochs = [epoch] * len(pairs)
    return build_seq2seq_layout(pairs, sample_ids=ids, epochs=epochs, seed=seed, rule=rule, special=SPECIAL, trim=trim)


def test_small_example_has_expected_slots():
    layout = laid_out([PAIR])
    cls, sep, mask, pad = SPECIAL.cls, SPECIAL.sep, SPECIAL.mask, SPECIAL.pad
    assert layout.tokens_BT[0].tolist() == [cls, 10, 11, sep, pad, pad, 20, 21, sep, mask, mask, mask]
    assert layout.positions_BT[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 4, 5, 6]
    assert layout.order_BT[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, -1, -2, -3]
    assert layout.segments_BT[0].tolist() == [0] * 6 + [1] * 6
    assert layout.valid_BT[0].tolist() == [True] * 4 + [False] * 2 + [True] * 6
    assert layout.targets_BM[0].tolist() == [20, 21, sep]
    assert layout.weights_BM[0].tolist() == [1, 1, 1]


def test_long_pairs_are_truncated_and_keep_special_tokens():
    layout = laid_out([LONG, PAIR])
    assert layout.tokens_BT[0, :6].tolist() == [SPECIAL.cls, 10, 11, 12, 13, SPECIAL.sep]
    assert layout.targets_BM[0].tolist() == [30, 31, SPECIAL.sep]
    trimmed = laid_out([PAIR, (PAIR[0][:1], PAIR[1][:1])], trim=True)
    assert trimmed.tokens_BT.shape == (2, 4 + 2 * 3)
    assert trimmed.weights_BM.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_noise_has_expected_shares_and_keeps_targets_and_closing_sep():
    rule = Seq2SeqRule(max_source=4, max_target=2001, noise=True)
    target = np.random.default_rng(0).integers(5, SPECIAL.vocab_size, size=2000)
    layout = laid_out([(PAIR[0], target)] * 4, rule=rule)
    shown, pseudo = layout.tokens_BT[:, 4:2005], layout.tokens_BT[:, 2005:]
    assert (layout.targets_BM[:, :2000] == target).all()
    assert (shown[:, -1] == SPECIAL.sep).all()
    np.testing.assert_allclose((pseudo == SPECIAL.mask).mean(), 0.8, atol=0.02)
    kept_by_chance = 0.1 / (SPECIAL.vocab_size - 5)
    np.testing.assert_allclose((pseudo[:, :2000] == target).mean(), 0.1 + kept_by_chance, atol=0.02)
    replaced = shown[:, :2000] != target
    assert (shown[:, :2000][replaced] == pseudo[:, :2000][replaced]).all()
    np.testing.assert_allclose(replaced.mean(), 0.5 * 0.9, atol=0.02)
    random = (pseudo != SPECIAL.mask) & ~np.isin(pseudo, list(SPECIAL.special))
    assert random.any()
    assert not np.isin(pseudo[:, :2000][pseudo[:, :2000] != SPECIAL.mask], list(SPECIAL.special)).any()


def test_noise_is_a_function_of_seed_epoch_and_sample():
    rule = replace(RULE, noise=True, max_target=10)
    pairs = [(PAIR[0], np.arange(30, 39))] * 3
    expected = laid_out(pairs, rule=rule).tokens_BT
    assert (laid_out(pairs[1:], rule=rule, first=1).tokens_BT == expected[1:]).all()
    assert (laid_out(pairs, rule=rule, epoch=1).tokens_BT != expected).any()
    assert (laid_out(pairs, rule=rule, seed=1).tokens_BT != expected).any()
