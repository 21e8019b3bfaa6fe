"""The sampler against the statistics of the paper and a longhand version of Algorithm 1 in plain Python."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masked_samples import MaskedSample, mask_sample

from pmlm_dist.config import MaskingConfig
from pmlm_dist.masking.blockwise import SpecialIds, mask_rule, max_predictions

PAD, UNK, CLS, SEP, MASK = range(5)
VOCAB_SIZE = 1000
SPECIAL = SpecialIds(pad=PAD, cls=CLS, sep=SEP, mask=MASK, vocab_size=VOCAB_SIZE, special=(PAD, UNK, CLS, SEP, MASK))


class LonghandRandom:
    """splitmix64 in Python integers."""

    def __init__(self, seed: int, epoch: int, item: int):
        self.state = 0
        for part in (seed, epoch, item):
            self.state = self._mix(((self.state ^ part) + 0x9E3779B97F4A7C15) % 2**64)

    @staticmethod
    def _mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    def bits(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        return self._mix(self.state)

    def uniform(self) -> float:
        return (self.bits() >> 11) / 2**53

    def below(self, bound: int) -> int:
        return (self.bits() >> 32) * bound >> 32


def longhand_spans(tokens: list[int], masking: MaskingConfig, random: LonghandRandom) -> list[list[int]]:
    """Spans in factorization order, computed with sets and lists."""
    maskable = {position for position, token in enumerate(tokens) if token not in (CLS, SEP, PAD)}
    wanted = min(max(1, math.ceil(masking.rate * len(tokens) - 1e-9)), len(maskable))
    spans: list[list[int]] = []
    rejected = 0
    while sum(map(len, spans)) < wanted:
        start = random.below(len(tokens))
        length = 1
        if rejected < 16 * len(tokens) and random.uniform() < masking.span_probability:
            length = random.below(masking.max_span - masking.min_span + 1) + masking.min_span
        span = list(range(start, start + length))
        if any(position not in maskable for position in span):
            rejected += 1
            continue
        rejected = 0
        if masking.stop == "exact":
            span = span[: wanted - sum(map(len, spans))]
        maskable -= set(span)
        spans.append(span)
    return spans


def longhand_corruption(
    tokens: list[int], predicted: list[int], masking: MaskingConfig, random: LonghandRandom
) -> list[int]:
    context = list(tokens)
    replacements = range(5, VOCAB_SIZE)
    for position in predicted:
        draw = 0.0 if masking.corruption == "mask_only" else random.uniform()
        if draw < 0.8:
            context[position] = MASK
        elif draw < 0.9:
            context[position] = replacements[random.below(len(replacements))]
    return context


def masked(
    tokens: list[int], masking: MaskingConfig, *, seed: int = 0, epoch: int = 0, sample_id: int = 0
) -> MaskedSample:
    rule = mask_rule(masking, SPECIAL)
    return mask_sample(np.array(tokens, np.uint16), rule=rule, seed=seed, epoch=epoch, sample_id=sample_id)


def text(length: int) -> list[int]:
    """[CLS] S1 [SEP] S2 [SEP] without repeated tokens."""
    words = list(range(5, 2 + length))
    return [CLS, *words[: length // 2], SEP, *words[length // 2 :], SEP]


maskings = st.builds(
    MaskingConfig,
    rate=st.sampled_from([0.05, 0.15, 0.3, 0.5]),
    span_probability=st.sampled_from([0.0, 0.4, 1.0]),
    min_span=st.integers(2, 3),
    max_span=st.integers(3, 6),
    stop=st.sampled_from(["exact", "paper"]),
    corruption=st.sampled_from(["paper", "mask_only"]),
)
numbers = st.integers(0, 2**40)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), maskings, numbers, numbers, numbers)
def test_sampler_equals_longhand(tokens, masking, seed, epoch, sample_id):
    random = LonghandRandom(seed, epoch, sample_id)
    spans = longhand_spans(tokens, masking, random)
    predicted = [position for span in spans for position in span]
    context = longhand_corruption(tokens, predicted, masking, random)

    sample = masked(tokens, masking, seed=seed, epoch=epoch, sample_id=sample_id)

    assert sample.predicted.tolist() == predicted
    assert sample.steps.tolist() == [step for step, span in enumerate(spans, start=1) for _ in span]
    assert sample.context.tolist() == context
    assert sample.predicted.size <= max_predictions(len(tokens), masking)
    if masking.corruption == "mask_only":
        assert sample.masked.all()


@pytest.fixture(scope="module")
def paper_draws() -> list[MaskedSample]:
    return [masked(text(512), MaskingConfig(stop="paper"), sample_id=number) for number in range(8_000)]


def span_lengths(sample: MaskedSample) -> list[int]:
    return list(Counter(sample.steps.tolist()).values())


def test_sampler_at_512_tokens_has_statistics_of_algorithm_1(paper_draws):
    """Numbers of predicted tokens and spans, and lengths of spans."""
    tokens = np.array([sample.predicted.size for sample in paper_draws])
    spans = np.array([sample.steps.max() for sample in paper_draws])
    lengths = Counter(length for sample in paper_draws for length in span_lengths(sample))
    assert (tokens.min(), tokens.max()) == (77, 82)
    assert max_predictions(512, MaskingConfig(stop="paper")) == 82
    assert tokens.mean() == pytest.approx(78.1, abs=0.05)
    assert spans.mean() == pytest.approx(37.5, abs=0.2)
    assert 17 <= spans.min() <= 21
    assert 54 <= spans.max() <= 59
    assert lengths[1] / spans.sum() == pytest.approx(0.62, abs=0.015)
    assert lengths[1] / tokens.sum() == pytest.approx(0.30, abs=0.005)
    assert set(lengths) == {1, 2, 3, 4, 5, 6}


def test_spans_are_contiguous_and_cover_the_text_evenly(paper_draws):
    hits = np.zeros(512)
    for sample in paper_draws:
        hits[sample.predicted] += 1
        assert np.unique(sample.predicted).size == sample.predicted.size
        gaps, same_span = np.diff(sample.predicted), np.diff(sample.steps) == 0
        assert (gaps[same_span] == 1).all()
    words = np.array(text(512)) >= 5
    assert not hits[~words].any()
    inner = hits[words][20:200]
    assert inner.std() / inner.mean() < 0.03


@pytest.mark.parametrize(
    ("length", "count"), [(512, 77), (128, 20), (100, 15), (20, 3), (7, 2), (4, 1)], ids=lambda number: f"{number}"
)
def test_stop_exact_predicts_ceil_of_rate_times_length(length, count):
    """0.15 * 100 and 0.15 * 20 are whole numbers and must not be rounded up."""
    assert max_predictions(length, MaskingConfig()) == count
    assert {masked(text(length), MaskingConfig(), sample_id=number).predicted.size for number in range(200)} == {count}


def test_stop_exact_differs_from_stop_paper_in_last_span_only():
    for number in range(200):
        exact = masked(text(512), MaskingConfig(), sample_id=number)
        paper = masked(text(512), MaskingConfig(stop="paper"), sample_id=number)
        assert exact.predicted.tolist() == paper.predicted[:77].tolist()
        assert exact.steps.tolist() == paper.steps[:77].tolist()


def test_short_texts_have_at_most_all_tokens_masked():
    assert masked([CLS, 9, SEP], MaskingConfig(rate=0.5, span_probability=1.0)).predicted.tolist() == [1]
    assert masked([CLS, SEP, PAD, PAD], MaskingConfig()).predicted.size == 0


def test_corruption_rates(paper_draws):
    original = np.array(text(512))
    kinds = Counter()
    replacements = Counter()
    for sample in paper_draws[:4000]:
        at_predicted = sample.context[sample.predicted]
        kept = at_predicted == original[sample.predicted]
        replaced = ~kept & ~sample.masked
        kinds.update(masked=int(sample.masked.sum()), kept=int(kept.sum()), replaced=int(replaced.sum()))
        replacements.update(at_predicted[replaced].tolist())
        untouched = np.ones(512, bool)
        untouched[sample.predicted] = False
        assert (sample.context[untouched] == original[untouched]).all()
        assert (at_predicted[sample.masked] == MASK).all()
    shares = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert shares == pytest.approx({"masked": 0.8, "kept": 0.1, "replaced": 0.1}, abs=0.003)
    assert set(replacements) == set(range(5, VOCAB_SIZE))
    assert max(replacements.values()) < 2 * replacements.total() / (VOCAB_SIZE - 5)


def test_corruption_within_spans_is_independent():
    """A span of six tokens is all [MASK] with probability 0.8^6 = 26 %."""
    masking = MaskingConfig(span_probability=1.0, min_span=6, max_span=6, stop="paper")
    spans = [masked(text(40), masking, sample_id=number).masked for number in range(5000)]
    assert np.mean([span.all() for span in spans]) == pytest.approx(0.8**6, abs=0.02)


def test_masks_change_with_seed_epoch_and_sample():
    draws = [
        masked(text(128), MaskingConfig(), seed=seed, epoch=epoch, sample_id=sample_id)
        for seed in range(4)
        for epoch in range(4)
        for sample_id in range(4)
    ]
    assert len({tuple(sample.predicted.tolist()) for sample in draws}) == 64


def test_mask_rule_with_special_tokens_only_raises():
    only_special = SpecialIds(pad=0, cls=1, sep=2, mask=3, vocab_size=4, special=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="special tokens only"):
        mask_rule(MaskingConfig(), only_special)
