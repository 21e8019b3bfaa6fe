"""Classification, regression and spans: dataset formats, truncation, windows, error messages, learning."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_tasks import WORDS, config, write_jsonl, write_model
from support.worlds import run_world

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.downstream.settings import EvaluateConfig, FinetuneConfig, InputConfig, Recipe
from pmlm_dist.downstream.summary import FinetuneRun
from pmlm_dist.downstream.tasks.classification import Classification
from pmlm_dist.downstream.tasks.inputs import truncate
from pmlm_dist.downstream.tasks.registry import GLUE, TASKS
from pmlm_dist.downstream.tasks.spans import Spans, best_span
from pmlm_dist.model.task_model import TaskHead
from pmlm_dist.vocabulary.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
MODEL = ModelConfig(vocab_size=VOCABULARY.size, max_positions=64)


def settings(task: str, **inputs: Any) -> FinetuneConfig:
    return FinetuneConfig(task, Path("model"), Path("no such folder"), inputs=InputConfig(**inputs))


def make(task: str, rows: list[dict[str, Any]], **inputs: Any) -> Any:
    return TASKS[task].make(settings(task, **inputs), rows, VOCABULARY, MODEL)


# ---------------------------------------------------------------------------------------------------------------- GLUE

GLUE_ROWS: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # (row on the Hugging Face hub, row in the original files)
    "cola": ({"sentence": "a", "label": "acceptable"}, {"source": "x", "label": "1", "note": "", "sentence": "a"}),
    "sst2": ({"sentence": "a", "label": "positive"}, {"sentence": "a", "label": "1"}),
    "mrpc": (
        {"sentence1": "a", "sentence2": "the", "label": "equivalent"},
        {"Quality": "1", "#1 ID": "1", "#2 ID": "2", "#1 String": "a", "#2 String": "the"},
    ),
    "stsb": (
        {"sentence1": "a", "sentence2": "the", "label": 2.5},
        {"index": "0", "sentence1": "a", "sentence2": "the", "score": "2.500"},
    ),
    "qqp": (
        {"question1": "a", "question2": "the", "label": "duplicate"},
        {"id": "1", "question1": "a", "question2": "the", "is_duplicate": "1"},
    ),
    "mnli": (
        {"premise": "a", "hypothesis": "the", "label": "neutral"},
        {"index": "1", "sentence1": "a", "sentence2": "the", "gold_label": "neutral"},
    ),
    "qnli": (
        {"question": "a", "sentence": "the", "label": "not_entailment"},
        {"index": "1", "question": "a", "sentence": "the", "label": "not_entailment"},
    ),
    "rte": (
        {"sentence1": "a", "sentence2": "the", "label": 1},
        {"index": "1", "sentence1": "a", "sentence2": "the", "label": "not_entailment"},
    ),
    "wnli": (
        {"sentence1": "a", "sentence2": "the", "label": "entailment"},
        {"index": "1", "sentence1": "a", "sentence2": "the", "label": "1"},
    ),
}


def test_registry_has_all_glue_tasks():
    assert GLUE.keys() == GLUE_ROWS.keys()
    assert GLUE["mnli"].validation == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize("name", GLUE)
def test_hub_and_original_format_of_glue_give_equal_features(name: str):
    results = []
    for row in GLUE_ROWS[name]:
        task: Classification = make(name, [row])
        (example,) = task.read([row], origin="here")
        (feature,) = task.features([example], training=True)
        results.append((example.texts, example.label, feature.target, feature.encoded.ids))
    assert results[0] == results[1]
    is_pair = name not in ("cola", "sst2")
    ids = [VOCABULARY.encode_batch([word])[0][0] for word in ("a", "the")]
    sep = [VOCABULARY.sep_id]
    assert results[0][3] == [VOCABULARY.cls_id, ids[0], *sep, *([ids[1], *sep] if is_pair else [])]


@pytest.mark.parametrize(
    ("name", "labels", "predicted", "scores"),
    [
        ("cola", ["0", "1", "1", "0"], ["0", "1", "1", "1"], {"matthews": 1 / 3**0.5}),
        ("mrpc", ["1", "1", "0"], ["1", "0", "0"], {"accuracy": 2 / 3, "f1": 2 / 3, "mean": 2 / 3}),
        ("stsb", [0.0, 1.0, 2.0], [0.0, 2.0, 1.0], {"pearson": 0.5, "spearman": 0.5, "mean": 0.5}),
        ("mnli", ["neutral", "neutral"], ["neutral", "entailment"], {"accuracy": 0.5}),
    ],
)
def test_scores_are_those_of_glue(name: str, labels: list[Any], predicted: list[Any], scores: dict[str, float]):
    task: Classification = make(name, [GLUE_ROWS[name][0]])
    rows = [{**GLUE_ROWS[name][0], "label": label} for label in labels]
    values = task.scores(task.read(rows, origin="here"), [{"prediction": value} for value in predicted])
    assert values == pytest.approx(scores)
    assert task.metric in values


@pytest.mark.parametrize("score", [float("nan"), "nan", "", None, "high", float("inf")])
def test_non_finite_score_raises(score: Any):
    row = GLUE_ROWS["stsb"][0]
    task = make("stsb", [row])
    with pytest.raises(ConfigError, match=r"row 2: the score in column label .* is not a finite number"):
        task.read([row, {**row, "label": score}], origin="here")


def test_hidden_test_set_has_no_labels():
    task = make("sst2", [GLUE_ROWS["sst2"][0]])
    assert task.has_labels([{"sentence": "a", "label": "positive"}])
    for hidden in ({"sentence": "a", "label": None}, {"sentence": "a"}, {"sentence": "a", "label": -1}):
        assert not task.has_labels([hidden])
        assert task.read([hidden], origin="here", labeled=False)[0].label is None


def test_only_what_documentation_hides_is_unlabeled():
    """-1 hides labels in GLUE; in other data it is a class, like the word None, and so is no answer of SQuAD 2.0."""
    for labels in ([-1, 0, 1], ["None", "some", "all"]):
        task = make("classification", [{"text": "a", "label": label} for label in labels])
        assert task.has_labels([{"text": "a", "label": labels[0]}])
        assert not task.has_labels([{"text": "a", "label": None}, {"text": "a", "label": " "}, {"text": "a"}])
    task = make("classification", [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}])
    rows = [{"text": "a", "label": -1}]
    assert task.has_labels(rows)
    with pytest.raises(ConfigError, match="the label -1 in column label was not in training"):
        task.read(rows, origin="here")
    task = make("regression", [{"text": "a", "label": -1.0}, {"text": "a", "label": 1.0}])
    assert task.has_labels([{"text": "a", "label": -1.0}])
    unanswerable = squad_row("a", "the", None)
    assert make("squad2", [unanswerable, squad_row("a", "the", "the")]).has_labels([unanswerable])
    assert not make("squad1", [squad_row("a", "the", "the")]).has_labels([unanswerable])
    assert not make("squad2", [unanswerable]).has_labels([{**unanswerable, "answers": None}])


def test_many_invalid_rows_are_counted_and_single_class_raises():
    task = make("classification", [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}])
    with pytest.raises(ConfigError, match=r"row 1(.|\n)*row 5(.|\n)*\.\.\. and 4 more rows"):
        task.read([{"text": "a", "label": "z"}] * 9, origin="here")
    with pytest.raises(ConfigError, match="every training example is of the class 'x'"):
        make("classification", [{"text": "a", "label": "x"}])


@pytest.mark.parametrize("kind", ["classification", "squad2"])
def test_id_that_cannot_be_written_raises_before_anything_is_computed(kind: str):
    rows = [{**squad_row("a", "the", "the"), "text": "a", "label": label} for label in "xy"]
    task = make(kind, rows)
    assert task.read([{**rows[0], "id": {"part": ["\ud800", None]}}], origin="here")
    with pytest.raises(ConfigError, match=r"here, row 2: its id cannot be written as JSON: .*bytes"):
        task.read([rows[0], {**rows[1], "id": b"bytes"}], origin="here")


def test_columns_are_configurable():
    rows = [{"q": "a", "r": "the", "class": 0}, {"q": "a", "r": "the", "class": 1}]
    task = make("classification", rows, text="q", pair="r", label="class")
    assert [example.label for example in task.read(rows, origin="here")] == ["0", "1"]
    with pytest.raises(ConfigError, match=r"no column s for the text, there are q, r, class: name it by --inputs.text"):
        make("classification", rows, text="s")


@pytest.mark.parametrize("seed", range(20))
def test_truncate_equals_token_by_token_truncation(seed: int):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (2,), generator=draw).tolist()
    parts, room = [list(range(n)) for n in lengths], int(torch.randint(2, 15, (), generator=draw))
    expected = [list(part) for part in parts]
    while sum(map(len, expected)) > room:  # token by token; the second for equal lengths
        (expected[0] if len(expected[0]) > len(expected[1]) else expected[1]).pop()
    assert truncate(parts, room=room) == expected
    assert truncate(parts[:1], room=room) == [parts[0][:room]]


# --------------------------------------------------------------------------------------------------------------- spans


def squad_row(question: str, passage: str, answer: str | None, id: str = "q") -> dict[str, Any]:
    answers = (
        {"text": [answer], "answer_start": [passage.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"id": id, "question": question, "context": passage, "answers": answers}


LONG = squad_row("who swims?", "the tree stands. " * 6 + "a red fish swims. " + "the bird flies. " * 4, "red fish")


def test_windows_overlap_cover_passage_and_mark_answer():
    task: Spans = make("squad1", [LONG], max_tokens=24, stride=8)
    examples = task.read([LONG], origin="here")
    windows = task.features(examples, training=True)
    assert len(windows) > 2
    covered = sorted({offsets for window in windows for offsets in window.offsets})
    assert covered == sorted(VOCABULARY.encode_with_offsets([LONG["context"]])[0][1])
    for window in windows:
        assert len(window.encoded.ids) <= 24
        if window.end:
            start = window.offsets[window.start - window.first][0]
            stop = window.offsets[window.end - window.first][1]
            assert LONG["context"][start:stop] == "red fish"
            words = [VOCABULARY.tokens[id] for id in window.encoded.ids[window.start : window.end + 1]]
            assert words == ["red", "fish"]
    assert any(window.end for window in windows)
    assert any(not window.end for window in windows)
    assert not task.notes()


def test_answer_in_no_window_is_noted():
    row = squad_row("who?", "the tree stands. a red fish swims.", "tree stands. a red fish swims.")
    task: Spans = make("squad1", [row], max_tokens=12, stride=2)
    task.features(task.read([row], origin="here"), training=True)
    assert task.notes() == ["1 answers of the training split fit in no window"]


@pytest.mark.parametrize("seed", range(5))
def test_best_span_equals_exhaustive_search(seed: int):
    scores_2T = torch.randn(2, 15, generator=torch.Generator().manual_seed(seed))
    first, stop, max_length = 4, 14, 3
    pairs = [(i, j) for i, j in itertools.product(range(first, stop), repeat=2) if i <= j < i + max_length]
    best = max(pairs, key=lambda pair: float(scores_2T[0, pair[0]] + scores_2T[1, pair[1]]))
    prediction = best_span(scores_2T, first=first, stop=stop, max_length=max_length)
    assert prediction.span == (best[0] - first, best[1] - first)
    assert prediction.score == pytest.approx(float(scores_2T[0, best[0]] + scores_2T[1, best[1]]))
    assert prediction.null_score == pytest.approx(float(scores_2T[:, 0].sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["blue"], "answer_start": [0]}}, "the answer 'blue' is not at character 0"),
        ({"answers": ["blue"]}, "must be an object with the lists text and answer_start"),
        ({"answers": {"text": "blue", "answer_start": 4}}, "must be an object with the lists text and answer_start"),
        ({"answers": {"text": ["the"], "answer_start": ["0"]}}, "the answer 'the' is not at character 0"),
        (
            {"answers": {"text": ["the"], "answer_start": [-len(LONG["context"])]}},
            "the answer 'the' is not at character",
        ),
        ({"answers": {"text": ["the"], "answer_start": []}}, "1 answers with 0 offsets"),
        ({"answers": {"text": [], "answer_start": []}}, "no answer, and every question of the training split had one"),
        ({"question": ""}, "column question holds no text"),
    ],
)
def test_invalid_answer_raises(change: dict[str, Any], message: str):
    task = make("squad1", [LONG])
    with pytest.raises(ConfigError, match=f"here, row 1: .*{message}"):
        task.read([{**LONG, **change}], origin="here")


def squad_rows(count: int) -> list[dict[str, Any]]:
    """Questions "who VERB ?": the passage has the answer at varying positions, or no answer."""
    facts = [("fish", "swims"), ("bird", "flies"), ("tree", "stands")]
    rows = []
    for number in range(count):
        _, verb = facts[number % 3]
        shown = [facts[(number + k) % 3] for k in range(3 if number % 4 else 2)]
        order = [shown[(k + number // 3) % len(shown)] for k in range(len(shown))]
        passage = " ".join(f"the {subject} {does} ." for subject, does in order)
        answer = ("the " + facts[number % 3][0]) if number % 4 or number % 8 else None
        if answer is None:
            passage = " ".join(f"the {subject} {does} ." for subject, does in order if does != verb)
        rows.append(squad_row(f"who {verb} ?", passage, answer, id=str(number)))
    return rows


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_vector_is_that_of_the_text_without_its_padding(pooling: Any):
    torch.manual_seed(0)
    head = TaskHead(replace(MODEL, hidden_size=8), outputs=3, pooling=pooling).eval()
    x_TBE, lengths = torch.randn(6, 2, 8), [6, 4]
    valid_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    assert head.dense is not None
    for row, length in enumerate(lengths):
        states_TE = x_TBE[:length, row]
        vector_E = states_TE.mean(0) if pooling == "mean" else states_TE[0]
        expected_C = head.output(torch.tanh(head.dense(vector_E)))
        torch.testing.assert_close(head(x_TBE, valid_BT)[row], expected_C)


def learn(settings: FinetuneConfig) -> tuple[list[FinetuneRun], dict[str, Any]]:
    from pmlm_dist.downstream.evaluate import evaluate_saved
    from pmlm_dist.downstream.finetune import finetune

    runs = finetune(settings)
    evaluations = evaluate_saved(EvaluateConfig(settings.output))
    return runs, {name: evaluation.scores for name, evaluation in evaluations.items()}


@pytest.mark.distributed
def test_finetuning_learns_spans_and_unanswerable_questions(tmp_path: Path):
    model = write_model(tmp_path / "model")
    for split, rows in {"train": squad_rows(48), "validation": squad_rows(24)}.items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    recipe = Recipe(lr=5e-3, batch=8, epochs=25, dropout=0.0)
    inputs = InputConfig(max_tokens=16, stride=4)
    finetuning = config(
        model, tmp_path / "data", tmp_path / "out", task="squad2", recipe=recipe, inputs=inputs, evaluate_every=50
    )
    ((runs, evaluated),) = run_world(learn, 1, finetuning)
    scores = runs[0].scores["validation"]
    assert scores == evaluated["validation"]
    assert scores["no_answer_exact"] > 60
    assert scores["has_answer_exact"] > 60


@pytest.mark.distributed
def test_finetuning_learns_regression(tmp_path: Path):
    model = write_model(tmp_path / "model")
    rows = [
        {"sentence1": f"the {a}", "sentence2": f"the {b}", "label": 5.0 * ("fish", "bird", "tree").index(b) / 2}
        for a, b in itertools.product(("fish", "bird", "tree"), repeat=2)
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows * 2)
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows)  # no duplicates: rounding would decide their ranks
    recipe = Recipe(lr=2e-3, batch=6, epochs=40, dropout=0.0)
    # One word of eight differs, so from [CLS]: the mean of the states would need many more steps.
    settings = {"task": "stsb", "recipe": recipe, "evaluate_every": 60, "pooling": "cls"}
    finetuning = config(model, tmp_path / "data", tmp_path / "out", **settings)
    ((runs, evaluated),) = run_world(learn, 1, finetuning)
    assert runs[0].scores["validation"]["pearson"] > 0.8
    assert evaluated["validation"] == pytest.approx(runs[0].scores["validation"], rel=1e-4)  # other micro-batches
