"""The table of tasks: GLUE, SQuAD, and the families that one's own data belong to.

GLUE's columns and metrics are those of Wang et al., 2019 (arXiv 1804.07461); where a task has two metrics, the best
checkpoint is chosen by their mean, as GLUE's own score of that task is. Its files on the Hugging Face hub and its
original TSV files name columns and classes differently: both are known here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pmlm_dist.downstream.tasks.classification import Classification, Shape
from pmlm_dist.downstream.tasks.seq2seq import Seq2Seq
from pmlm_dist.downstream.tasks.spans import Spans
from pmlm_dist.downstream.tasks.task import TaskKind

_FIRST, _SECOND = ("sentence1", "#1 String"), ("sentence2", "#2 String")


def _texts(about: str, shape: Shape, **facts: Any) -> TaskKind:
    return TaskKind(about, partial(Classification.make, shape), Classification.restore, **facts)


def _spans(about: str, **facts: Any) -> TaskKind:
    return TaskKind(about, Spans.make, Spans.restore, preset="squad", **facts)


def _glue(name: str, about: str, shape: Shape, **facts: Any) -> TaskKind:
    return _texts(f"GLUE: {about}", shape, hub=f"nyu-mll/glue:{name}", **facts)


def _entailment(text: tuple[str, ...], pair: tuple[str, ...]) -> Shape:
    labels = ("entailment", "not_entailment")
    return Shape(text, pair, pairs=True, labels=labels, names=_numbered(labels), metrics=("accuracy",))


def _numbered(labels: tuple[str, ...]) -> dict[str, str]:
    return {str(number): label for number, label in enumerate(labels)}


_BOTH = ("accuracy", "f1")
_MNLI = ("entailment", "neutral", "contradiction")
_ACCEPTABLE = {"unacceptable": "0", "acceptable": "1"}
_POSITIVE = {"negative": "0", "positive": "1"}
_EQUIVALENT = {"not_equivalent": "0", "equivalent": "1"}
_DUPLICATE = {"not_duplicate": "0", "duplicate": "1"}
_FOLLOWS = {"not_entailment": "0", "entailment": "1"}

GLUE: dict[str, TaskKind] = {
    "cola": _glue(
        "cola",
        "is a sentence acceptable English? Matthews' correlation",
        Shape(("sentence",), labels=("0", "1"), names=_ACCEPTABLE, pairs=False, metrics=("matthews",)),
    ),
    "sst2": _glue(
        "sst2",
        "is a review positive? Accuracy",
        Shape(("sentence",), labels=("0", "1"), names=_POSITIVE, pairs=False, metrics=("accuracy",)),
    ),
    "mrpc": _glue(
        "mrpc",
        "are two sentences equivalent? Accuracy and F1",
        Shape(
            _FIRST, _SECOND, ("label", "Quality"), pairs=True, labels=("0", "1"), names=_EQUIVALENT,
            metrics=_BOTH, chosen_by=_BOTH,
        ),
    ),
    "stsb": _glue(
        "stsb",
        "how alike are two sentences, 0 to 5? Pearson and Spearman",
        Shape(
            _FIRST, _SECOND, ("label", "score"), pairs=True, is_score=True,
            metrics=("pearson", "spearman"), chosen_by=("pearson", "spearman"),
        ),
    ),
    "qqp": _glue(
        "qqp",
        "do two questions ask the same? Accuracy and F1",
        Shape(
            ("question1",), ("question2",), ("label", "is_duplicate"), pairs=True, labels=("0", "1"),
            names=_DUPLICATE, metrics=_BOTH, chosen_by=_BOTH,
        ),
    ),
    "mnli": _glue(
        "mnli",
        "does a premise entail a hypothesis? Accuracy, matched and mismatched",
        Shape(
            ("premise", "sentence1"), ("hypothesis", "sentence2"), ("label", "gold_label"), pairs=True, labels=_MNLI,
            names=_numbered(_MNLI), metrics=("accuracy",),
        ),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", "does a sentence answer a question? Accuracy", _entailment(("question",), ("sentence",))),
    "rte": _glue("rte", "does one sentence entail another? Accuracy", _entailment(_FIRST, _SECOND)),
    "wnli": _glue(
        "wnli",
        "does a sentence with a pronoun resolved follow? Accuracy",
        Shape(_FIRST, _SECOND, pairs=True, labels=("0", "1"), names=_FOLLOWS, metrics=("accuracy",)),
    ),
}  # fmt: skip

TASKS: dict[str, TaskKind] = {
    **GLUE,
    "squad1": _spans("SQuAD 1.1: the span of a passage that answers a question", hub="rajpurkar/squad"),
    "squad2": _spans("SQuAD 2.0: the same, where some have no answer", hub="rajpurkar/squad_v2"),
    "classification": _texts("your own: the class of a text or of a pair", Shape()),
    "regression": _texts(
        "your own: a score of a text or of a pair",
        Shape(label=("label", "score"), is_score=True, metrics=("pearson", "spearman", "rmse")),
    ),
    "seq2seq": TaskKind(
        "your own: write the target of a source (columns src, tgt)", Seq2Seq.make, Seq2Seq.restore, preset="qg"
    ),
    "spans": _spans("your own: a span of a passage, or none, in SQuAD's columns"),
}
"""What `--task` takes."""
