"""Task registry: GLUE, SQuAD, and generic tasks for user data.

GLUE's columns and metrics follow Wang et al., 2019 (arXiv 1804.07461). If a task has two metrics, their mean selects
the best checkpoint; GLUE averages them in the same way. The Hugging Face hub and the original TSV files name columns
and classes differently; both forms are supported.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from pmlm_dist.downstream.tasks.classification import Classification, DatasetFormat
from pmlm_dist.downstream.tasks.seq2seq import Seq2Seq
from pmlm_dist.downstream.tasks.spans import Spans
from pmlm_dist.downstream.tasks.task import TaskKind

_FIRST, _SECOND = ("sentence1", "#1 String"), ("sentence2", "#2 String")


def _texts(about: str, dataset: DatasetFormat, **options: Any) -> TaskKind:
    restore = partial(Classification.restore, hidden_labels=dataset.hidden_labels)
    return TaskKind(about, partial(Classification.make, dataset), restore, **options)


def _spans(about: str, **options: Any) -> TaskKind:
    return TaskKind(about, Spans.make, Spans.restore, preset="squad", **options)


def _glue(name: str, about: str, dataset: DatasetFormat, **options: Any) -> TaskKind:
    dataset = replace(dataset, hidden_labels=("-1", "-1.0"))
    return _texts(f"GLUE: {about}", dataset, hub=f"nyu-mll/glue:{name}", **options)


def _entailment(text: tuple[str, ...], pair: tuple[str, ...]) -> DatasetFormat:
    labels = ("entailment", "not_entailment")
    return DatasetFormat(
        text, pair, has_pairs=True, labels=labels, label_aliases=_numbered(labels), metrics=("accuracy",)
    )


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
        DatasetFormat(
            ("sentence",), labels=("0", "1"), label_aliases=_ACCEPTABLE, has_pairs=False, metrics=("matthews",)
        ),
    ),
    "sst2": _glue(
        "sst2",
        "is a review positive? Accuracy",
        DatasetFormat(
            ("sentence",), labels=("0", "1"), label_aliases=_POSITIVE, has_pairs=False, metrics=("accuracy",)
        ),
    ),
    "mrpc": _glue(
        "mrpc",
        "are two sentences equivalent? Accuracy and F1",
        DatasetFormat(
            _FIRST,
            _SECOND,
            ("label", "Quality"),
            has_pairs=True,
            labels=("0", "1"),
            label_aliases=_EQUIVALENT,
            metrics=_BOTH,
            averaged=_BOTH,
        ),
    ),
    "stsb": _glue(
        "stsb",
        "similarity of two sentences, 0 to 5. Pearson and Spearman",
        DatasetFormat(
            _FIRST,
            _SECOND,
            ("label", "score"),
            has_pairs=True,
            is_regression=True,
            metrics=("pearson", "spearman"),
            averaged=("pearson", "spearman"),
        ),
    ),
    "qqp": _glue(
        "qqp",
        "are two questions equivalent? Accuracy and F1",
        DatasetFormat(
            ("question1",),
            ("question2",),
            ("label", "is_duplicate"),
            has_pairs=True,
            labels=("0", "1"),
            label_aliases=_DUPLICATE,
            metrics=_BOTH,
            averaged=_BOTH,
        ),
    ),
    "mnli": _glue(
        "mnli",
        "does a premise entail a hypothesis? Accuracy, matched and mismatched",
        DatasetFormat(
            ("premise", "sentence1"),
            ("hypothesis", "sentence2"),
            ("label", "gold_label"),
            has_pairs=True,
            labels=_MNLI,
            label_aliases=_numbered(_MNLI),
            metrics=("accuracy",),
        ),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", "does a sentence answer a question? Accuracy", _entailment(("question",), ("sentence",))),
    "rte": _glue("rte", "does one sentence entail another? Accuracy", _entailment(_FIRST, _SECOND)),
    "wnli": _glue(
        "wnli",
        "does a sentence entail its version with a resolved pronoun? Accuracy",
        DatasetFormat(
            _FIRST, _SECOND, has_pairs=True, labels=("0", "1"), label_aliases=_FOLLOWS, metrics=("accuracy",)
        ),
    ),
}

TASKS: dict[str, TaskKind] = {
    **GLUE,
    "squad1": _spans("SQuAD 1.1: the span of a passage that answers a question", hub="rajpurkar/squad"),
    "squad2": _spans("SQuAD 2.0: the same, with unanswerable questions", hub="rajpurkar/squad_v2"),
    "classification": _texts("your data: the class of a text or a pair", DatasetFormat()),
    "regression": _texts(
        "your data: a score of a text or a pair",
        DatasetFormat(label=("label", "score"), is_regression=True, metrics=("pearson", "spearman", "rmse")),
    ),
    "seq2seq": TaskKind(
        "your data: generate a target from a source (columns src, tgt)", Seq2Seq.make, Seq2Seq.restore, preset="qg"
    ),
    "spans": _spans("your data: a span of a passage, or none, in SQuAD's columns"),
}
"""The values of `--task`."""
