"""`pmlm predict` and the rows of predictions, for every kind of task; neither predict nor evaluate needs DeepSpeed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_tasks import config, text_rows, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.downstream.settings import GenerationConfig, InputConfig, Recipe

pytestmark = pytest.mark.distributed

TEXTS = text_rows(9)
QUESTIONS = [
    {
        "id": f"s{n}",
        "question": "who swims ?",
        "context": f"the {row['text'].split()[1]} fish swims .",
        "answers": {"text": ["fish"], "answer_start": [5 + len(row["text"].split()[1])]},
    }
    for n, row in enumerate(TEXTS)
]
DATA: dict[str, list[dict[str, Any]]] = {
    "classification": [
        {"id": row["id"], "text": row["text"], "pair": "a fish", "label": row["label"]} for row in TEXTS
    ],
    "regression": [{"id": row["id"], "text": row["text"], "label": float(n)} for n, row in enumerate(TEXTS)],
    "spans": QUESTIONS,
    "seq2seq": [{"id": row["id"], "src": row["text"], "tgt": row["label"]} for row in TEXTS],
}
INPUTS = {
    "classification": {"text": "text", "pair": "pair"},
    "regression": {"text": "text"},
    "spans": {"question": "question", "context": "context"},
    "seq2seq": {"source": "src"},
}
RESULTS = {
    "classification": {"prediction", "probability", "probabilities"},
    "regression": {"prediction"},
    "spans": {"prediction", "score"},
    "seq2seq": {"prediction"},
}


def learn(settings: Any) -> None:
    from pmlm_dist.downstream.finetune import finetune

    finetune(settings)


@pytest.fixture(scope="module", params=DATA)
def tuned(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A task, and the folder of a fine-tuning for it."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    for split in ("train", "validation"):
        write_jsonl(folder / "data" / f"{split}.jsonl", DATA[kind])
    generation = GenerationConfig(16, 4)
    generation = replace(generation, decoding=replace(generation.decoding, beam=2, max_length=4))
    recipe = Recipe(lr=3e-3, batch=8, epochs=1, dropout=0.0)
    inputs = InputConfig(max_tokens=24, stride=8)
    settings = config(
        model, folder / "data", folder / "out", task=kind, recipe=recipe, inputs=inputs, generation=generation
    )
    run_world(learn, 1, settings)
    return kind, folder / "out"


def unlabeled(kind: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("label", "answers", "tgt")} for row in DATA[kind]]


def test_rows_of_predictions_are_complete(tuned: tuple[str, Path]):
    kind, folder = tuned
    lines = [json.loads(line) for line in (folder / "predictions-validation.jsonl").open()]
    for row, line in zip(DATA[kind], lines, strict=True):
        assert line["id"] == row["id"]
        assert {name: line[name] for name in INPUTS[kind]} == {n: row[c] for n, c in INPUTS[kind].items()}
        if kind == "classification":
            assert line["label"] == row["label"]
            assert line["probabilities"].keys() == {"red", "green", "blue"}
            assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert line["probability"] == max(line["probabilities"].values())
            assert line["probabilities"][line["prediction"]] == line["probability"]
        elif kind == "regression":
            assert line["label"] == row["label"]
        elif kind == "spans":
            assert line["answers"] == ["fish"]
        else:
            assert line["reference"] == row["tgt"]


def call(arguments: list[str]) -> int:
    return main(arguments)


def test_predict_gives_the_predictions_of_evaluation_without_labels(tuned: tuple[str, Path], tmp_path: Path):
    kind, folder = tuned
    source = write_jsonl(tmp_path / "new.jsonl", unlabeled(kind))
    arguments = ["predict", "--model", str(folder), "--input", str(source), "--output"]
    assert run_world(call, 1, [*arguments, str(tmp_path / "one")]) == [0]
    assert run_world(call, 2, [*arguments, str(tmp_path / "two"), "--batch", "4"]) == [0, 0]
    one, two, evaluated = (
        [json.loads(line) for line in path.open()]
        for path in (tmp_path / "one", tmp_path / "two", folder / "predictions-validation.jsonl")
    )
    assert set(one[0]) == {"id", *INPUTS[kind], *RESULTS[kind]}
    for rows in (one, two):
        assert [row["id"] for row in rows] == [row["id"] for row in DATA[kind]]
        if kind == "regression":
            expected = pytest.approx([row["prediction"] for row in evaluated], rel=1e-4)
        else:
            expected = [row["prediction"] for row in evaluated]
        assert [row["prediction"] for row in rows] == expected


def test_predict_without_output_prints_json_alone(tuned: tuple[str, Path], tmp_path: Path, capsys):
    kind, folder = tuned
    source = write_jsonl(tmp_path / "new.jsonl", unlabeled(kind)[:2])
    assert main(["predict", "--model", str(folder), "--input", str(source)]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["id"] for line in printed.out.splitlines()] == [row["id"] for row in DATA[kind][:2]]
    assert f"model: {folder}" in printed.err


def test_evaluate_runs_in_the_precision_of_the_model(tuned: tuple[str, Path], capsys, monkeypatch, tmp_path: Path):
    _, folder = tuned
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--model", str(folder)]) == 0
    printed = capsys.readouterr()
    assert ", fp32\n" in printed.out
    assert "MA " not in printed.out + printed.err
    assert main(["evaluate", "--model", str(folder), "--precision", "bf16"]) == 0
    assert ", bf16\n" in capsys.readouterr().out


def test_predict_names_the_invalid_input_and_writes_nothing(tuned: tuple[str, Path], model: Path, tmp_path, capsys):
    kind, folder = tuned
    source = write_jsonl(tmp_path / "new.jsonl", [{"words": "a"}])
    output = ["--output", str(tmp_path / "out")]
    for arguments, message in (
        (["--model", str(folder), "--input", str(source)], f"--input {source}: no column "),
        (["--model", str(folder), "--input", str(tmp_path / "none.jsonl")], "no such file"),
        (["--model", str(model), "--input", str(source)], "run `pmlm finetune` first"),
    ):
        assert main(["predict", *arguments, *output]) == 2
        assert message in capsys.readouterr().err
    rows = [*unlabeled(kind)[:1], {**unlabeled(kind)[1], "id": "\ud800"}]
    assert main(["predict", "--model", str(folder), "--input", str(write_jsonl(source, rows)), *output]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["new.jsonl", "out"]
