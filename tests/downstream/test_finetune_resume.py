"""An interrupted fine-tuning resumes: bit for bit on one rank."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_tasks import config, text_rows, write_jsonl
from support.worlds import run_world

from pmlm_dist.checkpoint.files import read_state, read_weights
from pmlm_dist.checkpoint.folder import step_of
from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import find_pretrained
from pmlm_dist.downstream.settings import UNFINISHED, EvaluateConfig, FinetuneConfig, GenerationConfig, Recipe, check
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.supervision.signals import EXIT_PREEMPTED, STOP_FILE, Stopped, StopReason, StopSignals

pytestmark = pytest.mark.distributed


class StopAfter(StopSignals):
    """Asked to stop when the ranks look for the `looks`-th time."""

    def __init__(self, looks: int):
        super().__init__(grace_s=60)
        self._left = looks

    @property
    def requested(self) -> bool:
        self._left -= 1
        self.reason = StopReason.SIGNAL if self._left < 0 else StopReason.NONE
        return self._left < 0


def learn(wanted: FinetuneConfig, looks: int | None = None) -> str:
    """Fine-tune, or be stopped at a look; how it ended."""
    from pmlm_dist.downstream.finetune import finetune

    try:
        finetune(wanted, signals=StopSignals() if looks is None else StopAfter(looks))
    except Stopped as stopped:
        return f"exit code {stopped.exit_code}"
    return "done"


def recipe(**changes: Any) -> Recipe:
    return replace(Recipe(lr=3e-3, batch=8, epochs=4, dropout=0.1), **changes)


def result(output: Path) -> dict[str, Any]:
    """All that a fine-tuning leaves that does not tell the time."""
    (best,) = (output / "checkpoints").glob("step-*")
    state = read_state(best)
    names = ("scores.json", "predictions-validation.jsonl", "predictions-test.jsonl", "vocab.txt")
    curves = {
        step: {name: value for name, value in scalars.items() if not name.startswith("seconds")}
        for step, scalars in read_metrics(output).items()
    }
    return {
        "files": {name: (output / name).read_text() for name in names},
        "step": best.name,
        "progress": state["progress"],
        "counters": state["counters"],
        "curves": curves,
        "weights": read_weights(best),
    }


def assert_equal(here: dict[str, Any], there: dict[str, Any]) -> None:
    weights, others = here.pop("weights"), there.pop("weights")
    assert here == there
    assert weights.keys() == others.keys()
    for name in weights:
        np.testing.assert_array_equal(weights[name], others[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_world(learn, 1, config(model, data, output, recipe=recipe(), report=("test",))) == ["done"]
    return output


@pytest.mark.parametrize(
    "looks",
    [(0,), (2,), (4,), (13,), (22,), (5, 1, 9)],
    ids=["before-all", "in-epoch", "in-evaluation", "later", "in-report", "thrice"],
)
def test_finetune_resume_is_bit_exact(
    undisturbed: Path, model: Path, data: Path, tmp_path: Path, looks: tuple[int, ...]
):
    wanted = config(model, data, tmp_path / "out", recipe=recipe(), report=("test",))
    for count in looks:
        assert run_world(learn, 1, wanted, count) == [f"exit code {EXIT_PREEMPTED}"]
        assert (tmp_path / "out" / UNFINISHED).is_file()
        assert not (tmp_path / "out" / "scores.json").exists()
    assert run_world(learn, 1, wanted) == ["done"]
    assert_equal(result(tmp_path / "out"), result(undisturbed))
    assert not (tmp_path / "out" / UNFINISHED).exists()
    with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
        check(wanted)


def test_finetune_resumes_on_other_ranks(undisturbed: Path, model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=recipe(dropout=0.0), report=("test",), zero=3)
    assert run_world(learn, 2, wanted, 5) == [f"exit code {EXIT_PREEMPTED}"] * 2
    alone = config(model, data, tmp_path / "alone", recipe=recipe(dropout=0.0), report=("test",), zero=0)
    assert run_world(learn, 1, alone) == ["done"]
    assert run_world(learn, 1, replace(wanted, ds_config=alone.ds_config)) == ["done"]
    here, there = (read_metrics(tmp_path / name) for name in ("out", "alone"))
    assert here.keys() == there.keys()
    for step, scalars in there.items():
        assert here[step]["train/loss"] == pytest.approx(scalars["train/loss"], rel=2e-4)


def test_killed_finetune_resumes_from_its_last_evaluation(undisturbed: Path, model: Path, data: Path, tmp_path: Path):
    """The process is gone between two steps, without a word: what it had saved is all there is."""
    wanted = config(model, data, tmp_path / "out", recipe=recipe(), report=("test",))
    with pytest.raises(AssertionError, match="the process ended without an answer"):
        run_world(killed, 1, wanted, 10)
    assert run_world(learn, 1, wanted) == ["done"]
    assert_equal(result(tmp_path / "out"), result(undisturbed))


def killed(wanted: FinetuneConfig, step: int) -> None:
    from pmlm_dist.downstream.finetune import finetune
    from pmlm_dist.training import loop

    original: Callable[..., Any] = loop.train_step

    def train_step(job: Any, engine: Any, micro_batches: Any, state: Any, stopwatch: Any, **begin: Any) -> Any:
        if state.step + 1 == step:
            time.sleep(1.0)  # the checkpoint of the evaluation before is written meanwhile
            os._exit(9)
        return original(job, engine, micro_batches, state, stopwatch, **begin)

    loop.train_step = train_step
    finetune(wanted)


def test_incomplete_folder_opens_as_the_best_so_far(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=recipe(lr=0.3))  # it gets worse, and is stopped later
    assert run_world(learn, 1, wanted, 13) == [f"exit code {EXIT_PREEMPTED}"]
    checkpoints = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    best = read_state(checkpoints[-1])["progress"]["best_step"]
    assert [step_of(folder) for folder in checkpoints] == [best, step_of(checkpoints[-1])]
    assert best < step_of(checkpoints[-1])
    for place in (tmp_path / "out", tmp_path / "out" / "checkpoints"):
        assert find_pretrained(place).folder == checkpoints[0]
    assert find_pretrained(checkpoints[-1]).folder == checkpoints[-1]
    written = read_metrics(tmp_path / "out")[best]["validation/accuracy"]
    assert run_world(accuracy, 1, EvaluateConfig(tmp_path / "out")) == [written]


def accuracy(wanted: EvaluateConfig) -> float:
    from pmlm_dist.downstream.evaluate import evaluate_saved

    return evaluate_saved(wanted)["validation"].scores["accuracy"]


def test_seeds_resume_with_the_stopped_one(model: Path, data: Path, tmp_path: Path):
    quick = recipe(epochs=1)
    whole = config(model, data, tmp_path / "whole", recipe=quick, seeds=5)
    assert run_world(learn, 1, whole) == ["done"]
    wanted = config(model, data, tmp_path / "out", recipe=quick, seeds=5)
    assert run_world(learn, 1, wanted, 8) == [f"exit code {EXIT_PREEMPTED}"]
    first = tmp_path / "out" / "seed=0" / "scores.json"
    done_at = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "summary.json").exists()
    assert run_world(learn, 1, wanted) == ["done"]
    assert first.stat().st_mtime_ns == done_at
    here, there = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole"))
    assert [entry["spreads"] for entry in here["recipes"]] == [entry["spreads"] for entry in there["recipes"]]
    spread = here["recipes"][0]["spreads"]["validation"]["accuracy"]
    assert len(spread["values"]) == 5
    assert spread["mean"] == pytest.approx(statistics.fmean(spread["values"]))
    assert spread["deviation"] == pytest.approx(statistics.stdev(spread["values"]))


def test_other_finetune_in_an_incomplete_folder_raises(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=recipe())
    run_world(learn, 1, wanted, 4)
    with pytest.raises(AssertionError, match=r"recipe was .* is now(.|\n)*holds another fine-tuning"):
        run_world(learn, 1, replace(wanted, recipe=recipe(lr=1e-3)))
    other = write_jsonl(tmp_path / "other" / "train.jsonl", text_rows(21, first=1)).parent
    write_jsonl(other / "validation.jsonl", text_rows(9, first=100))
    with pytest.raises(AssertionError, match="training data was"):
        run_world(learn, 1, replace(wanted, data=str(other)))


def test_stop_file_ends_finetune_and_foreign_folder_raises(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out", recipe=recipe())
    run_world(learn, 1, wanted, 4)
    (tmp_path / "out" / STOP_FILE).touch()
    assert run_world(learn, 1, wanted) == ["exit code 0"]
    (tmp_path / "out" / STOP_FILE).unlink()
    assert run_world(learn, 1, wanted) == ["done"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists already, and nothing is overwritten"):
        check(replace(wanted, output=tmp_path / "mine"))


def test_seq2seq_resume_is_bit_exact(model: Path, tmp_path: Path):
    rows = [{"src": row["text"], "tgt": row["label"]} for row in text_rows(20)]
    folder = write_jsonl(tmp_path / "data" / "train.jsonl", rows).parent
    for split in ("validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows[:6])
    generation = GenerationConfig(max_source=16, max_target=4)
    generation = replace(generation, decoding=replace(generation.decoding, max_length=4, beam=2))
    settings: dict[str, Any] = {
        "task": "seq2seq",
        "recipe": recipe(epochs=2),
        "generation": generation,
        "report": ("test",),
    }
    outputs = [config(model, folder, tmp_path / name, **settings) for name in ("whole", "out")]
    assert run_world(learn, 1, outputs[0]) == ["done"]
    assert run_world(learn, 1, outputs[1], 2) == [f"exit code {EXIT_PREEMPTED}"]
    assert run_world(learn, 1, outputs[1]) == ["done"]
    assert_equal(result(tmp_path / "out"), result(tmp_path / "whole"))


@pytest.mark.full  # a signal to a run of any job: supervision/test_preemption.py
def test_signal_exits_75_and_the_same_command_resumes(model: Path, data: Path, tmp_path: Path):
    wanted = config(model, data, tmp_path / "out")
    settings = {"task": "classification", "model": model, "data": data, "output": wanted.output}
    settings |= {"ds-config": wanted.ds_config, "recipe.batch": 8, "inputs.max-tokens": 16, "log-every": 1}
    command = [sys.executable, "-m", "pmlm_dist.cli", "finetune"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    long = [*command, "--recipe.epochs", "3000", "--evaluate-every", "100000"]
    with subprocess.Popen(long, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 5/"):
                    break
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            assert process.wait(timeout=60) == EXIT_PREEMPTED
        finally:
            process.kill()
    assert "a restart resumes from" in rest
    (saved,) = (wanted.output / "checkpoints").glob("step-*")
    (wanted.output / STOP_FILE).touch()
    again = subprocess.run(long, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"a restart resumes from {saved}\n" in again.stdout
