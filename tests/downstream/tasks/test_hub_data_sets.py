"""GLUE and SQuAD in the format of the Hugging Face hub, loaded by `datasets` from local repositories.

`datasets` accepts a folder instead of a repository name, so everything but the network is as in a user's command: the
configurations of README.md, parquet files with the hub's columns and class labels, and hidden test sets (-1).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.small_tasks import config, write_model
from support.worlds import run_world

from pmlm_dist.config import ModelConfig
from pmlm_dist.conversion.pretrained import find_pretrained
from pmlm_dist.downstream.rows import read_rows
from pmlm_dist.downstream.settings import FinetuneConfig, InputConfig, Recipe
from pmlm_dist.downstream.tasks.registry import GLUE, TASKS

datasets = pytest.importorskip("datasets")

STRING, INT = datasets.Value("string"), datasets.Value("int32")
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # text columns, class names in the hub's order
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "stsb": (("sentence1", "sentence2"), ()),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
SPLITS = {
    name: (
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
        if name == "mnli"
        else ("train", "validation", "test")
    )
    for name in COLUMNS
}
FACTS = (("fish", "swims"), ("bird", "flies"), ("tree", "stands"))


def write_repository(folder: Path, configurations: dict[str, dict[str, Any]]) -> None:
    """Write a repository: one parquet file per configuration and split, listed in README.md."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, table in splits.items():
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(str(path))
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def glue_table(name: str, split: str) -> Any:
    texts, labels = COLUMNS[name]
    kind = datasets.ClassLabel(names=list(labels)) if labels else datasets.Value("float32")
    columns: dict[str, list[Any]] = {column: [f"the {w}" for w, _ in FACTS] * 3 for column in texts}
    targets = [number % len(labels) if labels else number / 2 for number in range(9)]
    columns["label"] = [-1] * 9 if split.startswith("test") else targets
    columns["idx"] = [1000 + number for number in range(9)]
    features = {**dict.fromkeys(texts, STRING), "label": kind, "idx": INT}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def squad_table(*, unanswerable: bool) -> Any:
    rows: list[dict[str, Any]] = []
    for number in range(9):
        passage = " ".join(f"the {subject} {verb} ." for subject, verb in FACTS)
        subject, verb = FACTS[number % 3]
        is_unanswerable = unanswerable and number % 3 == 0
        answers = {"text": [], "answer_start": []}
        if not is_unanswerable:
            answers = {"text": [f"the {subject}"], "answer_start": [passage.index(f"the {subject}")]}
        question = "who ?" if is_unanswerable else f"who {verb} ?"
        rows.append({"id": f"56be{number}", "title": "t", "context": passage, "question": question, "answers": answers})
    sequence = getattr(datasets, "List", None)
    kinds = {"text": sequence(STRING), "answer_start": sequence(INT)} if sequence else {}
    answers = kinds or datasets.Sequence({"text": STRING, "answer_start": INT})
    features = {**dict.fromkeys(("id", "title", "context", "question"), STRING), "answers": answers}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder per data set, named as on the hub."""
    root = tmp_path_factory.mktemp("hub")
    glue = {name: {split: glue_table(name, split) for split in SPLITS[name]} for name in COLUMNS}
    write_repository(root / "nyu-mll" / "glue", glue)
    for name, unanswerable in (("squad", False), ("squad_v2", True)):
        table = squad_table(unanswerable=unanswerable)
        write_repository(root / "rajpurkar" / name, {name: dict.fromkeys(("train", "validation"), table)})
    return root


@pytest.fixture
def hub_as_working_directory(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return hub


def test_columns_cover_all_glue_tasks():
    assert COLUMNS.keys() == GLUE.keys()


@pytest.mark.usefixtures("hub_as_working_directory")
@pytest.mark.parametrize("name", [*GLUE, "squad1", "squad2"])
def test_every_split_is_read_with_the_columns_of_the_hub(name: str, tmp_path: Path):
    kind, model = TASKS[name], find_pretrained(write_model(tmp_path / "model"))
    assert kind.hub is not None
    settings = FinetuneConfig(name, Path("model"), Path("out"), inputs=InputConfig(max_tokens=32, stride=8))
    rows = read_rows(kind.hub, "train")
    task: Any = kind.make(
        settings, rows, model.vocabulary, ModelConfig(vocab_size=model.vocabulary.size, max_positions=64)
    )
    for split in ("train", *kind.validation):
        labeled = read_rows(kind.hub, split)
        assert task.has_labels(labeled)
        examples = task.read(labeled, origin=split)
        assert [example.id for example in examples] == [row.get("idx", row.get("id")) for row in labeled]
        assert task.features(examples, training=True)
    for split in (split for split in SPLITS.get(name, ()) if split.startswith("test")):
        hidden = read_rows(kind.hub, split)
        assert not task.has_labels(hidden) or name == "stsb"
        assert len(task.read(hidden, origin=split, labeled=False)) == 9
    if name in GLUE and COLUMNS[name][1]:
        names = COLUMNS[name][1]
        labels = [task.settings.label_aliases.get(n, n) for n in (names[number % len(names)] for number in range(9))]
        assert [example.label for example in task.read(rows, origin="train")] == labels


def learn(settings: FinetuneConfig, hub: Path, cache: Path) -> dict[str, dict[str, float]]:
    from pmlm_dist.downstream.finetune import finetune

    os.chdir(hub)
    datasets.config.HF_DATASETS_CACHE = cache
    return finetune(settings)[0].scores


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("mnli", {"validation_matched": {"accuracy"}, "validation_mismatched": {"accuracy"}}),
        ("stsb", {"validation": {"pearson", "spearman", "mean"}}),
        ("squad2", {"validation": {f"{k}{m}" for k in ("", "has_answer_", "no_answer_") for m in ("exact", "f1")}}),
    ],
)
def test_finetuning_on_data_set_in_hub_format(hub: Path, tmp_path: Path, name: str, scores: dict[str, set[str]]):
    model = write_model(tmp_path / "model")
    recipe = Recipe(lr=1e-3, batch=3, epochs=1, dropout=0.0)
    report = ("test_matched",) if name == "mnli" else ()
    inputs = InputConfig(max_tokens=32, stride=8)
    settings = config(
        model, None, tmp_path / "out", task=name, recipe=recipe, inputs=inputs, micro_batch=3, report=report
    )
    (results,) = run_world(learn, 1, settings, hub, tmp_path / "cache")
    assert {split: set(values) for split, values in results.items() if values} == scores
    ids = [f"56be{n}" for n in range(9)] if name == "squad2" else [1000 + n for n in range(9)]
    for split in (*scores, *report):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"predictions-{split}.jsonl").open()]
        assert [line["id"] for line in lines] == ids
