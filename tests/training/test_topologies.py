"""One training, many topologies: losses, gradient norm and weights after 5 steps equal those of a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Trained, run_config, train, with_model
from worlds import run_world

pytestmark = pytest.mark.distributed

STEPS = 5
ROW_PARALLEL = ("attention.output.weight", "ffn_out.weight")  # split along their input


@pytest.fixture(scope="module")
def single(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process, no ZeRO, no accumulation, fp32."""
    config = run_config(small_corpus, tmp_path_factory.mktemp("single"), steps=STEPS, zero=0, micro_batch=8)
    return run_world(train, 1, config)[0]


def assemble(answers: list[Trained], *, tp: int, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights from those of the first `tp` ranks, checked to be equal on the other data-parallel ranks."""
    whole = {}
    for name, like in expected.items():
        parts = [answer.weights[name] for answer in answers]
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank % tp]), f"{name} differs between data-parallel ranks"
        if parts[0].shape == like.shape:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between tensor-parallel peers"
            whole[name] = parts[0]
        else:
            whole[name] = torch.cat(parts[:tp], dim=1 if name.endswith(ROW_PARALLEL) else 0)
    return whole


def check_equal(answers: list[Trained], single: Trained, *, tp: int, tolerance: float) -> None:
    for answer in answers:
        assert answer.losses == answers[0].losses
        torch.testing.assert_close(answer.losses, single.losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(answer.norms, single.norms, rtol=10 * tolerance, atol=0)
    weights = assemble(answers, tp=tp, expected=single.weights)
    for name, expected in single.weights.items():
        difference = (weights[name] - expected).abs().max()
        assert difference <= 10 * tolerance * max(1.0, float(expected.abs().max())), (name, difference)


@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [
        (1, 1, {"zero": 1, "micro_batch": 8}),
        (1, 1, {"zero": 0, "micro_batch": 4}),
        (1, 1, {"zero": 1, "micro_batch": 2}),
        (2, 1, {"zero": 0, "micro_batch": 4}),
        (2, 1, {"zero": 1, "micro_batch": 4}),
        (2, 1, {"zero": 2, "micro_batch": 4}),
        (2, 1, {"zero": 3, "micro_batch": 4}),
        (2, 1, {"zero": 1, "micro_batch": 2}),
        (2, 1, {"zero": 3, "micro_batch": 1}),
        (2, 2, {"zero": 0, "micro_batch": 8}),
        (2, 2, {"zero": 1, "micro_batch": 4}),
        (4, 2, {"zero": 2, "micro_batch": 2}),
        (4, 2, {"zero": 3, "micro_batch": 4}),
        (4, 4, {"zero": 1, "micro_batch": 8}),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_fp32_equals_a_single_process(small_corpus, tmp_path, single, *, ranks, tp, engine):
    config = run_config(small_corpus, tmp_path, steps=STEPS, tp=tp, **engine)
    check_equal(run_world(train, ranks, config), single, tp=tp, tolerance=1e-5)


def test_activation_checkpointing_equals_a_single_process(small_corpus, tmp_path, single):
    config = run_config(small_corpus, tmp_path, steps=STEPS, tp=2, zero=3, micro_batch=2)
    config = with_model(config, activation_checkpointing=True)
    check_equal(run_world(train, 4, config), single, tp=2, tolerance=1e-5)


@pytest.mark.parametrize("stop", ["exact", "paper"])
def test_uneven_predictions_are_weighted_alike_under_any_split(small_corpus, tmp_path, stop):
    """With `stop: paper` samples have different numbers of predictions; the mean is over the whole step."""
    import dataclasses

    answers = []
    for ranks, micro_batch in ((1, 8), (1, 2), (2, 4), (2, 1)):
        config = run_config(small_corpus, tmp_path / f"{ranks}-{micro_batch}", steps=STEPS, micro_batch=micro_batch)
        config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, stop=stop))
        answers.append(run_world(train, ranks, config)[0])
    for answer in answers[1:]:
        check_equal([answer], answers[0], tp=1, tolerance=1e-5)


def bf16_run(corpus: Path, folder: Path, ranks: int, **engine: Any) -> Trained:
    tp = engine.pop("tp", 1)
    config = run_config(corpus, folder, steps=STEPS, tp=tp, precision="bf16", **engine)
    return run_world(train, ranks, config)[0]


def test_bf16_stages_agree_and_stay_near_fp32(small_corpus, tmp_path, single):
    """bf16 keeps 8 bits (rounding 0.4 %): losses of about 9.7 nats are sums of many such terms."""
    runs = {zero: bf16_run(small_corpus, tmp_path / str(zero), 2, zero=zero) for zero in (1, 2, 3)}
    runs |= {"tp": bf16_run(small_corpus, tmp_path / "tp", 2, zero=1, tp=2, micro_batch=8)}
    for name, answer in runs.items():
        torch.testing.assert_close(answer.losses, runs[1].losses, rtol=1e-3, atol=0, msg=str(name))
        torch.testing.assert_close(answer.losses, single.losses, rtol=1e-3, atol=0, msg=str(name))
        torch.testing.assert_close(answer.norms, single.norms, rtol=2e-2, atol=0, msg=str(name))
