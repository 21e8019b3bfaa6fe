"""Metrics of classification, regression and question answering: pure functions of labels and predictions.

Classification metrics are scikit-learn's, correlations SciPy's. SQuAD's metrics (Rajpurkar et al., 2016, 2018) follow
its evaluation script. Answers are compared in lower case, without punctuation, English articles and extra white space.
A prediction scores the maximum over the reference answers. An unanswerable question is correct if the answer is empty.
"""

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from scipy import stats
from sklearn import metrics

from pmlm_dist.downstream.tasks.overlap import is_unspaced

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def accuracy(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the fraction of correct predictions."""
    return float(metrics.accuracy_score(labels, predicted))


def f1(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the F1 of class "1"; it is 0 if the class occurs in neither labels nor predictions."""
    is_positive = [label == "1" for label in labels], [label == "1" for label in predicted]
    return float(metrics.f1_score(*is_positive, zero_division=0))  # pyright: ignore[reportArgumentType]


def macro_f1(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the mean F1 over the classes that occur in labels or predictions."""
    return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))  # pyright: ignore


def matthews(labels: Sequence[str], predicted: Sequence[str]) -> float:
    """Return Matthews' correlation coefficient; 0 if all labels or all predictions are of one class."""
    return float(metrics.matthews_corrcoef(labels, predicted))


def pearson(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return Pearson's correlation; NaN if either side is constant or has a NaN."""
    return _correlation(stats.pearsonr, labels, predicted)


def spearman(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN if either side is constant or has a NaN."""
    return _correlation(stats.spearmanr, labels, predicted)


def _correlation(
    measure: Callable[..., tuple[float, float]], labels: Sequence[float], predicted: Sequence[float]
) -> float:
    # SciPy rejects a single pair and warns on infinities.
    if len(labels) < 2 or not all(map(math.isfinite, [*labels, *predicted])):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An input array is constant")  # the result is NaN anyway
        return float(measure(labels, predicted)[0])


def root_mean_square_error(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the root mean square error; NaN if a prediction is not finite."""
    is_finite = all(map(math.isfinite, predicted))
    return float(metrics.root_mean_squared_error(labels, predicted)) if is_finite else math.nan


# --------------------------------------------------------------------------------------------------------------- SQuAD


def normalize_answer(answer: str) -> str:
    """Normalize an answer for SQuAD's comparison.

    >>> normalize_answer("The  Eiffel-Tower, in a word")
    'eiffeltower in word'
    """
    kept = "".join(character for character in answer.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if `answer` equals one of `references`; without references (unanswerable), if it is empty."""
    return float(any(normalize_answer(answer) == normalize_answer(other) for other in references or [""]))


def overlap_f1(answer: str, references: Sequence[str]) -> float:
    """Return the maximum word-level F1 of `answer` over `references`; if either has no words: 1 if both are empty.

    Each character of a script without spaces (Chinese, Thai) is a word.
    """
    words = _answer_words(answer)
    return max(_word_f1(words, _answer_words(other)) for other in references or [""])


def _answer_words(answer: str) -> list[str]:
    return "".join(f" {c} " if is_unspaced(c) else c for c in normalize_answer(answer)).split()


def _word_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def squad_scores(references: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Return mean exact match and F1 in percent.

    If the data set has both answerable and unanswerable questions, also for each kind: `has_answer_exact` and so on.
    """
    pairs = list(zip(references, predicted, strict=True))
    groups = {"": pairs, "has_answer_": [p for p in pairs if p[0]], "no_answer_": [p for p in pairs if not p[0]]}
    if not (groups["has_answer_"] and groups["no_answer_"]):
        groups = {"": pairs}
    scores = {}
    for prefix, group in groups.items():
        scores[f"{prefix}exact"] = 100 * sum(exact_match(answer, golds) for golds, answer in group) / len(group)
        scores[f"{prefix}f1"] = 100 * sum(overlap_f1(answer, golds) for golds, answer in group) / len(group)
    return scores
