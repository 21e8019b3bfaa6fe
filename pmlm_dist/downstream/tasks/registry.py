"""Task registry: GLUE, SQuAD, and generic tasks for user data.

GLUE's columns and metrics follow Wang et al., 2019 (arXiv 1804.07461). If a task has two metrics, their mean selects
the best checkpoint; GLUE averages them in the same way. The Hugging Face hub and the original TSV files name columns
and classes differently; both forms are supported.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from pmlm_dist.downstream.tasks.classification import Classification, DatasetFormat
from pmlm_dist.downstream.tasks.seq2seq import Seq2Seq
from pmlm_dist.downstream.tasks.spans import Spans
from pmlm_dist.downstream.tasks.task import TaskKind

_FIRST, _SECOND = ("sentence1", "#1 String"), ("sentence2", "#2 String")
_BOTH = ("accuracy", "f1")
_ENTAILMENT = ("entailment", "not_entailment")


def _texts(about: str, dataset: DatasetFormat, **options: Any) -> TaskKind:
    restore = partial(Classification.restore, hidden_labels=dataset.hidden_labels)
    return TaskKind(about, partial(Classification.make, dataset), restore, **options)


def _spans(about: str, **options: Any) -> TaskKind:
    return TaskKind(about, Spans.make, Spans.restore, preset="squad", **options)


def _glue(name: str, about: str, dataset: DatasetFormat, **options: Any) -> TaskKind:
    dataset = replace(dataset, hidden_labels=("-1", "-1.0"))
    return _texts(f"GLUE: {about}", dataset, hub=f"nyu-mll/glue:{name}", **options)


def _binary(
    text: tuple[str, ...], pair: tuple[str, ...] = (), *labels: str, names: tuple[str, str], metrics: tuple[str, ...]
) -> DatasetFormat:
    """Classes "0" and "1", which some files call `names`; the mean of several `metrics` selects the checkpoint."""
    return DatasetFormat(
        text,
        pair or ("pair",),
        ("label", *labels),
        has_pairs=bool(pair),
        labels=("0", "1"),
        label_aliases=dict(zip(names, ("0", "1"), strict=True)),
        metrics=metrics,
        averaged=metrics if len(metrics) > 1 else (),
    )


def _entailment(
    text: tuple[str, ...], pair: tuple[str, ...], *labels: str, classes: tuple[str, ...] = _ENTAILMENT
) -> DatasetFormat:
    """Pairs in `classes`, which some files number in this order."""
    numbered = {str(number): name for number, name in enumerate(classes)}
    columns = text, pair, ("label", *labels)
    return DatasetFormat(*columns, has_pairs=True, labels=classes, label_aliases=numbered, metrics=("accuracy",))


GLUE: dict[str, TaskKind] = {
    "cola": _glue(
        "cola",
        "is a sentence acceptable English? Matthews' correlation",
        _binary(("sentence",), names=("unacceptable", "acceptable"), metrics=("matthews",)),
    ),
    "sst2": _glue(
        "sst2",
        "is a review positive? Accuracy",
        _binary(("sentence",), names=("negative", "positive"), metrics=("accuracy",)),
    ),
    "mrpc": _glue(
        "mrpc",
        "are two sentences equivalent? Accuracy and F1",
        _binary(_FIRST, _SECOND, "Quality", names=("not_equivalent", "equivalent"), metrics=_BOTH),
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
        _binary(("question1",), ("question2",), "is_duplicate", names=("not_duplicate", "duplicate"), metrics=_BOTH),
    ),
    "mnli": _glue(
        "mnli",
        "does a premise entail a hypothesis? Accuracy, matched and mismatched",
        _entailment(
            ("premise", "sentence1"),
            ("hypothesis", "sentence2"),
            "gold_label",
            classes=("entailment", "neutral", "contradiction"),
        ),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", "does a sentence answer a question? Accuracy", _entailment(("question",), ("sentence",))),
    "rte": _glue("rte", "does one sentence entail another? Accuracy", _entailment(_FIRST, _SECOND)),
    "wnli": _glue(
        "wnli",
        "does a sentence entail its version with a resolved pronoun? Accuracy",
        _binary(_FIRST, _SECOND, names=("not_entailment", "entailment"), metrics=("accuracy",)),
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
