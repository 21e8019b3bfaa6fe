"""Beam search and sampling against brute force over every hypothesis of a toy language."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmlm_dist.decoding.beam_search import BeamSearch, Rules, ScoresNotFinite, best_of
from pmlm_dist.decoding.sampling import Sampling

END = 0
NextLogits = Callable[[tuple[int, ...]], np.ndarray]


def toy_language(vocabulary: int, seed: int) -> NextLogits:
    """Random logits that depend on everything written so far."""

    def logits(prefix: tuple[int, ...]) -> np.ndarray:
        return 2 * np.random.default_rng((seed, len(prefix), *prefix)).standard_normal(vocabulary)

    return logits


def run(search, languages: list[NextLogits]):
    """The search over a batch of languages, one a sample."""
    state = search.start(len(languages))
    while not bool(state.done_B.all()):
        prefixes = state.tokens_BKL.tolist()
        logits = [[language(tuple(p)) for p in of] for language, of in zip(languages, prefixes, strict=True)]
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
    """Every sequence that the rules allow, longhand."""
    words = [w for w in range(vocabulary) if w != rules.end_id and w not in rules.forbidden]
    found = []
    for n in range(rules.max_length + 1):
        for content in itertools.product(words, repeat=n):
            if repeats(content, rules.no_repeat_ngram):
                continue
            if n < rules.max_length and n >= rules.min_length:
                found.append((*content, rules.end_id))
            if n == rules.max_length:
                found.append(content)
    return found


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
def test_a_wide_enough_beam_finds_what_exhaustive_search_finds(seed, alpha, min_length, ngram, forbidden):
    rules = Rules(END, max_length=3, min_length=min_length, no_repeat_ngram=ngram, forbidden=forbidden)
    vocabulary, languages = 4, [toy_language(4, seed), toy_language(4, seed + 1)]
    search = BeamSearch(rules, vocabulary**3, alpha, returned=4)
    for language, answers in zip(languages, run(search, languages), strict=True):
        expected = ranking(language, rules, vocabulary, alpha)[:4]
        assert len(answers) == len(expected)
        for answer, (score, tokens) in zip(answers, expected, strict=True):
            assert (*answer.tokens, *([END] if answer.ended else [])) == tokens
            assert answer.score == pytest.approx(score, abs=1e-9)


@given(seed=st.integers(0, 10_000), beams=st.integers(1, 4), min_length=st.integers(0, 5), ngram=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_narrow_beams_greedy_and_sampling_obey_the_rules_and_score_by_the_formula(seed, beams, min_length, ngram):
    rules = Rules(END, max_length=7, min_length=min_length, no_repeat_ngram=ngram, forbidden=(2,))
    language = toy_language(6, seed)
    for search, alpha in (
        (BeamSearch(rules, beams, 0.7, returned=beams), 0.7),
        (BeamSearch(rules, beams, 0.7, stop="first"), 0.7),
        (Sampling(rules, temperature=0.0), 0.0),
        (Sampling(rules, temperature=1.5, seed=seed), 0.0),
    ):
        (answers,) = run(search, [language])
        for answer in answers:
            tokens = (*answer.tokens, *([END] if answer.ended else []))
            if isinstance(search, Sampling) and ngram == 1:
                continue  # nothing may be left to draw: tested below
            assert tokens in set_of_all(rules)
            assert answer.score == pytest.approx(log_p(language, tokens) / ((5 + len(tokens)) / 6) ** alpha, abs=1e-5)
        assert [answer.score for answer in answers] == sorted((a.score for a in answers), reverse=True)


class set_of_all:
    """Whether a sequence is one that the rules allow, without listing all of them."""

    def __init__(self, rules: Rules):
        self.rules = rules

    def __contains__(self, tokens: tuple[int, ...]) -> bool:
        rules, ended = self.rules, tokens[-1:] == (END,)
        content = tokens[:-1] if ended else tokens
        return (
            END not in content
            and not set(content) & set(rules.forbidden)
            and not repeats(content, rules.no_repeat_ngram)
            and (
                len(tokens) <= rules.max_length and len(content) >= rules.min_length
                if ended
                else len(tokens) == rules.max_length
            )
        )


def longhand_beam(language: NextLogits, rules: Rules, vocabulary: int, *, beams: int, alpha: float):
    """Beam search as the module's docstring describes it, in lists, without an early end."""
    live, pool = [(0.0, ())], []
    for length in range(1, rules.max_length + 1):
        every = []
        for score, prefix in live:
            logits = language(prefix)
            log_probabilities = logits - math.log(np.exp(logits).sum())
            for word in range(vocabulary):
                if word in rules.forbidden or (word == END and len(prefix) < rules.min_length):
                    continue
                if word != END and repeats((*prefix, word), rules.no_repeat_ngram):
                    continue
                every.append((score + log_probabilities[word], (*prefix, word)))
        every = sorted(every, reverse=True)[: 2 * beams]
        pool += [c for c in every[:beams] if c[1][-1] == END]
        live = [c for c in every if c[1][-1] != END][:beams]
        if length == rules.max_length:
            pool += live
    return sorted(((s / ((5 + len(h)) / 6) ** alpha, h) for s, h in pool), reverse=True)


@given(
    seed=st.integers(0, 10_000),
    beams=st.integers(1, 4),
    alpha=st.sampled_from([-0.5, 0.0, 1.3]),
    ngram=st.integers(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_narrow_beams_find_what_the_longhand_search_finds_which_never_ends_early(seed, beams, alpha, ngram):
    rules = Rules(END, max_length=6, min_length=1, no_repeat_ngram=ngram)
    language = toy_language(5, seed)
    (answers,) = run(BeamSearch(rules, beams, alpha), [language])
    expected = longhand_beam(language, rules, 5, beams=beams, alpha=alpha)
    assert [answer.score for answer in answers] == pytest.approx([score for score, _ in expected[:1]], abs=1e-9)


def test_greedy_takes_the_likeliest_and_a_sample_does_not_depend_on_its_batch():
    rules = Rules(END, max_length=5)
    languages = [toy_language(6, seed) for seed in range(3)]
    (greedy,), *_ = run(Sampling(rules, temperature=0.0), languages)
    expected = ()
    while len(expected) < 5 and expected[-1:] != (END,):
        expected += (int(languages[0](expected).argmax()),)
    assert greedy.tokens == tuple(token for token in expected if token != END)
    search = Sampling(rules, temperature=2.0, seed=3)
    together = run(search, languages)
    state = search.start(1, numbers=[1])
    while not bool(state.done_B.all()):
        state = search.advance(
            state, torch.from_numpy(languages[1](tuple(state.tokens_BKL[0, 0].tolist())))[None, None]
        )
    assert search.hypotheses(state)[0] == together[1]
    assert run(Sampling(rules, temperature=2.0, seed=4), languages) != together


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(0, 1.0, 4), (2, 1.0, 2), (0, 0.5, 1), (0, 0.51, 2), (3, 0.85, 3)]
)
def test_draws_have_the_frequencies_of_the_truncated_distribution(top_k, top_p, kept):
    p = np.array([0.05, 0.5, 0.15, 0.3])
    search = Sampling(Rules(END, max_length=1), top_k=top_k, top_p=top_p)
    uniform = torch.arange(0, 1, 1 / 2000, dtype=torch.float64) + 1 / 4000
    drawn = search.pick(torch.from_numpy(np.log(p)).expand(2000, -1), uniform)
    expected = np.where(p >= np.sort(p)[-kept], p, 0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, expected / expected.sum(), atol=2e-3)


def test_temperature_sharpens():
    search = Sampling(Rules(END, max_length=1), temperature=0.5)
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = search.pick(torch.tensor([0.6, 0.4]).log().expand(1000, -1), uniform)
    assert np.bincount(drawn)[0] / 1000 == pytest.approx(0.36 / 0.52, abs=2e-3)


@pytest.mark.parametrize("search", [BeamSearch(Rules(END, 4), 3), Sampling(Rules(END, 4))], ids=["beam", "sampling"])
def test_a_nan_is_one_clear_error(search):
    state = search.start(2)
    logits = torch.zeros(2, 1, 50)
    logits[1, 0, 7] = float("nan")
    with pytest.raises(ScoresNotFinite, match=r"1 of 2 samples are not finite"):
        search.advance(state, logits)


def test_where_the_rules_allow_nothing_there_is_no_answer():
    rules = Rules(END, max_length=5, min_length=4, no_repeat_ngram=1)
    assert run(BeamSearch(rules, 2), [toy_language(3, 0)]) == [[]]


@given(seed=st.integers(0, 1000), width=st.integers(1, 9000), count=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_the_narrowed_best_are_the_best(seed, width, count):
    scores = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    best, index = best_of(scores, count=count)
    n = min(count, width)
    expected, expected_index = scores.topk(n, dim=1)
    assert torch.equal(best[:, :n], expected)
    assert torch.equal(index[:, :n], expected_index)
    assert (best[:, n:] == float("-inf")).all()
