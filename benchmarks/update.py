"""What becomes of gradients that are there: summing, norm, clipping, AdamW, weights; on one rank, without any product.

plain torch             fp32 masters, `clip_grad_norm_`, fused AdamW: as in the plain loops of `step`
ours                    the engine of our training
DeepSpeed, ZeRO n       `deepspeed.initialize` with the same optimizer and the same JSON
.., bf16 sums           the same without `grad_accum_dtype: fp32`, which is another class of DeepSpeed's

A backward pass hands each parameter a gradient that was drawn before, so that every row is given the same and nothing
else is timed. All rows keep freed memory. So what a machine without bf16 products adds to a step in bf16 shows as well.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from harness import Report, device, interleaved, ratio, synchronize
from ranks import World
from step import StepOptions, adamw_on_masters

from pmlm_dist.config import OptimConfig
from pmlm_dist.engine.deepspeed_config import load_engine_config
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.model.transformer import build_model
from pmlm_dist.parallel import groups

OURS, PLAIN, OTHER_CLASS = "ours", "plain torch", "DeepSpeed, ZeRO 1, bf16 sums"


@dataclass(frozen=True)
class UpdateOptions:
    """Which weights are updated."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and gradients."""
    layers: int = 4
    """Layers of hidden 512, beside 15.6 M numbers of the token matrix."""
    threads: int = 2
    """Threads of torch."""
    repeats: int = 20
    """Rounds that count."""

    def quick(self) -> UpdateOptions:
        """A smoke run."""
        return dataclasses.replace(self, layers=1, repeats=1)

    @property
    def step(self) -> StepOptions:
        """The options of `step` with the same model."""
        return StepOptions(dtype=self.dtype, layers=self.layers)

    def engine(self, row: str) -> dict[str, Any]:
        """DeepSpeed's JSON."""
        engine = self.step.engine
        if row == OTHER_CLASS:
            del engine["data_types"]
        return engine


def run(options: UpdateOptions) -> Report:
    """All rows in turn."""
    deepspeed = f"DeepSpeed, ZeRO {options.engine(OURS)['zero_optimization']['stage']}"
    rows = [PLAIN, OURS, deepspeed, *([OTHER_CLASS] if options.dtype == "bf16" else [])]
    with ExitStack() as stack:
        worlds = {
            row: stack.enter_context(World(prepare, row, options, ranks=1, threads=options.threads)) for row in rows
        }
        seconds = interleaved({row: world.call for row, world in worlds.items()}, repeats=options.repeats, warm_up=3)
    figures = {"vs_plain": ratio(seconds, OURS, PLAIN), "vs_deepspeed": ratio(seconds, OURS, deepspeed)}
    medians = {row: {"seconds": statistics.median(times)} for row, times in seconds.items()}
    return Report("update", dataclasses.asdict(options), medians, figures)


def prepare(row: str, options: UpdateOptions) -> Callable[[], None]:
    """The update of a row, ready to be called; it is over when it returns."""
    groups.init_process_groups()
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(options.step.model, padded_vocab_size=options.step.vocabulary)
    make = {PLAIN: _plain, OURS: _ours}.get(row, _deepspeed)
    backward, finish = make(model, row, options)
    weights = list(model.parameters())
    gradients = [1e-3 * torch.randn_like(weight) for weight in weights]

    def step() -> None:
        backward(_Given.apply(gradients, *weights))
        finish()
        synchronize()

    return step


class _Given(torch.autograd.Function):
    """A loss of which the parameters' gradients are given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return weights[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.gradients


_Made = tuple[Callable[[Any], Any], Callable[[], Any]]
"""Backward pass of a loss, and what comes after it."""


def _plain(model: Any, _: str, options: UpdateOptions) -> _Made:
    return torch.Tensor.backward, adamw_on_masters(model.to(device(), options.step.torch_dtype))


def _ours(model: Any, row: str, options: UpdateOptions) -> _Made:
    from pmlm_dist.engine.deepspeed_engine import initialize_engine
    from pmlm_dist.training.step import optimizer_step

    topology = groups.init_process_groups()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.json"
        path.write_text(json.dumps(options.engine(row)))
        config = load_engine_config(path, has_accelerator=topology.device.type == "cuda")
    engine = initialize_engine(model, optim=OptimConfig(), config=config, topology=topology)
    return engine.backward, lambda: optimizer_step(engine, config, topology, is_boundary=True)


def _deepspeed(model: Any, row: str, options: UpdateOptions) -> _Made:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not used, and it takes a minute to compile
    optimizer, config = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), options.engine(row)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine.backward, engine.step
