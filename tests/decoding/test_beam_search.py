"""Beam search and sampling against brute force over every hypothesis of a toy language."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmlm_dist.decoding.beam_search import BeamSearch, Rules, ScoresNotFinite, blockwise_topk
from pmlm_dist.decoding.sampling import Sampling
from pmlm_dist.decoding.settings import DecodingConfig

END = 0
NextLogits = Callable[[tuple[int, ...]], np.ndarray]


def toy_language(vocabulary: int, seed: int) -> NextLogits:
    """Random logits that depend on all previous tokens."""

    def logits(prefix: tuple[int, ...]) -> np.ndarray:
        return 2 * np.random.default_rng((seed, len(prefix), *prefix)).standard_normal(vocabulary)

    return logits


def rules_of(*, forbidden: tuple[int, ...] = (), **settings: Any) -> Rules:
    """Rules without any constraint but those of `settings`."""
    config = DecodingConfig(**{"min_length": 0, "no_repeat_ngram": 0, "length_penalty": 0.0, **settings})
    return Rules(config, END, forbidden)


def search_of(kind: Callable[[Rules], Any], rules: Rules, **settings: Any) -> Any:
    """A search by `rules` with further settings."""
    method = "beam" if kind is BeamSearch else "sample"
    return kind(replace(rules, config=replace(rules.config, **{"method": method, **settings})))


def run(search, languages: list[NextLogits]):
    """Run the search over a batch of languages, one for each sample."""
    state = search.start(len(languages))
    while not bool(state.done_B.all()):
        prefixes = state.tokens_BKL.tolist()
        logits = [[language(tuple(p)) for p in row] for language, row in zip(languages, prefixes, strict=True)]
        state = search.advance(state, torch.from_numpy(np.array(logits)))
    return search.hypotheses(state)


def log_p(language: NextLogits, tokens: tuple[int, ...]) -> float:
    total = 0.0
    for n, token in enumerate(tokens):
        logits = language(tokens[:n])
        total += logits[token] - math.log(np.exp(logits).sum())
    return total


def repeats(tokens: tuple[int, ...], size: int) -> bool:
    grams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
    return size > 0 and len(set(grams)) < len(grams)


def all_hypotheses(rules: Rules, vocabulary: int) -> list[tuple[int, ...]]:
    """All sequences that the rules allow, longhand."""
    words = [w for w in range(vocabulary) if w != rules.end_id and w not in rules.forbidden]
    sequences = []
    for n in range(rules.config.max_length + 1):
        for content in itertools.product(words, repeat=n):
            if repeats(content, rules.config.no_repeat_ngram):
                continue
            if n < rules.config.max_length and n >= rules.config.min_length:
                sequences.append((*content, rules.end_id))
            if n == rules.config.max_length:
                sequences.append(content)
    return sequences


def ranking(language: NextLogits, rules: Rules, vocabulary: int, alpha: float) -> list[tuple[float, tuple[int, ...]]]:
    """All hypotheses, best first, by the formula."""
    scored = [(log_p(language, h) / ((5 + len(h)) / 6) ** alpha, h) for h in all_hypotheses(rules, vocabulary)]
    return sorted(scored, reverse=True)


@given(
    seed=st.integers(0, 10_000),
    alpha=st.sampled_from([-1.0, 0.0, 0.7, 2.0]),
    min_length=st.integers(0, 2),
    ngram=st.integers(0, 3),
    forbidden=st.sampled_from([(), (1,)]),
)
@settings(max_examples=25, deadline=None)
def test_wide_beam_equals_exhaustive_search(seed, alpha, min_length, ngram, forbidden):
    rules = rules_of(max_length=3, min_length=min_length, no_repeat_ngram=ngram, forbidden=forbidden)
    vocabulary, languages = 4, [toy_language(4, seed), toy_language(4, seed + 1)]
    search = search_of(BeamSearch, rules, beam=vocabulary**3, length_penalty=alpha, num_return_sequences=4)
    for language, hypotheses in zip(languages, run(search, languages), strict=True):
        expected = ranking(language, rules, vocabulary, alpha)[:4]
        assert len(hypotheses) == len(expected)
        for hypothesis, (score, tokens) in zip(hypotheses, expected, strict=True):
            assert (*hypothesis.tokens, *([END] if hypothesis.ended else [])) == tokens
            assert hypothesis.score == pytest.approx(score, abs=1e-9)


@given(seed=st.integers(0, 10_000), beams=st.integers(1, 4), min_length=st.integers(0, 5), ngram=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_narrow_beams_greedy_and_sampling_respect_rules_and_score_formula(seed, beams, min_length, ngram):
    rules = rules_of(max_length=7, min_length=min_length, no_repeat_ngram=ngram, forbidden=(2,))
    language = toy_language(6, seed)
    for search, alpha in (
        (search_of(BeamSearch, rules, beam=beams, length_penalty=0.7, num_return_sequences=beams), 0.7),
        (search_of(BeamSearch, rules, beam=beams, length_penalty=0.7, stop="first"), 0.7),
        (search_of(Sampling, rules, method="greedy"), 0.0),
        (search_of(Sampling, rules, temperature=1.5, seed=seed), 0.0),
    ):
        (hypotheses,) = run(search, [language])
        for hypothesis in hypotheses:
            tokens = (*hypothesis.tokens, *([END] if hypothesis.ended else []))
            if isinstance(search, Sampling) and ngram == 1:
                continue  # all tokens may be forbidden: tested below
            assert tokens in Allowed(rules)
            assert hypothesis.score == pytest.approx(
                log_p(language, tokens) / ((5 + len(tokens)) / 6) ** alpha, abs=1e-5
            )
        assert [hypothesis.score for hypothesis in hypotheses] == sorted((a.score for a in hypotheses), reverse=True)


class Allowed:
    """Membership test of the sequences that the rules allow, without listing them."""

    def __init__(self, rules: Rules):
        self.rules = rules

    def __contains__(self, tokens: tuple[int, ...]) -> bool:
        rules, ended = self.rules, tokens[-1:] == (END,)
        content = tokens[:-1] if ended else tokens
        return (
            END not in content
            and not set(content) & set(rules.forbidden)
            and not repeats(content, rules.config.no_repeat_ngram)
            and (
                len(tokens) <= rules.config.max_length and len(content) >= rules.config.min_length
                if ended
                else len(tokens) == rules.config.max_length
            )
        )


def longhand_beam(language: NextLogits, rules: Rules, vocabulary: int, *, beams: int, alpha: float):
    """Beam search as described in the module's docstring, with lists and without early stopping."""
    live, pool = [(0.0, ())], []
    for length in range(1, rules.config.max_length + 1):
        candidates = []
        for score, prefix in live:
            logits = language(prefix)
            log_probabilities = logits - math.log(np.exp(logits).sum())
            for word in range(vocabulary):
                if word in rules.forbidden or (word == END and len(prefix) < rules.config.min_length):
                    continue
                if word != END and repeats((*prefix, word), rules.config.no_repeat_ngram):
                    continue
                candidates.append((score + log_probabilities[word], (*prefix, word)))
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        pool += [c for c in candidates[:beams] if c[1][-1] == END]
        live = [c for c in candidates if c[1][-1] != END][:beams]
        if length == rules.config.max_length:
            pool += live
    return sorted(((s / ((5 + len(h)) / 6) ** alpha, h) for s, h in pool), reverse=True)


@given(
    seed=st.integers(0, 10_000),
    beams=st.integers(1, 4),
    alpha=st.sampled_from([-0.5, 0.0, 1.3]),
    ngram=st.integers(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_narrow_beams_equal_longhand_without_early_stopping(seed, beams, alpha, ngram):
    rules = rules_of(max_length=6, min_length=1, no_repeat_ngram=ngram)
    language = toy_language(5, seed)
    (hypotheses,) = run(search_of(BeamSearch, rules, beam=beams, length_penalty=alpha), [language])
    expected = longhand_beam(language, rules, 5, beams=beams, alpha=alpha)
    assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx(
        [score for score, _ in expected[:1]], abs=1e-9
    )


def test_greedy_takes_argmax_and_samples_do_not_depend_on_batch():
    rules = rules_of(max_length=5)
    languages = [toy_language(6, seed) for seed in range(3)]
    (greedy,), *_ = run(search_of(Sampling, rules, method="greedy"), languages)
    expected = ()
    while len(expected) < 5 and expected[-1:] != (END,):
        expected += (int(languages[0](expected).argmax()),)
    assert greedy.tokens == tuple(token for token in expected if token != END)
    search = search_of(Sampling, rules, temperature=2.0, seed=3)
    together = run(search, languages)
    state = search.start(1, sample_ids=[1])
    while not bool(state.done_B.all()):
        state = search.advance(
            state, torch.from_numpy(languages[1](tuple(state.tokens_BKL[0, 0].tolist())))[None, None]
        )
    assert search.hypotheses(state)[0] == together[1]
    assert run(search_of(Sampling, rules, temperature=2.0, seed=4), languages) != together


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(0, 1.0, 4), (2, 1.0, 2), (0, 0.5, 1), (0, 0.51, 2), (3, 0.85, 3)]
)
def test_draws_have_frequencies_of_truncated_distribution(top_k, top_p, kept):
    p = np.array([0.05, 0.5, 0.15, 0.3])
    search = search_of(Sampling, rules_of(max_length=1), top_k=top_k, top_p=top_p)
    uniform = torch.arange(0, 1, 1 / 2000, dtype=torch.float64) + 1 / 4000
    drawn = search.pick(torch.from_numpy(np.log(p)).expand(2000, -1), uniform)
    expected = np.where(p >= np.sort(p)[-kept], p, 0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, expected / expected.sum(), atol=2e-3)


def test_low_temperature_sharpens_distribution():
    search = search_of(Sampling, rules_of(max_length=1), temperature=0.5)
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = search.pick(torch.tensor([0.6, 0.4]).log().expand(1000, -1), uniform)
    assert np.bincount(drawn)[0] / 1000 == pytest.approx(0.36 / 0.52, abs=2e-3)


@pytest.mark.parametrize("kind", [BeamSearch, Sampling])
def test_nan_logits_raise(kind):
    search = search_of(kind, rules_of(max_length=4), beam=3)
    state = search.start(2)
    logits = torch.zeros(2, 1, 50)
    logits[1, 0, 7] = float("nan")
    with pytest.raises(ScoresNotFinite, match=r"1 of 2 samples are not finite"):
        search.advance(state, logits)


def test_rules_that_allow_nothing_give_no_hypothesis():
    rules = rules_of(max_length=5, min_length=4, no_repeat_ngram=1)
    assert run(search_of(BeamSearch, rules, beam=2), [toy_language(3, 0)]) == [[]]


@given(seed=st.integers(0, 1000), width=st.integers(1, 9000), count=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_blockwise_topk_equals_topk(seed, width, count):
    scores = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    best, index = blockwise_topk(scores, count=count)
    n = min(count, width)
    expected, expected_index = scores.topk(n, dim=1)
    assert torch.equal(best[:, :n], expected)
    assert torch.equal(index[:, :n], expected_index)
    assert (best[:, n:] == float("-inf")).all()
