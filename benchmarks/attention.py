"""Attention backends over context lengths: one layer of each.

reference, fused, triton              plan, forward and backward; triton on a GPU only, where it has a backward pass
reference, fused, triton, forward     plan and forward without gradients, as in validation
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from harness import Report, device, interleaved, ratio

from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.attention import ATTENTION_BACKENDS, Slots
from pmlm_dist.model.relative_position import RelativeBias
from pmlm_dist.parallel import groups


@dataclass(frozen=True)
class AttentionOptions:
    """Shapes of the attention layer."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of queries, keys, values and bias table."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Context lengths S in tokens; 15 % of the tokens are predicted."""
    slots: int = 4096
    """Context tokens of a batch: batch = slots / S."""
    num_heads: int = 8
    """Number of heads, each of size 64."""
    threads: int = 2
    """Torch threads."""
    repeats: int = 5
    """Measured rounds."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(self, lengths=(64, 128), slots=256, repeats=1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def run(options: AttentionOptions) -> Report:
    """Time all backends in interleaved rounds, for every length."""
    torch.set_num_threads(options.threads)
    groups.init_process_groups()
    keep_freed_memory()
    backends = [name for name in ATTENTION_BACKENDS if name != "triton" or device().type == "cuda"]
    rows: dict[str, dict[str, float]] = {}
    figures: dict[str, float] = {}
    for length in options.lengths:
        steps = {name: _step(name, length, options) for name in backends}
        steps |= {f"{name}, forward": _step(name, length, options, forward_only=True) for name in backends}
        seconds = interleaved(steps, repeats=options.repeats)
        for name, times in seconds.items():
            rows.setdefault(name, {})[f"S={length} ms"] = 1e3 * statistics.median(times)
        figures[f"fused_vs_reference_{length}"] = ratio(seconds, "fused", "reference")
        if "triton" in backends:
            figures[f"triton_vs_fused_{length}"] = ratio(seconds, "triton", "fused")
            figures[f"triton_vs_fused_forward_{length}"] = ratio(seconds, "triton, forward", "fused, forward")
    return Report("attention", dataclasses.asdict(options), rows, figures)


def _step(name: str, length: int, options: AttentionOptions, *, forward_only: bool = False) -> Callable[[], object]:
    batch, predictions = max(1, options.slots // length), -(-15 * length // 100)
    slots = _slots(batch, length, predictions)
    settings: dict[str, Any] = {"device": device(), "dtype": options.torch_dtype}
    shape = (slots.num_slots, batch, options.num_heads)
    q_QBHD, kv_TBH2D = torch.randn(*shape, 64, **settings), torch.randn(*shape, 2, 64, **settings)
    gradient_QBHD = torch.randn_like(q_QBHD)
    table = RelativeBias(options.num_heads, buckets=32, max_distance=128, std=0.02).to(**settings)
    attention = ATTENTION_BACKENDS[name]

    def forward() -> torch.Tensor:
        plan = attention.plan(slots, table, q_QBHD.dtype)
        return attention.attend(q_QBHD, kv_TBH2D, plan.inner, dropout=0.0)

    def step() -> None:
        forward().backward(gradient_QBHD)
        q_QBHD.grad = kv_TBH2D.grad = table.weight.grad = None

    if forward_only:
        return torch.no_grad()(forward)
    q_QBHD.requires_grad_()
    kv_TBH2D.requires_grad_()
    return step


def _slots(batch: int, length: int, predictions: int) -> Slots:
    """Slots of `batch` equal samples: evenly spread spans of one position each."""
    predicted_M = torch.arange(predictions, device=device()) * (length // predictions)
    steps_M = torch.arange(1, predictions + 1, device=device())
    context_S = torch.arange(length, device=device())
    order_T = torch.cat([torch.zeros_like(context_S), steps_M, -steps_M])
    positions_T = torch.cat([context_S, predicted_M, predicted_M])
    inputs = SlotInputs(
        tokens_BT=torch.zeros(batch, len(order_T), dtype=torch.int64, device=device()),
        positions_BT=positions_T.expand(batch, -1),
        segments_BT=torch.zeros(batch, len(order_T), dtype=torch.int64, device=device()),
        order_BT=order_T.expand(batch, -1),
        valid_BT=torch.ones(batch, len(order_T), dtype=torch.bool, device=device()),
        predicted_BM=predicted_M.expand(batch, -1),
    )
    return Slots(inputs, num_context=length)
