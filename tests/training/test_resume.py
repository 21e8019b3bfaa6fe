"""Resume: N + N steps equal 2N steps bit for bit; a checkpoint belong to another run raises with all differences."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.corpora import write_corpus
from support.small_runs import run_config, with_model, with_train, write_engine_config
from support.worlds import run_world

from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.metrics.run_log import read_metrics

pytestmark = pytest.mark.distributed

N = 2


def dropping_out(corpus: Path, run_dir: Path, **settings: Any) -> RunConfig:
    """A run of 2N steps with dropout, some prefix samples and a checkpoint every N."""
    config = run_config(corpus, run_dir, steps=2 * N, **settings)
    config = replace(config, masking=replace(config.masking, prefix_share=0.25))
    config = with_model(config, hidden_dropout=0.1, attention_dropout=0.1)
    return with_train(config, checkpoint_every=N)


def pretrained(config: RunConfig) -> str:
    """Pre-train on this rank; what it printed."""
    from pmlm_dist.training.run import pretrain

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(config)
    return printed.getvalue()


def problems_on_rank(configs: list[RunConfig]) -> list[list[str]]:
    """Return the problems of each of `configs`; empty if it can be resumed."""
    found = []
    for config in configs:
        try:
            pretrained(config)
            found.append([])
        except ConfigError as error:
            found.append(error.problems)
    return found


def checkpoint(config: RunConfig, step: int) -> Path:
    return config.run_dir / "checkpoints" / f"step-{step:08d}"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All numbers in the files of a checkpoint by their place: weights, moments, counters, loss scale."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {f"{file.name}.{name}": value for name, value in load_file(file).items()}
    state = json.loads((path / "state.json").read_text())
    found |= {f"counters.{name}": np.array(value) for name, value in state["counters"].items()}
    return found | {"fingerprint": np.array(json.dumps(state["fingerprint"]))}


def check_equal_bits(first: Path, second: Path) -> None:
    expected, found = tensors(first), tensors(second)
    assert len([value for value in expected.values() if value.ndim]) >= 60
    assert any("exp_avg" in name for name in expected)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name


def losses(config: RunConfig, *, after: int = 0) -> dict[int, dict[str, float]]:
    """What was learned in each step after `after`: losses, rates, norms and held-out losses."""
    return {
        step: {name: value for name, value in scalars.items() if name.startswith(("train/", "validation/"))}
        for step, scalars in read_metrics(config.run_dir).items()
        if step > after
    }


def interrupted_copy(config: RunConfig, run_dir: Path) -> RunConfig:
    """The run `config` as it was after step N, in another folder."""
    shutil.copytree(config.run_dir, run_dir)
    copy = replace(config, run_dir=run_dir)
    shutil.rmtree(checkpoint(copy, 2 * N))
    (run_dir / "COMPLETE").unlink()
    (run_dir / "metrics.jsonl").unlink()
    return copy


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"zero": 0, "micro_batch": 4}),
        (1, {"zero": 1, "micro_batch": 8}),
        (1, {"zero": 1, "precision": "bf16"}),
        (2, {"zero": 0}),
        (2, {"zero": 1, "micro_batch": 2}),
        (2, {"zero": 2}),
        (2, {"zero": 3}),
        (2, {"zero": 1, "precision": "bf16"}),
        (2, {"zero": 2, "precision": "bf16"}),
        (2, {"zero": 3, "precision": "bf16"}),
        (2, {"zero": 1, "tp": 2}),
        (2, {"zero": 1, "tp": 2, "precision": "bf16"}),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
@pytest.mark.fault("F40", "F59")
def test_resume_is_bit_exact(small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]):
    straight = dropping_out(small_corpus, tmp_path / "straight", **settings)
    run_world(pretrained, ranks, straight)
    resumed = interrupted_copy(straight, tmp_path / "resumed")
    printed = run_world(pretrained, ranks, resumed)
    assert f"resuming after step {N}" in printed[0]
    assert not any("resuming" in of_another_rank for of_another_rank in printed[1:])
    assert losses(resumed) == losses(straight, after=N)
    assert len(losses(resumed)) == N
    check_equal_bits(checkpoint(straight, 2 * N), checkpoint(resumed, 2 * N))


@dataclass(frozen=True)
class Finished:
    """A whole run of 2N steps on one rank, and the same run stopped after N."""

    straight: RunConfig
    stopped: RunConfig


@pytest.fixture(scope="module")
def finished(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Both with 4 lanes, where the default would be 8."""
    folder = tmp_path_factory.mktemp("finished")
    straight = dropping_out(small_corpus, folder / "straight")
    straight = replace(straight, data=replace(straight.data, lanes=4))
    stopped = with_train(replace(straight, run_dir=folder / "stopped"), stop_at=N, checkpoint_every=1000)
    assert problems_of(1, [straight, stopped]) == [[], []]
    return Finished(straight, stopped)


def problems_of(ranks: int, configs: list[RunConfig]) -> list[list[str]]:
    """Return the problems of `configs`, after a check that all ranks report the same."""
    answers = run_world(problems_on_rank, ranks, configs)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def copy_of(config: RunConfig, run_dir: Path) -> RunConfig:
    shutil.copytree(config.run_dir, run_dir)
    return replace(config, run_dir=run_dir)


def test_stop_at_ends_the_attempt_and_resume_keeps_the_lanes(finished: Finished, tmp_path: Path):
    """The lanes were set at first and are not set again: those of the checkpoint hold."""
    stopped = copy_of(finished.stopped, tmp_path / "stopped")
    assert checkpoint(stopped, N).is_dir()
    assert list(losses(stopped)) == list(range(1, N + 1))
    assert not (stopped.run_dir / "COMPLETE").exists()
    on = with_train(replace(stopped, data=replace(stopped.data, lanes=None)), stop_at=None)
    run_world(pretrained, 1, on)
    assert json.loads((on.run_dir / "COMPLETE").read_text())["step"] == 2 * N
    assert losses(on, after=N) == losses(finished.straight, after=N)
    check_equal_bits(checkpoint(finished.straight, 2 * N), checkpoint(on, 2 * N))


def test_complete_run_is_unchanged_by_a_restart(finished: Finished, tmp_path: Path):
    again = copy_of(finished.straight, tmp_path / "again")
    before = {
        file: file.read_bytes()
        for file in again.run_dir.rglob("*")
        if file.is_file() and "tensorboard" not in str(file)
    }
    (printed,) = run_world(pretrained, 1, again)
    assert f"step {2 * N} of {2 * N}; nothing to do" in printed
    assert {file: file.read_bytes() for file in before} == before


def test_complete_run_without_record_is_recorded_at_restart(finished: Finished, tmp_path: Path):
    """A process can die between its last checkpoint and the record."""
    again = copy_of(finished.straight, tmp_path / "again")
    (again.run_dir / "COMPLETE").unlink()
    run_world(pretrained, 1, again)
    assert json.loads((again.run_dir / "COMPLETE").read_text())["step"] == 2 * N


def test_run_made_longer_is_not_complete_while_it_trains(finished: Finished, tmp_path: Path):
    longer = with_train(copy_of(finished.straight, tmp_path / "longer"), steps=3 * N, stop_at=2 * N + 1)
    (printed,) = run_world(pretrained, 1, longer)
    assert f"train.steps {2 * N} -> {3 * N}: the learning rate of the remaining steps changes" in printed
    assert list(losses(longer))[-1] == 2 * N + 1
    assert not (longer.run_dir / "COMPLETE").exists()


def with_engine(config: RunConfig, path: Path, **engine: Any) -> RunConfig:
    return replace(config, ds_config=write_engine_config(path, **engine))


@pytest.mark.fault("F38")
def test_each_identity_difference_raises_with_its_name_alone(finished: Finished, tmp_path: Path):
    run = finished.stopped
    other_text = write_corpus(tmp_path / "other text", seed=1)
    other_words = write_corpus(tmp_path / "other words", words=130)
    changes = {
        ("model.hidden_size", "was 32, is now 64"): with_model(run, hidden_size=64),
        ("model.hidden_dropout", "was 0.1, is now 0.0"): with_model(run, hidden_dropout=0.0),
        ("masking.rate", "was 0.15, is now 0.2"): replace(run, masking=replace(run.masking, rate=0.2)),
        ("objective.par_weight", "was 1.0, is now 0.5"): replace(run, objective=replace(run.objective, par_weight=0.5)),
        ("train.seed", "was 7, is now 8"): with_train(run, seed=8),
        ("data.lanes", "was 4, is now 2"): replace(run, data=replace(run.data, lanes=2)),
        ("corpus", ""): replace(run, corpus=other_text),
        ("train_batch_size", "was 8, is now 16"): with_engine(run, tmp_path / "16.json", global_batch=16),
        ("precision", "was 'fp32', is now 'bf16'"): with_engine(run, tmp_path / "bf16.json", precision="bf16"),
    }
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    for (name, values), problems in zip(changes, problems_of(1, list(changes.values())), strict=True):
        assert len(problems) == 2, problems
        assert problems[0].startswith(f"{name} was")
        assert values in problems[0]
        assert "belong to another run" in problems[1]
        assert "choose another --run-dir" in problems[1]
    (words,) = problems_of(1, [replace(run, corpus=other_words)])
    assert [line.split(" was")[0] for line in words[:-1]] == ["corpus", "model.vocab_size", "vocabulary"]
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("global_batch", [16, 6])
def test_all_identity_differences_are_listed_together(finished: Finished, tmp_path: Path, global_batch: int):
    """Also if the lanes of the checkpoint, chosen by default, do not fit the new batch: 4 does not divide 6."""
    run = replace(finished.stopped, data=replace(finished.stopped.data, lanes=None))
    other = with_engine(run, tmp_path / "ds.json", global_batch=global_batch, micro_batch=2)
    other = with_train(with_model(other, hidden_size=64), seed=8)
    other = replace(other, corpus=write_corpus(tmp_path / "other", seed=1), masking=replace(run.masking, max_span=5))
    (problems,) = problems_of(1, [other])
    named = {line.split(" was")[0] for line in problems[:-1]}
    assert named - {"data.lanes"} == {
        "corpus",
        "masking.max_span",
        "model.hidden_size",
        "train.seed",
        "train_batch_size",
    }


def test_ranks_that_do_not_divide_the_lanes_raise_with_usable_numbers(small_corpus: Path, tmp_path: Path):
    """Six lanes over four ranks: the order of samples would change."""
    config = run_config(small_corpus, tmp_path, steps=4, global_batch=12, micro_batch=3)
    config = replace(config, data=replace(config.data, lanes=6))
    assert problems_of(1, [with_train(config, stop_at=2)]) == [[]]
    (problems,) = problems_of(4, [replace(config, data=replace(config.data, lanes=None))])
    assert problems == [
        "the run reads its corpus in 6 lanes, which 4 data-parallel ranks cannot share: use one of [1, 2, 3, 6] of them"
    ]


def test_settings_outside_the_identity_may_change_on_resume(finished: Finished, tmp_path: Path):
    stopped = copy_of(finished.stopped, tmp_path / "run")
    other = with_model(with_train(stopped, stop_at=None, log_every=2), activation_checkpointing=True)
    run_world(pretrained, 1, replace(other, data=replace(other.data, workers=1)))
    expected = tensors(checkpoint(finished.straight, 2 * N))
    weights = {name: value for name, value in tensors(checkpoint(other, 2 * N)).items() if ".weight/" in name}
    assert len(weights) > 20
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert losses(other)[2 * N]["validation/ae"] == pytest.approx(
        losses(finished.straight)[2 * N]["validation/ae"], rel=1e-5
    )
    assert problems_of(1, [with_model(finished.stopped, attention="reference")]) == [[]]


def optimizer_settings(config: RunConfig) -> list[tuple[float, float]]:
    """Return weight decay and beta2 of each group after a resume."""
    from support.small_runs import start_run, take_steps

    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.resume import load_checkpoint
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine: Any = build_engine(run)
    state = load_checkpoint(EngineState(engine, run.topology), checkpoint(config, N))
    take_steps(run, engine, state, steps=1)
    return [(group["weight_decay"], group["betas"][1]) for group in engine.optimizer.param_groups]


def test_optimizer_settings_may_change_on_resume(finished: Finished):
    """DeepSpeed's own loader would silently keep the saved ones."""
    other = replace(finished.stopped, optim=replace(finished.stopped.optim, weight_decay=0.5, beta2=0.9))
    (groups,) = run_world(optimizer_settings, 1, other)
    assert groups == [(0.5, 0.9), (0.0, 0.9)]


def test_corrupt_checkpoint_falls_back_to_the_previous_one(finished: Finished, tmp_path: Path):
    run = copy_of(finished.straight, tmp_path / "run")
    (run.run_dir / "COMPLETE").unlink()
    file = next(checkpoint(run, 2 * N).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (printed,) = run_world(pretrained, 1, run)
    assert f"resuming after step {N}" in printed
    assert losses(run) == losses(finished.straight)
    check_equal_bits(checkpoint(finished.straight, 2 * N), checkpoint(run, 2 * N))


def test_stop_at_below_the_reached_step_changes_nothing(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path, steps=4)
    (printed,) = run_world(pretrained, 1, with_train(config, stop_at=2))
    assert "stopped after step 2 of 4" in printed
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    (printed,) = run_world(pretrained, 1, with_train(config, stop_at=1))
    assert "nothing to do before --train.stop-at 1" in printed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
