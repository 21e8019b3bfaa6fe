"""The optimizer step alone: gradient sums, norm, clipping, AdamW, weights; on one rank, without matrix products.

plain torch             fp32 masters, `clip_grad_norm_`, fused AdamW: as in the plain loops of `step`
ours                    the engine of our training
DeepSpeed, ZeRO n       `deepspeed.initialize` with the same optimizer and the same JSON
.., bf16 sums           the same without `grad_accum_dtype: fp32`, which selects another class of DeepSpeed

The backward pass returns gradients that were drawn before, so that all rows have the same ones and nothing else is
timed. All rows keep freed memory. A machine without bf16 instructions can run this in bf16, unlike `step`.
"""

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

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
    """Model and data type of the update."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Data type of weights and gradients."""
    layers: int = 4
    """Layers of hidden size 512."""
    vocabulary: int = 30_528
    """Size of the vocabulary: the token embedding has 15.6 M elements."""
    threads: int = 2
    """Torch threads."""
    repeats: int = 20
    """Measured rounds."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(self, layers=1, vocabulary=1000, threads=1, repeats=1)

    @property
    def step(self) -> StepOptions:
        """The options of `step` with the same model."""
        return StepOptions(dtype=self.dtype, layers=self.layers, vocabulary=self.vocabulary)

    def engine(self, row: str) -> dict[str, Any]:
        """DeepSpeed's JSON."""
        engine = self.step.engine
        if row == OTHER_CLASS:
            del engine["data_types"]
        return engine


def run(options: UpdateOptions) -> Report:
    """Time all rows in interleaved rounds."""
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
    """Prepare the update of a row; the returned function waits for the accelerator."""
    groups.init_process_groups()
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(options.step.model, padded_vocab_size=options.step.vocabulary)
    make = {PLAIN: _plain_torch, OURS: _ours}.get(row, _deepspeed)
    backward, finish = make(model, row, options)
    weights = list(model.parameters())
    gradients = [1e-3 * torch.randn_like(weight) for weight in weights]

    def step() -> None:
        backward(_FixedGradients.apply(gradients, *weights))
        finish()
        synchronize()

    return step


class _FixedGradients(torch.autograd.Function):
    """A loss whose gradients are given tensors."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return weights[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.gradients


_Row = tuple[Callable[[Any], Any], Callable[[], Any]]
"""Backward pass of a loss, and the update after it."""


def _plain_torch(model: Any, _: str, options: UpdateOptions) -> _Row:
    return torch.Tensor.backward, adamw_on_masters(model.to(device(), options.step.torch_dtype))


def _ours(model: Any, row: str, options: UpdateOptions) -> _Row:
    from pmlm_dist.engine.deepspeed_engine import initialize_engine
    from pmlm_dist.training.step import optimizer_step

    topology = groups.init_process_groups()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.json"
        path.write_text(json.dumps(options.engine(row)))
        config = load_engine_config(path, has_accelerator=topology.device.type == "cuda")
    engine = initialize_engine(model, optim=OptimConfig(), config=config, topology=topology)
    return engine.backward, lambda: optimizer_step(engine, config, topology, is_boundary=True)


def _deepspeed(model: Any, row: str, options: UpdateOptions) -> _Row:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # unused, and its compilation takes a minute
    optimizer, config = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), options.engine(row)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine.backward, engine.step
