"""Scaling of the training over ranks of one machine, one thread each, and the overhead of DeepSpeed on one rank.

1 rank                  a batch on one rank, through the real training path
2 ranks, dp weak        the same batch on each of two data-parallel ranks: twice the work
2 ranks, dp strong      half the batch on each of two data-parallel ranks
2 ranks, tp weak        twice the batch on two tensor-parallel ranks
2 ranks, tp strong      the same batch on two tensor-parallel ranks
plain torch             one rank, the same model, loader and loss: backward and AdamW only

All worlds exist at once and are called in turn. Efficiency: time of one rank over that of two, times the ratio of the
work per rank. With fewer cores than ranks two ranks share a core, and the figures are meaningless.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from harness import Report, interleaved, ratio
from ranks import CORES, World
from training_run import Shape, Training

from pmlm_dist.config import ModelConfig, RunConfig

ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_optimization": {"stage": 0}},
    "ZeRO 1": {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000, "allgather_bucket_size": 10_000_000}
    },
}


@dataclass(frozen=True)
class ScalingOptions:
    """Model, batch and engine."""

    hidden_size: int = 512
    """Hidden size; heads have size 64, the feed-forward network is four times as wide."""
    num_layers: int = 4
    """Number of layers."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    batch: int = 4
    """Sequences of one rank's micro-batch; even."""
    accumulation: int = 4
    """Micro-batches of a step. Ranks communicate once a step, so with 1 mostly communication is measured."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    engine: Literal["ZeRO 0", "ZeRO 1"] = "ZeRO 1"
    """ZeRO stage of the engine."""
    repeats: int = 5
    """Measured rounds."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(
            self, hidden_size=128, num_layers=2, vocabulary=500, sequence_length=32, batch=2, accumulation=2, repeats=1
        )

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.hidden_size // 64,
            ffn_size=4 * self.hidden_size,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )


def run(options: ScalingOptions) -> Report:
    """Time all worlds in interleaved rounds."""
    common = {"accumulation": options.accumulation, "engine": ENGINES[options.engine]}
    one = Shape(options.model, options.sequence_length, options.batch, **common)
    half, double = options.batch // 2, 2 * options.batch
    shapes = {
        "2 ranks, dp weak": dataclasses.replace(one, dp=2),
        "2 ranks, dp strong": dataclasses.replace(one, dp=2, micro_batch=half),
        "2 ranks, tp weak": dataclasses.replace(one, tp=2, micro_batch=double),
        "2 ranks, tp strong": dataclasses.replace(one, tp=2),
    }
    alone = {f"1 rank, {name}": dataclasses.replace(one, engine=engine) for name, engine in ENGINES.items()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        corpus = dataclasses.replace(one, micro_batch=double, dp=2).write_corpus(Path(folder))

        def world(prepare: Callable[..., Any], shape: Shape) -> Callable[[], object]:
            ranks = shape.dp * shape.tp
            return stack.enter_context(World(prepare, shape.run_config(corpus), ranks=ranks)).call

        steps = {name: world(_real_training, shape) for name, shape in {**alone, **shapes}.items()}
        steps["plain torch"] = world(_plain_torch, one)
        seconds = interleaved(steps, repeats=options.repeats)
    return _report(options, seconds)


def _report(options: ScalingOptions, seconds: dict[str, list[float]]) -> Report:
    alone, rows = f"1 rank, {options.engine}", {}
    work = {"2 ranks, dp weak": 2, "2 ranks, tp weak": 2}
    for name, times in seconds.items():
        ranks = 2 if name.startswith("2") else 1
        efficiency = work.get(name, 1) / ranks * ratio(seconds, alone, name)
        rows[name] = {"seconds": statistics.median(times), "efficiency": efficiency}
    figures = {
        f"{kind}2_{how}": rows[f"2 ranks, {kind} {how}"]["efficiency"]
        for kind in ("dp", "tp")
        for how in ("weak", "strong")
    }
    for name in ENGINES:
        short = name.lower().replace(" ", "")
        figures[f"deepspeed_overhead_{short}"] = ratio(seconds, f"1 rank, {name}", "plain torch") - 1
    figures["deepspeed_overhead"] = figures[f"deepspeed_overhead_{options.engine.lower().replace(' ', '')}"]
    shapes = {**dataclasses.asdict(options), "cores": len(CORES)}
    return Report("scaling", shapes, rows, figures)


def _real_training(config: RunConfig) -> Callable[[], object]:
    return Training(config).step


def _plain_torch(config: RunConfig) -> Callable[[], object]:
    """A step of plain torch without DeepSpeed; model, data and loss are ours."""
    import torch

    from pmlm_dist.data.loader import training_batches
    from pmlm_dist.engine.malloc import keep_freed_memory
    from pmlm_dist.engine.optimizer import parameter_groups
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.objectives import loss_scales
    from pmlm_dist.parallel import groups
    from pmlm_dist.training.resolve import resolve
    from pmlm_dist.training.validation import forward_losses, weights_of

    run = resolve(config, groups.init_process_groups())
    keep_freed_memory()
    model = build_model(run.config.model, padded_vocab_size=run.vocabulary.padded_size()).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-4, fused=True)
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=run.config.data)
    objective = run.config.objective

    def step() -> None:
        micro_batches = list(islice(batches, run.engine.accumulation(1)))
        weights = [weights_of(batch, objective) for batch in micro_batches]
        scale_K = loss_scales(objective, torch.stack(weights).sum(dim=(0, 2, 3)))
        for batch in micro_batches:
            (forward_losses(model, batch, objective).nll_K * scale_K).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
