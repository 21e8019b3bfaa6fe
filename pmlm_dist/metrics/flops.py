"""FLOPs of the model: what the method needs, whatever an implementation spends.

Counted are the matrix products (2 m n k each) of the split layout; a training step costs three forward passes' worth
(one forward, two in the backward). Recomputation by activation checkpointing does not count.

Legend: S context slots, M predictions, T = S + 2M, R = 2M read slots, E hidden size, F inner size, V vocabulary rows.
"""

from __future__ import annotations

import torch

from pmlm_dist.config import ModelConfig
from pmlm_dist.devices import TERA, device_named


def forward_flops(
    model: ModelConfig, *, context: int, predictions: int, vocab_rows: int, objectives: tuple[str, ...] = ("ae", "par")
) -> float:
    """FLOPs of one sample's forward pass through all layers and the head on the predicted slots.

    Without "par" among the objectives' `reads` there are no appended slots.
    """
    appended = 2 * predictions if "par" in objectives else 0
    total, read = context + appended, len(objectives) * predictions
    size, inner = model.hidden_size, model.ffn_size
    pairs_inner = context * context + appended * total
    pairs_last = predictions * sum({"ae": context, "par": total}[name] for name in objectives)
    inner_layer = total * (8 * size * size + 4 * size * inner) + 4 * size * pairs_inner
    last_layer = total * 4 * size * size + read * (4 * size * size + 4 * size * inner) + 4 * size * pairs_last
    head = read * (2 * size * size + 2 * size * vocab_rows)
    return float((model.num_layers - 1) * inner_layer + last_layer + head)


def training_flops(
    model: ModelConfig, *, context: int, predictions: int, vocab_rows: int, objectives: tuple[str, ...] = ("ae", "par")
) -> float:
    """FLOPs of one sample's share of a training step: forward and backward."""
    return 3.0 * forward_flops(
        model, context=context, predictions=predictions, vocab_rows=vocab_rows, objectives=objectives
    )


def peak_tflops(stated: float | None, device: torch.device) -> float | None:
    """Peak TFLOP/s of one device: as stated, else by its name (that of half precision), else None (unknown)."""
    if stated is not None or device.type != "cuda":
        return stated
    known = device_named(torch.cuda.get_device_name(device))
    return None if known is None else max(known.peak.values()) / TERA
