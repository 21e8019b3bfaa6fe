"""Fingerprint of a model: statistics of its logits on a fixed batch, stored with a checkpoint and compared on load.

Checksums verify the files. The fingerprint verifies the computation: it changes when a parameter is loaded into the
wrong place, or when the model's code has changed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.parallel.groups import Topology

_SAMPLES, _CONTEXT, _PREDICTIONS, _VALUES = 1, 4, 2, 4  # small: training waits for it at every save
_OBJECTIVES = ("ae", "par")

TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Tolerance, in standard deviations of the logits, where sums may be rounded differently: another tensor-parallel
size or attention backend, ZeRO-3 or not, another device or release of torch. bf16 keeps 8 bits, and every layer rounds
again."""
ROUNDING = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
"""Distance of neighboring numbers at most, as a share of their magnitude: a logit may be rounded to either of two."""
SAME_SETUP_TOLERANCE = 1e-5
"""Tolerance where nothing that affects rounding has changed."""


@torch.no_grad()
def fingerprint(state: EngineState) -> dict[str, Any]:
    """Return statistics of the logits of a fixed small batch, and what affects their rounding, as JSON values.

    Every rank must call; all get the same result. The mode of the engine is restored and no random number is drawn.
    """
    engine, topology, model = state.engine, state.topology, state.model.config
    assert model.vocab_size is not None
    was_training = engine.training
    engine.eval()
    inputs = _probe_batch(model.vocab_size, context=min(_CONTEXT, model.max_positions), device=topology.device)
    logits_KMBV = engine(inputs=inputs, objectives=_OBJECTIVES)
    engine.train(was_training)
    statistics = _statistics(logits_KMBV, topology, vocab_size=model.vocab_size)
    return {
        "statistics": dict(zip(_OBJECTIVES, statistics, strict=True)),
        "computed_on": {
            "tp": topology.tp,
            "attention": model.attention,
            "zero3": engine.zero_optimization_stage() == 3,  # its own linear layer adds the bias after rounding
            "device": _device_name(topology.device),
            "torch": torch.__version__,
        },
    }


def is_finite(saved: dict[str, Any]) -> bool:
    """Whether all statistics of a fingerprint are finite."""
    return all(math.isfinite(value) for statistics in saved["statistics"].values() for value in statistics.values())


def fingerprint_differences(saved: dict[str, Any], now: dict[str, Any], *, precision: str) -> list[str]:
    """Return one sentence for each statistic that differs by more than the tolerance."""
    same_setup = saved["computed_on"] == now["computed_on"]
    tolerance = SAME_SETUP_TOLERANCE if same_setup else TOLERANCES[precision]
    problems = []
    for objective in _OBJECTIVES:
        before, after = saved["statistics"][objective], now["statistics"][objective]
        for name, was in before.items():
            rounding = 0.0 if same_setup else ROUNDING[precision] * abs(was)
            if not abs(was - after[name]) <= tolerance * before["std"] + rounding:  # negated: NaN is reported
                problems.append(
                    f"{name} of the {objective} logits was {was:.6g} when the checkpoint was saved, is "
                    f"{after[name]:.6g} now (tolerance {tolerance:g} standard deviations)"
                )
    return problems


def _probe_batch(vocab_size: int, *, context: int, device: torch.device) -> SlotInputs[Tensor]:
    """Return a batch of tokens spread over the vocabulary; two context positions are predicted, one per step."""
    slots = context + 2 * _PREDICTIONS
    predicted = [context // 3, 2 * context // 3]
    positions = [*range(context), *predicted, *predicted]
    order = [*(context * [0]), 1, 2, -1, -2]
    spread = torch.arange(_SAMPLES * slots) * 7919  # a prime: neighboring slots get distant tokens
    inputs = {
        "tokens_BT": (spread % vocab_size).view(_SAMPLES, slots),
        "positions_BT": torch.tensor([positions] * _SAMPLES),
        "segments_BT": torch.tensor([[position * 2 // context for position in positions]] * _SAMPLES),
        "order_BT": torch.tensor([order] * _SAMPLES, dtype=torch.int32),
        "valid_BT": torch.ones(_SAMPLES, slots, dtype=torch.bool),
        "predicted_BM": torch.tensor([predicted] * _SAMPLES),
    }
    return SlotInputs(**{name: tensor.to(device) for name, tensor in inputs.items()})


def _statistics(logits_KMBV: Tensor, topology: Topology, *, vocab_size: int) -> list[dict[str, float]]:
    """Mean, deviation, maximum and some values of each objective's logits over the vocabulary, padding excluded."""
    first_row = topology.tp_rank * logits_KMBV.shape[-1]
    own = [_own_sums(logits_MBV.double(), first_row=first_row, vocab_size=vocab_size) for logits_MBV in logits_KMBV]
    parts = topology.all_gather_object(own)[: topology.tp]  # the ranks of one copy of the model
    return [_combined([sums[k] for sums in parts]) for k in range(len(_OBJECTIVES))]


def _own_sums(logits_MBV: Tensor, *, first_row: int, vocab_size: int) -> list[float]:
    """Return maximum, count, sum, sum of squares and values at fixed rows, of this rank's rows of the vocabulary."""
    used_MBV = logits_MBV[..., : max(0, vocab_size - first_row)]
    largest = used_MBV.max().item() if used_MBV.numel() else -math.inf
    values = []
    for number in range(_VALUES):
        row = number * (vocab_size - 1) // (_VALUES - 1) - first_row
        is_own = 0 <= row < logits_MBV.shape[-1]
        values.append(logits_MBV.flatten(0, 1)[number % (_PREDICTIONS * _SAMPLES), row].item() if is_own else 0.0)
    return [largest, used_MBV.numel(), used_MBV.sum().item(), used_MBV.square().sum().item(), *values]


def _combined(parts: list[list[float]]) -> dict[str, float]:
    """Return the statistics of one objective from the `_own_sums` of every tensor-parallel rank."""
    largest, *sums = zip(*parts, strict=True)
    count, total, squares, *values = map(sum, sums)
    mean = total / count
    return {
        "mean": mean,
        "std": math.sqrt(max(0.0, squares / count - mean**2)),
        "max": max(largest),
        **{f"value {number}": value for number, value in enumerate(values)},
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
