"""The compiled layout against a longhand version in plain Python, slot by slot."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masked_samples import mask_sample

from pmlm_dist.config import MaskingConfig
from pmlm_dist.masking.blockwise import MaskRule, SpecialIds, mask_rule, max_predictions
from pmlm_dist.masking.layout import Layout, build_layout, empty_layout
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = SpecialIds(pad=PAD, cls=CLS, sep=SEP, mask=MASK, vocab_size=50, special=(PAD, UNK, CLS, SEP, MASK))
S = 24

samples_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(5, 49), min_size=0, max_size=10), st.lists(st.integers(5, 49), min_size=0, max_size=10)
    ),
    min_size=1,
    max_size=5,
)


def laid_out(samples: list[list[int]], masking: MaskingConfig, *, first_id: int = 0, epoch: int = 0) -> Layout:
    layout = empty_layout(len(samples), sequence_length=S, num_predictions=max_predictions(S, masking), pad_id=PAD)
    build_layout(
        [np.array(sample, np.uint16) for sample in samples],
        sample_ids=np.arange(first_id, first_id + len(samples)),
        epochs=np.full(len(samples), epoch),
        seed=7,
        rule=mask_rule(masking, SPECIAL),
        layout=layout,
    )
    return layout


def longhand_row(
    tokens: list[int], rule: MaskRule, *, num_predictions: int, sample_id: int, epoch: int
) -> dict[str, list]:
    """Expected fields of one row, from the masks of the single sample."""
    masked = mask_sample(np.array(tokens), rule=rule, seed=7, epoch=epoch, sample_id=sample_id)
    predicted, steps = masked.predicted.tolist(), masked.steps.tolist()
    unused = num_predictions - len(predicted)
    first_sep = tokens.index(SEP)
    segments = [0 if position <= first_sep else 1 for position in range(S)]
    appended_segments = [segments[position] for position in predicted] + [0] * unused
    originals = [tokens[position] for position in predicted]
    shown = len(masked.context)  # all tokens, or those before the cut of a prefix sample
    padding = S - shown
    used = [True] * len(predicted) + [False] * unused
    return {
        "tokens_BT": masked.context.tolist()
        + [PAD] * padding
        + originals
        + [PAD] * unused
        + [MASK] * len(predicted)
        + [PAD] * unused,
        "positions_BT": list(range(S)) + (predicted + [0] * unused) * 2,
        "segments_BT": segments + appended_segments * 2,
        "order_BT": [0] * S + steps + [0] * unused + [-step for step in steps] + [0] * unused,
        "valid_BT": [True] * shown + [False] * padding + used * 2,
        "predicted_BM": predicted + [0] * unused,
        "targets_BM": originals + [PAD] * unused,
        "weights_BM": [float(use) for use in used],
        "masked_BM": masked.masked.tolist() + [False] * unused,
    }


@settings(max_examples=150, deadline=None)
@given(
    samples_strategy,
    st.builds(
        MaskingConfig,
        stop=st.sampled_from(["exact", "paper"]),
        corruption=st.sampled_from(["paper", "mask_only"]),
        prefix_share=st.sampled_from([0.0, 0.5, 1.0]),
    ),
    st.integers(0, 10**12),
    st.integers(0, 100),
)
def test_layout_equals_longhand(segments, masking, first_id, epoch):
    samples = [[CLS, *first, SEP, *second, SEP] for first, second in segments]
    layout = laid_out(samples, masking, first_id=first_id, epoch=epoch)
    for row, sample in enumerate(samples):
        expected = longhand_row(
            sample,
            mask_rule(masking, SPECIAL),
            num_predictions=max_predictions(S, masking),
            sample_id=first_id + row,
            epoch=epoch,
        )
        for name, values in expected.items():
            assert getattr(layout, name)[row].tolist() == values, name


def test_three_slots_of_a_prediction_share_position_and_segment():
    layout = laid_out([[CLS, *range(5, 15), SEP, *range(20, 31), SEP]], MaskingConfig())
    num_predictions = max_predictions(S, MaskingConfig())
    base = layout.predicted_BM[0]
    for slots in (slice(S, S + num_predictions), slice(S + num_predictions, None)):
        assert layout.positions_BT[0, slots].tolist() == base.tolist()
        assert layout.segments_BT[0, slots].tolist() == layout.segments_BT[0, base].tolist()
    assert layout.weights_BM.all()


def test_steps_ascend_and_positions_ascend_within_a_step():
    layout = laid_out([[CLS, *range(5, 15), SEP, *range(20, 31), SEP]] * 50, MaskingConfig(rate=0.5))
    num_predictions = max_predictions(S, MaskingConfig(rate=0.5))
    for row in range(50):
        slots = list(zip(layout.order_BT[row, S : S + num_predictions], layout.predicted_BM[row], strict=True))
        assert slots == sorted(slots)
        assert slots[0][0] == 1
        assert all(later - earlier in (0, 1) for (earlier, _), (later, _) in pairwise(slots))


def test_prefix_sample_is_laid_out_as_a_pair():
    """Context, steps and positions are those of a source and its target."""
    tokens = [CLS, *range(5, 27), SEP]
    layout = laid_out([tokens] * 20, MaskingConfig(rate=0.25, prefix_share=1.0))
    cuts = layout.valid_BT[:, :S].sum(axis=1)
    assert set(cuts) <= set(range(1, 19))
    assert len(set(cuts)) > 5
    rule = Seq2SeqRule(max_source=S, max_target=6, noise=False)
    for row, cut in enumerate(cuts.tolist()):
        # [CLS] and [SEP] are added to a source of cut - 2 words, and [SEP] to a target of 5.
        pair = (np.array(tokens[1 : cut - 1], np.int64), np.array(tokens[cut : cut + 5]))
        of_pair = build_seq2seq_layout([pair], sample_ids=[0], epochs=[0], seed=0, rule=rule, special=SPECIAL)
        for name in ("order_BT", "valid_BT", "positions_BT") if cut >= 2 else ("order_BT",):
            assert getattr(layout, name)[row, S:].tolist() == getattr(of_pair, name)[0, S:].tolist(), name
        assert layout.valid_BT[row, :S].tolist() == [True] * cut + [False] * (S - cut)
        assert layout.tokens_BT[row, :S].tolist() == tokens[:cut] + [PAD] * (S - cut)
        assert layout.tokens_BT[row, S:].tolist() == tokens[cut : cut + 6] + [MASK] * 6
        assert layout.targets_BM[row].tolist() == tokens[cut : cut + 6]


def test_share_of_prefix_samples_leaves_the_other_samples_as_they_are():
    samples = [[CLS, *range(5, 27), SEP]] * 400
    plain, mixed = laid_out(samples, MaskingConfig()), laid_out(samples, MaskingConfig(prefix_share=0.25))
    is_prefix = ~np.take_along_axis(mixed.valid_BT, mixed.predicted_BM, axis=1)[:, 0]
    assert 70 <= is_prefix.sum() <= 130
    for name in Layout._fields:
        assert np.array_equal(getattr(plain, name)[~is_prefix], getattr(mixed, name)[~is_prefix])


def test_sample_longer_than_context_raises():
    with pytest.raises(ValueError, match=r"sample 3 has 25 tokens.*sequence length \(24\)"):
        laid_out([[CLS, SEP], [CLS, *range(5, 28), SEP]], MaskingConfig(), first_id=2)
