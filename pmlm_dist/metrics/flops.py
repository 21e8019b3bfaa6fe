"""Model FLOPs: the operations that the method needs, independent of the implementation.

Only matrix products count, at 2 m n k each. A training step costs three forward passes: one forward, two in the
backward. Recomputation by activation checkpointing does not count.

Legend: S context slots, M predictions, T = S + 2M slots, E hidden size, F size of the feed-forward layer, V vocabulary
rows. Each objective predicts M slots.
"""

import torch

from pmlm_dist.config import ModelConfig
from pmlm_dist.devices import TERA, device_named


def forward_flops(
    model: ModelConfig, *, context: int, predictions: int, vocab_rows: int, objectives: tuple[str, ...] = ("ae", "par")
) -> float:
    """Return the FLOPs of one sample's forward pass: all layers, and the head on the predicted slots.

    Without "par" among `objectives` there are no appended slots.
    """
    appended = 2 * predictions if "par" in objectives else 0
    total, predicted = context + appended, len(objectives) * predictions
    size, inner = model.hidden_size, model.ffn_size
    # Context queries attend to the context alone, appended queries to all slots; 4 E for each pair: q k^T and p v.
    pairs_inner = context * context + appended * total
    pairs_last = predictions * sum({"ae": context, "par": total}[name] for name in objectives)
    inner_layer = total * (8 * size * size + 4 * size * inner) + 4 * size * pairs_inner
    # The last layer computes keys and values of all slots, everything else for the predicted slots alone.
    last_layer = total * 4 * size * size + predicted * (4 * size * size + 4 * size * inner) + 4 * size * pairs_last
    head = predicted * (2 * size * size + 2 * size * vocab_rows)
    return float((model.num_layers - 1) * inner_layer + last_layer + head)


def training_flops(
    model: ModelConfig, *, context: int, predictions: int, vocab_rows: int, objectives: tuple[str, ...] = ("ae", "par")
) -> float:
    """Return the FLOPs of one sample in a training step, forward and backward."""
    return 3.0 * forward_flops(
        model, context=context, predictions=predictions, vocab_rows=vocab_rows, objectives=objectives
    )


def peak_tflops(stated: float | None, device: torch.device) -> float | None:
    """Return the peak TFLOP/s of one device: `stated`, else half precision by device name, else None (unknown)."""
    if stated is not None or device.type != "cuda":
        return stated
    known = device_named(torch.cuda.get_device_name(device))
    return None if known is None else max(known.peak.values()) / TERA
