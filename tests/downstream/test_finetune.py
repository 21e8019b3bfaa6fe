"""The driver of fine-tuning: the same on any topology, every example once an epoch, the best checkpoint, refusals."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_tasks import COLORS, config, text_rows, write_jsonl
from support.worlds import RankFailed, run_world

from pmlm_dist.config import BatchConfig, ConfigError, ParallelConfig
from pmlm_dist.conversion.pretrained import open_pretrained
from pmlm_dist.downstream.job import FinetuneJob, FinetuneProgress
from pmlm_dist.downstream.prediction import Evaluation
from pmlm_dist.downstream.preparation import engine_config_for_batch
from pmlm_dist.downstream.settings import (
    GENERATION,
    RECIPES,
    EvaluateConfig,
    FinetuneConfig,
    InputConfig,
    Recipe,
    recipes,
)
from pmlm_dist.downstream.summary import FinetuneRun, summarize
from pmlm_dist.metrics.run_log import read_metrics

pytestmark = pytest.mark.distributed


def learn(wanted: FinetuneConfig) -> list[FinetuneRun]:
    from pmlm_dist.downstream.finetune import finetune

    return finetune(wanted)


def score(wanted: EvaluateConfig) -> dict[str, Any]:
    from pmlm_dist.downstream.evaluate import evaluate_saved

    return {name: (found.scores, found.predictions) for name, found in evaluate_saved(wanted).items()}


@pytest.fixture(scope="module")
def single(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """One process, ZeRO 0: its folder and its metrics by step."""
    output = tmp_path_factory.mktemp("single") / "out"
    run_world(learn, 1, config(model, data, output, zero=0, micro_batch=8, report=("test",)))
    return output, read_metrics(output)


def curve(metrics: dict[int, Any], name: str) -> list[float]:
    return [scalars[name] for scalars in metrics.values() if name in scalars]


@pytest.mark.parametrize(
    "spread", [{"zero": 1}, {"zero": 3, "micro_batch": 2}, {"tp": 2, "zero": 0}], ids=["dp2", "dp2-zero3", "tp2"]
)
def test_losses_and_scores_equal_those_of_a_single_process(
    single: tuple[Path, dict[int, Any]], model: Path, data: Path, tmp_path: Path, spread: dict[str, int]
):
    run_world(learn, 2, config(model, data, tmp_path / "out", **spread))
    there, here = single[1], read_metrics(tmp_path / "out")
    assert len(curve(there, "train/loss")) == 6  # 21 examples in batches of 8: three steps an epoch
    for name in ("train/loss", "train/gradient_norm"):
        assert curve(here, name) == pytest.approx(curve(there, name), rel=2e-4), name
    assert curve(here, "validation/accuracy") == curve(there, "validation/accuracy")
    probabilities = [
        [json.loads(line)["probability"] for line in (folder / "predictions-validation.jsonl").open()]
        for folder in (single[0], tmp_path / "out")
    ]
    assert probabilities[1] == pytest.approx(probabilities[0], abs=2e-5)


def test_saved_model_gives_the_same_scores(single: tuple[Path, dict[int, Any]], tmp_path: Path):
    output = single[0]
    stated = json.loads((output / "scores.json").read_text())["scores"]
    wanted = EvaluateConfig(
        output, split=("validation", "test"), predictions=tmp_path / "said", parallel=ParallelConfig(tp=2)
    )
    answers = run_world(score, 2, wanted)
    assert answers[0] == answers[1]
    assert {name: scores for name, (scores, _) in answers[0].items()} == stated
    for name in ("validation", "test"):
        before, after = (
            [json.loads(line) for line in (folder / f"predictions-{name}.jsonl").open()]
            for folder in (output, tmp_path / "said")
        )
        assert [(row["id"], row["prediction"]) for row in before] == [(row["id"], row["prediction"]) for row in after]
    with pytest.raises(RankFailed, match=r"predictions-validation\.jsonl exists already"):
        run_world(score, 1, wanted.__class__(**{**vars(wanted), "parallel": ParallelConfig()}))


def test_training_examples_are_fitted(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=Recipe(lr=3e-3, batch=4, epochs=15, dropout=0.0))
    (trials,) = run_world(learn, 1, wanted)
    assert trials[0].scores["validation"]["accuracy"] == 1.0


def test_kept_checkpoint_is_the_best_and_opens_as_a_language_model(single: tuple[Path, dict[int, Any]], model: Path):
    output, metrics = single
    best = json.loads((output / "scores.json").read_text())
    values = {
        step: scalars["validation/accuracy"] for step, scalars in metrics.items() if "validation/accuracy" in scalars
    }
    assert values[best["step"]] == max(values.values()) == best["scores"]["validation"]["accuracy"]
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == [f"step-{best['step']:08d}"]
    tuned = open_pretrained(output)
    assert tuned.weights.keys() == open_pretrained(model).weights.keys()


@pytest.mark.parametrize(
    ("values", "losses", "best", "notes"),
    [
        ((0.0, 0.0, 0.0), (3.0, 2.0, 2.5), 2, 2),  # Matthews' correlation, F1 or ROUGE that never rise
        ((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), 1, 2),
        ((0.5, 0.7, 0.6), (1.0, 2.0, 0.5), 2, 0),
        ((math.nan, math.nan, math.nan), (3.0, 2.0, 2.5), 2, 2),  # correlations of constant predictions
        ((math.nan, -0.5, math.nan), (1.0, 2.0, 0.5), 2, 0),
        ((0.5, 0.5, 0.5), (math.nan, 2.0, math.nan), 2, 0),  # weights that are not finite predict the first class
        ((0.5, 0.5), (math.nan, math.nan), 0, 0),
    ],
)
def test_equal_metrics_keep_the_lower_loss_and_say_so(
    values: Sequence[float], losses: Sequence[float], best: int, notes: int
):
    job: Any = object.__new__(FinetuneJob)
    split = SimpleNamespace(name="validation")
    job.data = SimpleNamespace(task=SimpleNamespace(metric="score"), scored=[split])
    job.progress, lines = FinetuneProgress(), []
    session: Any = SimpleNamespace(log=SimpleNamespace(scalars=lambda *_, **__: None, info=lines.append))
    for step, (value, loss) in enumerate(zip(values, losses, strict=True), start=1):
        job._evaluate = lambda *_, value=value, loss=loss: Evaluation([], {"score": value}, loss)
        job.evaluate(session, SimpleNamespace(step=step))
        saved = json.loads(json.dumps(job.progress.as_json(), allow_nan=False))
        assert saved["best_step"] == job.progress.best_step
    assert job.progress.best_step == best
    said = [line for line in lines if "ties with step" in line]
    assert len(said) == notes
    assert all(f"step {best} (" in line or "is kept" in line for line in said)


def test_first_of_equal_checkpoints_is_not_kept_when_the_loss_falls(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=Recipe(lr=1e-5, batch=8, epochs=3, dropout=0.0))
    run_world(learn, 1, wanted)
    metrics = {step: m for step, m in read_metrics(tmp_path / "out").items() if "validation/loss" in m}
    assert len({m["validation/accuracy"] for m in metrics.values()}) == 1
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["step"] == min(metrics, key=lambda step: metrics[step]["validation/loss"]) == max(metrics)
    assert scores["losses"]["validation"] == metrics[scores["step"]]["validation/loss"]


def test_class_minus_one_of_the_training_split_is_scored(model: Path, tmp_path: Path):
    rows = [{"text": f"the {COLORS[n % 3]} fish", "label": n % 3 - 1} for n in range(12)]
    for split, chosen in {"train": rows, "validation": rows, "test": rows[::3]}.items():
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", chosen)
    ((run,),) = run_world(learn, 1, config(model, tmp_path / "data", tmp_path / "out", report=("test",)))
    assert run.scores["test"].keys() == {"accuracy", "macro_f1"}


# ---------------------------------------------------------------------------------------------------------- data order


def orders(wanted: FinetuneConfig) -> list[list[str]]:
    """The targets' texts that this rank reads in each epoch, as token ids."""
    from pmlm_dist.downstream import finetune
    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups(tp=wanted.parallel.tp)
    (job,) = finetune._jobs(finetune.prepare(wanted, topology))
    steps = job.steps_per_epoch
    return [
        [
            str(row[valid].tolist())
            for step in range(epoch * steps, (epoch + 1) * steps)
            for micro_batch in job.micro_batches(step)
            if micro_batch.ids
            for row, valid in zip(
                micro_batch.batch.tensors["tokens_BT"], micro_batch.batch.tensors["valid_BT"], strict=True
            )
        ]
        for epoch in range(2)
    ]


def test_every_example_is_read_once_an_epoch_in_order_of_seed_and_epoch(model: Path, tmp_path: Path):
    rows = [{"text": f"{'a ' * i}fish", "label": "x" if i % 2 else "y"} for i in range(13)]  # all of different lengths
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows).parent
    write_jsonl(data / "validation.jsonl", rows)
    wanted = config(model, data, tmp_path / "out", micro_batch=2)
    (alone,) = run_world(orders, 1, wanted)
    pair = run_world(orders, 2, wanted)
    other = run_world(orders, 1, replace(wanted, seed=1))[0]
    for epoch in range(2):
        assert len(set(alone[epoch])) == len(alone[epoch]) == 13
        assert Counter(pair[0][epoch] + pair[1][epoch]) == Counter(alone[epoch])
    assert alone[0] != alone[1]
    assert alone[0] != other[0]


# ------------------------------------------------------------------------------------------------------ several at once


def test_seeds_and_grid_give_mean_and_deviation(model: Path, data: Path, tmp_path: Path):
    recipe = Recipe(lr=1e-3, batch=8, epochs=1, dropout=0.0)
    wanted = config(model, data, tmp_path / "out", seeds=2, grid=("lr=1e-3,1e-5,0.001",), recipe=recipe)
    (trials,) = run_world(learn, 1, wanted)
    assert [(trial.recipe["lr"], trial.seed) for trial in trials] == [(1e-3, 0), (1e-3, 1), (1e-5, 0), (1e-5, 1)]
    with pytest.raises(ConfigError, match=r"no checkpoint in .*: name one of its runs, .*/lr=0\.001-seed=0 for"):
        score(EvaluateConfig(tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for entry in summary["recipes"]:
        folders = [Path(folder) for folder in entry["folders"]]
        values = [json.loads((f / "scores.json").read_text())["scores"]["validation"]["accuracy"] for f in folders]
        spread = entry["spreads"]["validation"]["accuracy"]
        assert spread["values"] == values
        assert spread["mean"] == pytest.approx(sum(values) / 2)
        assert spread["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_presets_and_grids_equal_the_paper():
    base = FinetuneConfig("cola", Path("model"), Path("no such folder"), grid=("preset",))
    searched = recipes(base)
    assert len(searched) == len(set(searched)) == 80
    for name, values in {
        "lr": {5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5},
        **{"batch": {16, 32}, "warmup": {0.1, 0.2}, "weight_decay": {0.01, 0.1}, "epochs": {10, 15}},
    }.items():
        assert {getattr(recipe, name) for recipe in searched} == values
    assert RECIPES["squad"] == Recipe(lr=2e-5, batch=32, warmup=0.1, weight_decay=0.01, epochs=4)
    for name, numbers in {
        "cnn_dm": (7e-5, 64, 14, 0.02, 608, 160, 5, 0.7),
        "xsum": (7e-5, 64, 14, 0.02, 720, 48, 5, 0.6),
        "qg": (2e-5, 48, 16, 0.1, 464, 48, 8, 1.3),
    }.items():
        recipe, generation = RECIPES[name], GENERATION[name]
        found = (recipe.lr, recipe.batch, recipe.epochs, recipe.warmup, generation.max_source, generation.max_target)
        assert (*found, generation.decoding.beam, generation.decoding.length_penalty) == numbers
        assert (generation.label_smoothing, generation.target_mask_prob, generation.decoding.no_repeat_ngram) == (
            0.1,
            0.5,
            3,
        )
        with pytest.raises(ConfigError, match=f"the preset {name} has no grid"):
            recipes(replace(base, preset=name))


def test_batch_overrides_replace_recipe_and_micro_batch(model: Path, data: Path, tmp_path: Path):
    wanted = replace(config(model, data, tmp_path / "out"), batch=BatchConfig(12, 3), zero=2)
    assert [recipe.batch for recipe in recipes(wanted)] == [12]
    with pytest.raises(ConfigError, match=r"batch.global \(12\) contradicts"):
        recipes(replace(wanted, grid=("batch=4,8",)))
    topology: Any = SimpleNamespace(dp=2, device=torch.device("cpu"))
    engine = engine_config_for_batch(wanted.ds_config, topology, batch=12, micro=3, zero=2)
    assert (engine.global_batch, engine.micro_batch, engine.zero_stage) == (12, 3, 2)
    with pytest.raises(ConfigError, match=r"batch.micro \(4\) must divide the 6 examples of a rank"):
        engine_config_for_batch(wanted.ds_config, topology, batch=12, micro=4)


def test_bf16_with_the_shipped_settings_learns(model: Path, data: Path, tmp_path: Path):
    shipped = Path(__file__).parents[2] / "ds_configs" / "finetune.json"
    assert json.loads(shipped.read_text())["bf16"]["enabled"]
    recipe = Recipe(lr=3e-3, batch=4, epochs=15, dropout=0.0)  # as in fp32 above
    wanted = replace(config(model, data, tmp_path / "out", recipe=recipe), ds_config=shipped)
    ((trial,),) = run_world(learn, 1, wanted)
    assert trial.scores["validation"]["accuracy"] == 1.0
    again = EvaluateConfig(tmp_path / "out")
    assert run_world(score, 1, again)[0]["validation"][0] == trial.scores["validation"]


def test_summary_sorts_by_mean():
    trials = [
        FinetuneRun({"lr": lr}, seed, {"v": {"m": value}}, {"v": 1.0}, "")
        for lr, seed, value in [(1, 0, 0.5), (1, 1, 0.7), (2, 0, 0.9), (2, 1, 0.1)]
    ]
    summary = summarize(trials, split="v", metric="m")
    assert [entry.recipe["lr"] for entry in summary.recipes] == [1, 2]
    assert "0.6000 ± 0.1414 (n=2)" in summary.table()


def test_equal_recipes_are_ordered_by_their_loss():
    values = [(1, 0.5, 3.0), (2, 0.5, 2.0), (3, 0.5, math.nan), (4, math.nan, 1.0), (5, 0.6, 9.0)]
    trials = [FinetuneRun({"lr": lr}, 0, {"v": {"m": value}}, {"v": loss}, "") for lr, value, loss in values]
    summary = summarize(trials, split="v", metric="m")
    assert [entry.recipe["lr"] for entry in summary.recipes] == [5, 2, 1, 3, 4]
    assert "equal ones by the loss" in summary.table()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "split validation of .* is empty"),
        (
            [{"text": "a fish", "label": "purple"}],
            {},
            "row 1: the label 'purple' .* was not in training, which had blue, green, red",
        ),
        ([{"words": "a fish", "label": "red"}], {}, "no column text, there are words, label"),
        ([{"text": " ", "label": "red"}], {}, "row 1: column text holds no text"),
        (text_rows(3), {"task": "clasification"}, r"--task \(clasification\) must be one of"),
        (text_rows(3), {"inputs": InputConfig(max_tokens=65)}, r"inputs.max_tokens \(65\) .* 64 positions"),
        (
            text_rows(5),
            {"inputs": InputConfig(max_tokens=8, too_long="raise")},
            "9 tokens, at most 8 .*--inputs.too-long",
        ),
        (text_rows(3), {"recipe": Recipe(lr=-1.0, warmup=1.0)}, r"recipe.lr \(-1.0\)[^$]*recipe.warmup \(1.0\)"),
        (text_rows(3), {"recipe": Recipe(lr=float("inf")), "seed": -1}, r"seed \(-1\)[^$]*recipe.lr \(inf\)"),
        (text_rows(3), {"grid": ("ls=3",)}, "--grid .ls=3. is not NAME=VALUE"),
        ([{"text": "a fish", "label": float("nan")}], {}, r"validation.jsonl, line 1: not JSON \(the number NaN"),
        ([{"text": "a fish", "label": ""}, *text_rows(1)], {}, "row 1: '' in column label is not a label"),
    ],
)
def test_invalid_settings_raise_one_message_and_write_nothing(
    data: Path, tmp_path: Path, model: Path, *, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
):
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows)
    (tmp_path / "data" / "train.jsonl").write_text((data / "train.jsonl").read_text())
    with pytest.raises(ConfigError, match=message):
        learn(config(model, tmp_path / "data", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_not_overwritten(model: Path, data: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
        learn(config(model, data, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("label", ["nan", "", "high"])
def test_label_that_is_no_number_raises_before_anything_is_written(model: Path, tmp_path: Path, label: Any):
    rows = [{"text": "a fish", "label": 1.5}, {"text": "a bird", "label": label}]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    with pytest.raises(ConfigError, match=r"row 2: the score in column label .* is not a finite number"):
        learn(config(model, tmp_path / "data", tmp_path / "out", task="regression"))
    assert not (tmp_path / "out").exists()


def test_constant_validation_scores_raise_before_training(model: Path, tmp_path: Path):
    rows = [{"text": "a fish", "label": 1.5}, {"text": "a bird", "label": 2.5}]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows[:1] * 2)
    with pytest.raises(ConfigError, match=r"all scores of the validation split are 1\.5: pearson is undefined"):
        learn(config(model, tmp_path / "data", tmp_path / "out", task="regression"))
    assert not (tmp_path / "out").exists()


def test_pretrained_model_cannot_be_evaluated(model: Path, tmp_path: Path, data: Path):
    with pytest.raises(ConfigError, match=r"has no head of a task.*run `pmlm finetune` first"):
        score(EvaluateConfig(model, data=str(data)))


def test_all_ranks_raise_what_one_cannot_read(model: Path, data: Path, tmp_path: Path):
    with pytest.raises(
        RankFailed, match=r"rank 1:(.|\n)*recipe.batch \(7\) must be a multiple of the data-parallel ranks \(2\)"
    ):
        run_world(learn, 2, config(model, data, tmp_path / "out", recipe=Recipe(batch=7)))
