"""What the model says to a fixed question: stored with a checkpoint, asked again when it is loaded.

Checksums tell that files are as they were written; this tells that the engine computes with them what it computed
when it was saved: a parameter in the wrong place, or a model whose code has changed, answers differently.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.parallel.groups import Topology

_SAMPLES, _CONTEXT, _PREDICTIONS, _VALUES = 1, 4, 2, 4  # few: the training stands still for it at every save
_READS = ("ae", "par")

TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Largest difference, in standard deviations of the logits, where sums may be rounded otherwise: another
tensor-parallel size, ZeRO 3 or not, device or release of torch. bf16 keeps 8 bits, and each layer rounds anew."""
SAME_PLACE_TOLERANCE = 1e-5
"""The same where nothing that rounds has changed."""


@torch.no_grad()
def fingerprint(
    engine: nn.Module, topology: Topology, *, vocab_size: int, max_positions: int, zero_stage: int
) -> dict[str, Any]:
    """Statistics of the logits of a fixed small batch, JSON values, and what decides how they are rounded.

    Every rank must call and all get the same. `engine` is left in the mode it was in; no random number is drawn.
    """
    was_training = engine.training
    engine.eval()
    inputs = _probe_batch(vocab_size, context=min(_CONTEXT, max_positions), device=topology.device)
    logits_KMBV = engine(inputs=inputs, objectives=_READS)
    engine.train(was_training)
    return {
        "statistics": dict(zip(_READS, _statistics(logits_KMBV, topology, vocab_size=vocab_size), strict=True)),
        "computed_on": {
            "tp": topology.tp,
            "zero3": zero_stage == 3,  # which brings a linear layer of its own: the bias is added after rounding
            "device": _name(topology.device),
            "torch": torch.__version__,
        },
    }


def is_finite(answers: dict[str, Any]) -> bool:
    """Whether all statistics of a fingerprint are finite."""
    return all(math.isfinite(value) for read in answers["statistics"].values() for value in read.values())


def fingerprint_differences(saved: dict[str, Any], now: dict[str, Any], *, precision: str) -> list[str]:
    """How far the answers are apart, a sentence for each that differs by more than the tolerance."""
    same_place = saved["computed_on"] == now["computed_on"]
    tolerance = SAME_PLACE_TOLERANCE if same_place else TOLERANCES[precision]
    found = []
    for read in _READS:
        before, after = saved["statistics"][read], now["statistics"][read]
        for name, was in before.items():
            if not abs(was - after[name]) <= tolerance * before["std"]:  # not so for NaN either
                found.append(
                    f"{name} of the {read} logits was {was:.6g} when the checkpoint was saved and is {after[name]:.6g} "
                    f"now (tolerance {tolerance:g} standard deviations)"
                )
    return found


def _probe_batch(vocab_size: int, *, context: int, device: torch.device) -> SlotInputs[Tensor]:
    """Tokens spread over the vocabulary in a context of which two positions are predicted, one after the other."""
    slots = context + 2 * _PREDICTIONS
    predicted = [context // 3, 2 * context // 3]
    positions = [*range(context), *predicted, *predicted]
    order = [*(context * [0]), 1, 2, -1, -2]
    spread = torch.arange(_SAMPLES * slots) * 7919  # a prime, so that neighbours in the text are not in the vocabulary
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
    """Mean, deviation, maximum and some values of each read's logits over the whole vocabulary, without its padding."""
    first_row = topology.tp_rank * logits_KMBV.shape[-1]
    own = [_own_sums(logits_MBV.double(), first_row=first_row, vocab_size=vocab_size) for logits_MBV in logits_KMBV]
    parts = topology.all_gather_object(own)[: topology.tp]  # the ranks of one copy of the model
    return [_combined([sums[k] for sums in parts]) for k in range(len(_READS))]


def _own_sums(logits_MBV: Tensor, *, first_row: int, vocab_size: int) -> list[float]:
    """Of this rank's rows of the vocabulary: maximum, count, sum, sum of squares, and the values at fixed places."""
    used_MBV = logits_MBV[..., : max(0, vocab_size - first_row)]
    largest = used_MBV.max().item() if used_MBV.numel() else -math.inf
    values = []
    for number in range(_VALUES):
        row = number * (vocab_size - 1) // (_VALUES - 1) - first_row
        is_own = 0 <= row < logits_MBV.shape[-1]
        values.append(logits_MBV.flatten(0, 1)[number % (_PREDICTIONS * _SAMPLES), row].item() if is_own else 0.0)
    return [largest, used_MBV.numel(), used_MBV.sum().item(), used_MBV.square().sum().item(), *values]


def _combined(parts: list[list[float]]) -> dict[str, float]:
    """The statistics of one read from every tensor-parallel rank's `_own_sums`."""
    largest, *sums = zip(*parts, strict=True)
    count, total, squares, *values = map(sum, sums)
    mean = total / count
    return {
        "mean": mean,
        "std": math.sqrt(max(0.0, squares / count - mean**2)),
        "max": max(largest),
        **{f"value {number}": value for number, value in enumerate(values)},
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
