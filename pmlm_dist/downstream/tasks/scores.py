"""Scores of understanding: pure functions from what is right and what was predicted to numbers.

Classification and correlation are scikit-learn's and SciPy's. The metrics of SQuAD (Rajpurkar et al., 2016, 2018) are
written here as its evaluation defines them: answers are compared in lower case, without punctuation, English articles
and extra blanks; a question scores the best of its right answers; one without an answer is right when none is given.
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from scipy import stats
from sklearn import metrics

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def accuracy(right: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of predictions that are right."""
    return float(metrics.accuracy_score(right, predicted))


def f1_of(positive: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    """F1 of the class `positive`; 0 where it is neither there nor predicted."""

    def f1(right: Sequence[str], predicted: Sequence[str]) -> float:
        hits = [label == positive for label in right], [label == positive for label in predicted]
        return float(metrics.f1_score(*hits, zero_division=0))  # pyright: ignore[reportArgumentType]

    return f1


def macro_f1(right: Sequence[str], predicted: Sequence[str]) -> float:
    """Mean of the F1 of every class that is there or predicted."""
    return float(metrics.f1_score(right, predicted, average="macro", zero_division=0))  # pyright: ignore


def matthews(right: Sequence[str], predicted: Sequence[str]) -> float:
    """Matthews' correlation coefficient; 0 where all predictions, or all that is right, are of one class."""
    return float(metrics.matthews_corrcoef(right, predicted))


def pearson(right: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson's correlation; NaN where either side is constant or holds a NaN."""
    return _correlation(stats.pearsonr, right, predicted)


def spearman(right: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where either side is constant or holds a NaN."""
    return _correlation(stats.spearmanr, right, predicted)


def _correlation(
    measure: Callable[..., tuple[float, float]], right: Sequence[float], predicted: Sequence[float]
) -> float:
    if len(right) < 2 or not all(map(math.isfinite, [*right, *predicted])):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An input array is constant")  # NaN says it
        return float(measure(right, predicted)[0])


def root_mean_square_error(right: Sequence[float], predicted: Sequence[float]) -> float:
    """Of scores."""
    return float(metrics.root_mean_squared_error(right, predicted)) if all(map(math.isfinite, predicted)) else math.nan


# --------------------------------------------------------------------------------------------------------------- SQuAD


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it.

    >>> normalised("The  Eiffel-Tower, in a word")
    'eiffeltower in word'
    """
    kept = "".join(character for character in answer.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if `answer` is one of the right ones; for a question without an answer, if it is empty."""
    return float(any(normalized(answer) == normalized(other) for other in right or [""]))


def overlap_f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 over words of `answer` and one of the right ones; without words on either side, whether both are."""
    return max(_word_f1(normalized(answer).split(), normalized(other).split()) for other in right or [""])


def _word_f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    common = (Counter(answer) & Counter(right)).total()
    return 2 * common / (len(answer) + len(right))


def squad_scores(right: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Mean exact match and F1 in percent, over all and, where there are both kinds, with and without an answer."""
    pairs = list(zip(right, predicted, strict=True))
    kinds = {"": pairs, "has_answer_": [p for p in pairs if p[0]], "no_answer_": [p for p in pairs if not p[0]]}
    if not (kinds["has_answer_"] and kinds["no_answer_"]):
        kinds = {"": pairs}
    found = {}
    for name, of_kind in kinds.items():
        found[f"{name}exact"] = 100 * sum(exact_match(answer, golds) for golds, answer in of_kind) / len(of_kind)
        found[f"{name}f1"] = 100 * sum(overlap_f1(answer, golds) for golds, answer in of_kind) / len(of_kind)
    return found
