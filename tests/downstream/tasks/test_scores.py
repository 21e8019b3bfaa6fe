"""Metrics against their definitions written out, and against values known from elsewhere."""

from __future__ import annotations

import math
import random

import pytest

from pmlm_dist.downstream.tasks import scores


def longhand_matthews(right: list[str], said: list[str]) -> float:
    pairs = list(zip(right, said, strict=True))
    tp, tn = pairs.count(("1", "1")), pairs.count(("0", "0"))
    fp, fn = pairs.count(("0", "1")), pairs.count(("1", "0"))
    under = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(under) if under else 0.0


def longhand_pearson(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def ranks(x: list[float]) -> list[float]:
    """Ties share the mean of their ranks."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_are_their_definitions(seed: int):
    draw = random.Random(seed)
    right, said = ([draw.choice("01") for _ in range(40)] for _ in range(2))
    pairs = list(zip(right, said, strict=True))
    tp = pairs.count(("1", "1"))
    assert scores.accuracy(right, said) == pytest.approx(sum(a == b for a, b in pairs) / 40)
    assert scores.matthews(right, said) == pytest.approx(longhand_matthews(right, said))
    assert scores.f1_of("1")(right, said) == pytest.approx(2 * tp / (right.count("1") + said.count("1")))


def test_metrics_where_only_one_class_is_predicted():
    assert scores.matthews(["0", "1", "1"], ["1", "1", "1"]) == 0.0
    assert scores.f1_of("1")(["0", "0"], ["0", "0"]) == 0.0
    assert scores.accuracy(["0", "1"], ["1", "1"]) == 0.5
    assert scores.macro_f1(["a", "b"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_correlations_are_their_definitions():
    x, y = [0.0, 1.5, 1.5, 3.0, 5.0], [0.5, 1.0, 2.0, 2.0, 4.0]
    assert scores.pearson(x, y) == pytest.approx(longhand_pearson(x, y))
    assert scores.spearman(x, y) == pytest.approx(longhand_pearson(ranks(x), ranks(y)))
    assert scores.root_mean_square_error([1.0, 2.0], [1.0, 4.0]) == pytest.approx(math.sqrt(2))


def test_a_correlation_that_is_not_defined_is_no_number():
    for right, said in [([1.0, 2.0], [3.0, 3.0]), ([1.0, 2.0], [math.nan, 1.0]), ([1.0], [1.0])]:
        assert math.isnan(scores.pearson(right, said))
        assert math.isnan(scores.spearman(right, said))


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Denver  broncos won", ["a Denver Broncos"], 0, 0.8),
        ("Broncos", ["Carolina", "Denver Broncos"], 0, 2 / 3),
        ("An apple--a day.", ["apple a day"], 0, 2 * 1 / (2 + 2)),
        ("theatre", ["the atre"], 0, 0),
        ("1,000", ["1000"], 1, 1),
        ("\u201cquoted\u201d", ["quoted"], 0, 0),
        ("", [], 1, 1),
        ("Denver", [], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", ["Denver"], 0, 0),
        ("to be to be", ["to be"], 0, 2 * 2 / 6),
    ],
)
def test_answers_are_compared_as_squad_does(answer: str, right: list[str], exact: float, f1: float):
    assert scores.exact_match(answer, right) == exact
    assert scores.overlap_f1(answer, right) == pytest.approx(f1)


def test_squad_scores_are_percent_and_told_apart_where_both_kinds_are_there():
    assert scores.squad_scores([["a cat"], ["dog"]], ["cat", "bird"]) == {"exact": 50.0, "f1": 50.0}
    found = scores.squad_scores([["cat"], []], ["cat", "bird"])
    assert found == {
        **{"exact": 50.0, "f1": 50.0, "has_answer_exact": 100.0, "has_answer_f1": 100.0},
        **{"no_answer_exact": 0.0, "no_answer_f1": 0.0},
    }
