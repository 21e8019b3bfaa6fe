"""Small pre-training runs for tests: their configurations, losses and weights."""

import json
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.config import DataConfig, MaskingConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, ffn_size=64, max_positions=64, hidden_dropout=0.0, attention_dropout=0.0
)


def write_engine_config(
    path: Path,
    *,
    zero: int = 1,
    precision: str = "fp32",
    global_batch: int = 8,
    micro_batch: int = 4,
    offload: bool = False,
    **extra: Any,
) -> Path:
    """Write a DeepSpeed JSON with small buckets; return its path."""
    raw: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": zero, "reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000},
        **extra,
    }
    if zero == 3:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if offload:
        raw["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if precision != "fp32":
        raw[precision] = {"enabled": True}
        raw["data_types"] = {"grad_accum_dtype": "fp32"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw))
    return path


def run_config(corpus: Path, run_dir: Path, *, tp: int = 1, steps: int = 5, **engine: Any) -> RunConfig:
    """Return a run of a 2-layer model on `corpus`: every step logged, seed 7."""
    return RunConfig(
        corpus=corpus,
        run_dir=run_dir,
        ds_config=write_engine_config(run_dir / "ds.json", **engine),
        model=MODEL,
        masking=MaskingConfig(),
        data=DataConfig(workers=0),
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=2),
        parallel=ParallelConfig(tp=tp),
        train=TrainConfig(
            steps=steps,
            seed=7,
            log_every=1,
            validate_every=1000,
            validation_samples=12,
            checkpoint_every=1000,
            collective_timeout_s=60,
        ),
    )


def with_model(config: RunConfig, **changes: Any) -> RunConfig:
    """Return `config` with other model settings."""
    return replace(config, model=replace(config.model, **changes))


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    """Return `config` with other settings of the training loop."""
    return replace(config, train=replace(config.train, **changes))


@dataclass(frozen=True)
class Trained:
    """Losses and gradient norms by step, and the final weights of this rank's tensor-parallel part."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def train(config: RunConfig) -> Trained:
    """Train without writing anything; every rank calls this."""
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine = build_engine(run)
    _, losses, norms = take_steps(run, engine, RunState(), steps=config.train.steps)
    return Trained(losses, norms, whole_weights(engine.module))


def start_run(config: RunConfig) -> Any:
    """Return the `Run` of `config` on this rank."""
    from pmlm_dist.config import raise_if_any
    from pmlm_dist.parallel import groups
    from pmlm_dist.relations import problems
    from pmlm_dist.training.resolve import resolve

    raise_if_any(problems(config))
    return resolve(
        config, groups.init_process_groups(tp=config.parallel.tp, timeout_s=config.train.collective_timeout_s)
    )


def take_steps(run: Any, engine: Any, state: Any, *, steps: int) -> tuple[Any, list[float], list[float]]:
    """Train `steps` steps from `state`; return the new state, and losses and gradient norms by step."""
    from pmlm_dist.data.loader import training_batches
    from pmlm_dist.metrics.meter import Stopwatch
    from pmlm_dist.objectives import LossMeans
    from pmlm_dist.training.pretraining import PretrainJob
    from pmlm_dist.training.step import train_step

    batches = training_batches(
        run.source, lanes=run.lanes, share=run.share, samples_consumed=state.samples_consumed, loading=run.config.data
    )
    job, losses, norms = PretrainJob(run), [], []
    for _ in range(steps):
        micro_batches = list(islice(batches, run.engine.accumulation(run.topology.dp)))
        result = train_step(job, engine, micro_batches, state, Stopwatch(run.topology.device))
        state = job.advance(state)
        counts = run.topology.all_reduce_dp(result.counts)
        losses.append(LossMeans.from_counts(counts, run.config.objective).total)
        norms.append(float(result.gradient_norm or 0.0))
    return state, losses, norms


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of this rank's tensor-parallel weights; ZeRO-3 partitions are gathered."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
