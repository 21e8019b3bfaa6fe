"""The readings of the visibility rule side by side: one attention, forward and backward, over context lengths."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Report, interleaved, ratio

from pmlm_dist.model.attention import ATTENTION, Slots
from pmlm_dist.model.relative_position import RelativeBias
from pmlm_dist.parallel import groups
from pmlm_dist.training.allocator import keep_freed_memory


@dataclass(frozen=True)
class AttentionOptions:
    """Which attention to time."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Context lengths S; 15 % of them are predicted."""
    slots: int = 4096
    """Text tokens of a batch: batch = slots / S."""
    num_heads: int = 8
    """Heads of size 64."""
    threads: int = 2
    """Threads of torch."""
    repeats: int = 5
    """Rounds that count."""

    def quick(self) -> AttentionOptions:
        """A smoke run."""
        return dataclasses.replace(self, lengths=(64, 128), slots=256, repeats=1)


def run(options: AttentionOptions) -> Report:
    """Plan, forward and backward of every reading, in turn, for every length."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    groups.start()
    rows: dict[str, dict[str, float]] = {}
    figures: dict[str, float] = {}
    for length in options.lengths:
        seconds = interleaved({name: _step(name, length, options) for name in ATTENTION}, repeats=options.repeats)
        for name, times in seconds.items():
            rows.setdefault(name, {})[f"S={length} ms"] = 1e3 * statistics.median(times)
        figures[f"split_vs_dense_{length}"] = ratio(seconds, "split", "dense")
    return Report("attention", dataclasses.asdict(options), rows, figures)


def _step(name: str, length: int, options: AttentionOptions) -> Callable[[], object]:
    batch, predictions = max(1, options.slots // length), -(-15 * length // 100)
    slots = _slots(batch, length, predictions)
    shape = (slots.order_BT.shape[1], batch, options.num_heads)
    q_QBHD = torch.randn(*shape, 64, requires_grad=True)
    kv_TBH2D = torch.randn(*shape, 2, 64, requires_grad=True)
    table = RelativeBias(options.num_heads, buckets=32, max_distance=128, std=0.02)
    attention = ATTENTION[name]

    def step() -> None:
        plan = attention.plan(slots, table, q_QBHD.dtype)
        attention.attend(q_QBHD, kv_TBH2D, plan.inner, dropout=0.0).sum().backward()
        q_QBHD.grad = kv_TBH2D.grad = table.weight.grad = None

    return step


def _slots(batch: int, length: int, predictions: int) -> Slots:
    """Every position its own span, evenly spread."""
    predicted_M = torch.arange(predictions) * (length // predictions)
    steps_M = torch.arange(1, predictions + 1)
    order_T = torch.cat([torch.zeros(length, dtype=torch.long), steps_M, -steps_M])
    positions_T = torch.cat([torch.arange(length), predicted_M, predicted_M])
    return Slots(
        order_T.expand(batch, -1),
        torch.ones(batch, len(order_T), dtype=torch.bool),
        positions_T.expand(batch, -1),
        num_context=length,
        predicted_BM=predicted_M.expand(batch, -1),
    )
