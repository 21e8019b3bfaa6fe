"""The FLOPs formula against torch's count of the model's matrix products."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from support.worlds import run_world

from pmlm_dist.config import ModelConfig
from pmlm_dist.metrics.flops import forward_flops, peak_tflops, training_flops


@dataclass(frozen=True)
class Case:
    """A model and the size of its batch."""

    model: ModelConfig
    context: int
    predictions: int
    batch: int
    vocab_rows: int
    objectives: tuple[str, ...] = ("ae", "par")

    def evaluate(self, formula: Callable[..., float]) -> float:
        """FLOPs of a sample by `formula`."""
        return formula(
            self.model,
            context=self.context,
            predictions=self.predictions,
            vocab_rows=self.vocab_rows,
            objectives=self.objectives,
        )


BASIC = ModelConfig(vocab_size=250, hidden_size=64, num_layers=3, num_heads=4, ffn_size=256, max_positions=160)
CASES = {
    "short": Case(BASIC, context=32, predictions=5, batch=2, vocab_rows=256),
    "long": Case(BASIC, context=160, predictions=24, batch=1, vocab_rows=256),
    "half masked": Case(BASIC, context=64, predictions=32, batch=2, vocab_rows=256),
    "wide vocabulary": Case(replace(BASIC, vocab_size=8000), context=32, predictions=5, batch=3, vocab_rows=8064),
    "one layer": Case(replace(BASIC, num_layers=1), context=32, predictions=5, batch=2, vocab_rows=256),
    "narrow, deep": Case(
        replace(BASIC, hidden_size=32, num_layers=6, ffn_size=96), context=64, predictions=10, batch=2, vocab_rows=256
    ),
    "AE alone": Case(BASIC, context=32, predictions=5, batch=2, vocab_rows=256, objectives=("ae",)),
    "PAR alone": Case(BASIC, context=32, predictions=5, batch=2, vocab_rows=256, objectives=("par",)),
    "no relative positions": Case(
        replace(BASIC, relative_bias=False), context=32, predictions=5, batch=2, vocab_rows=256
    ),
}


def count_flops(cases: list[Case]) -> list[tuple[float, float]]:
    """FLOPs of one sample as counted by torch: forward, and forward with backward; for one rank."""
    from torch.utils.flop_counter import FlopCounterMode

    from pmlm_dist.masking.layout import SlotInputs
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups

    groups.init_process_groups()
    counts = []
    for case in cases:
        model = build_model(case.model, padded_vocab_size=case.vocab_rows)
        slots = case.context + 2 * case.predictions
        zeros = torch.zeros(case.batch, slots, dtype=torch.int64)
        predicted = torch.arange(case.predictions).expand(case.batch, -1)
        with FlopCounterMode(display=False) as forward:
            nll_KMB, _ = model(
                inputs=SlotInputs(zeros, zeros, zeros, zeros, torch.ones_like(zeros).bool(), predicted),
                targets_BM=torch.zeros_like(predicted),
                objectives=case.objectives,
            )
        with FlopCounterMode(display=False) as backward:
            nll_KMB.sum().backward()
        first = forward.get_total_flops()
        counts.append((first / case.batch, (first + backward.get_total_flops()) / case.batch))
    return counts


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[float, float]]:
    (flops,) = run_world(count_flops, 1, list(CASES.values()))
    return dict(zip(CASES, flops, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_formula_equals_the_count_of_torch(counts: dict[str, tuple[float, float]], name: str):
    case = CASES[name]
    assert case.evaluate(forward_flops) == pytest.approx(counts[name][0], rel=0.01)
    assert case.evaluate(training_flops) == pytest.approx(counts[name][1], rel=0.01)


def test_recomputation_does_not_count():
    case = CASES["short"]
    recomputing = replace(case, model=replace(case.model, activation_checkpointing=True))
    assert recomputing.evaluate(training_flops) == case.evaluate(training_flops)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA Imaginary 1", None),
    ],
)
def test_peak_tflops_by_device_name(monkeypatch: pytest.MonkeyPatch, device_name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: device_name)
    assert peak_tflops(None, GPU) == peak


def test_stated_peak_tflops_has_priority_and_a_cpu_has_no_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    assert peak_tflops(123.0, GPU) == 123.0
    assert peak_tflops(1.5, CPU) == 1.5
    assert peak_tflops(None, CPU) is None
