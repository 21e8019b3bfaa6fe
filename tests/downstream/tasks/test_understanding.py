"""GLUE's and SQuAD's tasks on small files in their forms: what is read, cut, answered."""

from __future__ import annotations

import itertools
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
from pmlm_dist.downstream.tasks.inputs import fit
from pmlm_dist.downstream.tasks.registry import GLUE, TASKS
from pmlm_dist.downstream.tasks.spans import Spans, best_span
from pmlm_dist.vocab import Vocabulary

VOCABULARY = Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
MODEL = ModelConfig(vocab_size=VOCABULARY.size, max_positions=64)


def settings(task: str, **inputs: Any) -> FinetuneConfig:
    return FinetuneConfig(task, Path("model"), Path("no such folder"), inputs=InputConfig(**inputs))


def make(task: str, rows: list[dict[str, Any]], **inputs: Any) -> Any:
    return TASKS[task].make(settings(task, **inputs), rows, VOCABULARY, MODEL)


# ---------------------------------------------------------------------------------------------------------------- GLUE

GLUE_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as on the Hugging Face hub, as in the original files
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


def test_all_of_glue_is_there():
    assert GLUE.keys() == GLUE_ROWS.keys()
    assert GLUE["mnli"].validation == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize("name", GLUE)
def test_both_forms_of_glue_mean_the_same(name: str):
    read = []
    for row in GLUE_ROWS[name]:
        task: Classification = make(name, [row])
        (example,) = task.read([row], origin="here")
        (feature,) = task.features([example], training=True)
        read.append((example.texts, example.label, feature.target, feature.encoded.ids))
    assert read[0] == read[1]
    is_pair = name not in ("cola", "sst2")
    ids = [VOCABULARY.encode_batch([word])[0][0] for word in ("a", "the")]
    sep = [VOCABULARY.sep_id]
    assert read[0][3] == [VOCABULARY.cls_id, ids[0], *sep, *([ids[1], *sep] if is_pair else [])]


@pytest.mark.parametrize(
    ("name", "right", "said", "scores"),
    [
        ("cola", ["0", "1", "1", "0"], ["0", "1", "1", "1"], {"matthews": 1 / 3**0.5}),
        ("mrpc", ["1", "1", "0"], ["1", "0", "0"], {"accuracy": 2 / 3, "f1": 2 / 3, "mean": 2 / 3}),
        ("stsb", [0.0, 1.0, 2.0], [0.0, 2.0, 1.0], {"pearson": 0.5, "spearman": 0.5, "mean": 0.5}),
        ("mnli", ["neutral", "neutral"], ["neutral", "entailment"], {"accuracy": 0.5}),
    ],
)
def test_scores_are_glue_s(name: str, right: list[Any], said: list[Any], scores: dict[str, float]):
    task: Classification = make(name, [GLUE_ROWS[name][0]])
    rows = [{**GLUE_ROWS[name][0], "label": label} for label in right]
    key = "score" if name == "stsb" else "label"
    found = task.scores(task.read(rows, origin="here"), [{key: value} for value in said])
    assert found == pytest.approx(scores)
    assert task.metric in found


@pytest.mark.parametrize("score", [float("nan"), "nan", "", None, "high", float("inf")])
def test_a_score_that_is_no_number_is_refused(score: Any):
    row = GLUE_ROWS["stsb"][0]
    task = make("stsb", [row])
    with pytest.raises(ConfigError, match=r"row 2: the score in column label .* is not a finite number"):
        task.read([row, {**row, "label": score}], origin="here")


def test_a_hidden_test_set_has_no_labels():
    task = make("sst2", [GLUE_ROWS["sst2"][0]])
    assert task.has_labels([{"sentence": "a", "label": "positive"}])
    for hidden in ({"sentence": "a", "label": None}, {"sentence": "a"}, {"sentence": "a", "label": -1}):
        assert not task.has_labels([hidden])
        assert task.read([hidden], origin="here", labelled=False)[0].label is None


def test_many_bad_rows_are_counted_and_a_single_class_is_refused():
    task = make("classification", [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}])
    with pytest.raises(ConfigError, match=r"row 1(.|\n)*row 5(.|\n)*\.\.\. and 4 more rows"):
        task.read([{"text": "a", "label": "z"}] * 9, origin="here")
    with pytest.raises(ConfigError, match="every training example is of the class 'x'"):
        make("classification", [{"text": "a", "label": "x"}])


def test_columns_can_be_named():
    rows = [{"q": "a", "r": "the", "class": 0}, {"q": "a", "r": "the", "class": 1}]
    task = make("classification", rows, text="q", pair="r", label="class")
    assert [example.label for example in task.read(rows, origin="here")] == ["0", "1"]
    with pytest.raises(ConfigError, match=r"no column s for the text, there are q, r, class: name it by --inputs.text"):
        make("classification", rows, text="s")


@pytest.mark.parametrize("seed", range(20))
def test_the_longer_text_loses_its_end(seed: int):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (2,), generator=draw).tolist()
    parts, room = [list(range(n)) for n in lengths], int(torch.randint(2, 15, (), generator=draw))
    expected = [list(part) for part in parts]
    while sum(map(len, expected)) > room:  # one by one; of equals the second
        (expected[0] if len(expected[0]) > len(expected[1]) else expected[1]).pop()
    assert fit(parts, room=room) == expected
    assert fit(parts[:1], room=room) == [parts[0][:room]]


# --------------------------------------------------------------------------------------------------------------- spans


def squad_row(question: str, passage: str, answer: str | None, id: str = "q") -> dict[str, Any]:
    answers = (
        {"text": [answer], "answer_start": [passage.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"id": id, "question": question, "context": passage, "answers": answers}


LONG = squad_row("who swims?", "the tree stands. " * 6 + "a red fish swims. " + "the bird flies. " * 4, "red fish")


def test_windows_overlap_cover_the_passage_and_mark_the_answer():
    task: Spans = make("squad1", [LONG], max_tokens=24, stride=8)
    examples = task.read([LONG], origin="here")
    windows = task.features(examples, training=True)
    assert len(windows) > 2
    covered = sorted({place for window in windows for place in window.places})
    assert covered == sorted(VOCABULARY.encode_with_offsets([LONG["context"]])[0][1])
    for window in windows:
        assert len(window.encoded.ids) <= 24
        if window.end:
            start, stop = window.places[window.start - window.first][0], window.places[window.end - window.first][1]
            assert LONG["context"][start:stop] == "red fish"
            words = [VOCABULARY.token(id) for id in window.encoded.ids[window.start : window.end + 1]]
            assert words == ["red", "fish"]
    assert any(window.end for window in windows)
    assert any(not window.end for window in windows)
    assert not task.notes()


def test_an_answer_in_no_window_is_told():
    row = squad_row("who?", "the tree stands. a red fish swims.", "tree stands. a red fish swims.")
    task: Spans = make("squad1", [row], max_tokens=12, stride=2)
    task.features(task.read([row], origin="here"), training=True)
    assert task.notes() == ["1 answers of the training split fit in no window"]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_is_that_of_all_pairs(seed: int):
    scores_2T = torch.randn(2, 15, generator=torch.Generator().manual_seed(seed))
    first, stop, longest = 4, 14, 3
    pairs = [(i, j) for i, j in itertools.product(range(first, stop), repeat=2) if i <= j < i + longest]
    best = max(pairs, key=lambda pair: float(scores_2T[0, pair[0]] + scores_2T[1, pair[1]]))
    found = best_span(scores_2T, first=first, stop=stop, longest=longest)
    assert found.span == (best[0] - first, best[1] - first)
    assert found.score == pytest.approx(float(scores_2T[0, best[0]] + scores_2T[1, best[1]]))
    assert found.null == pytest.approx(float(scores_2T[:, 0].sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["blue"], "answer_start": [0]}}, "the answer 'blue' does not stand at character 0"),
        ({"answers": ["blue"]}, "must be an object with the lists text and answer_start"),
        ({"answers": {"text": "blue", "answer_start": 4}}, "must be an object with the lists text and answer_start"),
        ({"answers": {"text": ["the"], "answer_start": ["0"]}}, "the answer 'the' does not stand at character 0"),
        ({"answers": {"text": ["the"], "answer_start": [-len(LONG["context"])]}}, "the answer 'the' does not stand at"),
        ({"answers": {"text": ["the"], "answer_start": []}}, "1 answers with 0 places"),
        ({"answers": {"text": [], "answer_start": []}}, "no answer, and every question of the training split had one"),
        ({"question": ""}, "column question holds no text"),
    ],
)
def test_spans_that_do_not_fit_their_passage_are_refused(change: dict[str, Any], message: str):
    task = make("squad1", [LONG])
    with pytest.raises(ConfigError, match=f"here, row 1: .*{message}"):
        task.read([{**LONG, **change}], origin="here")


def squad_rows(count: int) -> list[dict[str, Any]]:
    """Who does what? The passage tells, or tells of something else; the answer is at every place of it."""
    facts = [("fish", "swims"), ("bird", "flies"), ("tree", "stands")]
    rows = []
    for number in range(count):
        _, verb = facts[number % 3]
        told = [facts[(number + k) % 3] for k in range(3 if number % 4 else 2)]
        order = [told[(k + number // 3) % len(told)] for k in range(len(told))]
        passage = " ".join(f"the {subject} {does} ." for subject, does in order)
        hidden = ("the " + facts[number % 3][0]) if number % 4 or number % 8 else None
        if hidden is None:
            passage = " ".join(f"the {subject} {does} ." for subject, does in order if does != verb)
        rows.append(squad_row(f"who {verb} ?", passage, hidden, id=str(number)))
    return rows


def learn(wanted: FinetuneConfig) -> tuple[list[FinetuneRun], dict[str, Any]]:
    from pmlm_dist.downstream.evaluate import evaluate_saved
    from pmlm_dist.downstream.finetune import finetune

    trials = finetune(wanted)
    again = evaluate_saved(EvaluateConfig(wanted.output, ds_config=wanted.ds_config))
    return trials, {name: found.scores for name, found in again.items()}


@pytest.mark.distributed
def test_spans_with_and_without_answer_are_learned(tmp_path: Path):
    model = write_model(tmp_path / "model")
    for split, rows in {"train": squad_rows(48), "validation": squad_rows(24)}.items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    recipe = Recipe(lr=5e-3, batch=8, epochs=25, dropout=0.0)
    wanted = config(model, tmp_path / "data", tmp_path / "out", task="squad2", recipe=recipe, evaluate_every=50)
    wanted = wanted.__class__(**{**vars(wanted), "inputs": InputConfig(max_tokens=16, stride=4)})
    ((trials, again),) = run_world(learn, 1, wanted)
    scores = trials[0].scores["validation"]
    assert scores == again["validation"]
    assert scores["no_answer_exact"] > 60
    assert scores["has_answer_exact"] > 60


@pytest.mark.distributed
def test_a_score_is_learned(tmp_path: Path):
    model = write_model(tmp_path / "model")
    rows = [
        {"sentence1": f"the {a}", "sentence2": f"the {b}", "label": 5.0 * ("fish", "bird", "tree").index(b) / 2}
        for a, b in itertools.product(("fish", "bird", "tree"), repeat=2)
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows * 2)
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows)  # each once: the ranks of equal ones are rounding's
    recipe = Recipe(lr=2e-3, batch=6, epochs=40, dropout=0.0)
    wanted = config(model, tmp_path / "data", tmp_path / "out", task="stsb", recipe=recipe, evaluate_every=60)
    ((trials, again),) = run_world(learn, 1, wanted)
    assert trials[0].scores["validation"]["pearson"] > 0.8
    assert again["validation"] == pytest.approx(trials[0].scores["validation"], rel=1e-4)  # other micro-batches
