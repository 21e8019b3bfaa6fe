"""Metrics against longhand definitions and known values."""

import math
import random

import pytest

from pmlm_dist.downstream.tasks import scores


def longhand_matthews(labels: list[str], predicted: list[str]) -> float:
    pairs = list(zip(labels, predicted, strict=True))
    tp, tn = pairs.count(("1", "1")), pairs.count(("0", "0"))
    fp, fn = pairs.count(("0", "1")), pairs.count(("1", "0"))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def longhand_pearson(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def ranks(x: list[float]) -> list[float]:
    """Ranks from 1; ties get their mean rank."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_equal_longhand_definitions(seed: int):
    draw = random.Random(seed)
    labels, predicted = ([draw.choice("01") for _ in range(40)] for _ in range(2))
    pairs = list(zip(labels, predicted, strict=True))
    tp = pairs.count(("1", "1"))
    assert scores.accuracy(labels, predicted) == pytest.approx(sum(a == b for a, b in pairs) / 40)
    assert scores.matthews(labels, predicted) == pytest.approx(longhand_matthews(labels, predicted))
    assert scores.f1(labels, predicted) == pytest.approx(2 * tp / (labels.count("1") + predicted.count("1")))


def test_metrics_when_one_class_is_predicted():
    assert scores.matthews(["0", "1", "1"], ["1", "1", "1"]) == 0.0
    assert scores.f1(["0", "0"], ["0", "0"]) == 0.0
    assert scores.accuracy(["0", "1"], ["1", "1"]) == 0.5
    assert scores.macro_f1(["a", "b"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_correlations_equal_longhand_definitions():
    x, y = [0.0, 1.5, 1.5, 3.0, 5.0], [0.5, 1.0, 2.0, 2.0, 4.0]
    assert scores.pearson(x, y) == pytest.approx(longhand_pearson(x, y))
    assert scores.spearman(x, y) == pytest.approx(longhand_pearson(ranks(x), ranks(y)))
    assert scores.root_mean_square_error([1.0, 2.0], [1.0, 4.0]) == pytest.approx(math.sqrt(2))


def test_undefined_correlation_is_nan():
    for labels, predicted in [([1.0, 2.0], [3.0, 3.0]), ([1.0, 2.0], [math.nan, 1.0]), ([1.0], [1.0])]:
        assert math.isnan(scores.pearson(labels, predicted))
        assert math.isnan(scores.spearman(labels, predicted))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
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
        ("北京市", ["北京"], 0, 2 * 2 / 5),  # a character of a script without spaces is a word
    ],
)
def test_exact_match_and_f1_follow_squad(answer: str, references: list[str], exact: float, f1: float):
    assert scores.exact_match(answer, references) == exact
    assert scores.overlap_f1(answer, references) == pytest.approx(f1)


def test_squad_scores_are_percent_and_separate_if_some_are_unanswerable():
    assert scores.squad_scores([["a cat"], ["dog"]], ["cat", "bird"]) == {"exact": 50.0, "f1": 50.0}
    values = scores.squad_scores([["cat"], []], ["cat", "bird"])
    assert values == {
        **{"exact": 50.0, "f1": 50.0, "has_answer_exact": 100.0, "has_answer_f1": 100.0},
        **{"no_answer_exact": 0.0, "no_answer_f1": 0.0},
    }
