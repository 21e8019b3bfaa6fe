"""One optimizer step.

    micro-batches -> loss -> engine.backward   (for each)  -> engine.step (at the last: weights change)

The gradient is that of sum(nll) / N, N = targets of the whole step (`TrainingJob.loss_scale`). A step whose gradient is
not finite changes no weight on any rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.engine.deepspeed_engine import module_of
from pmlm_dist.engine.optimizer import clip_or_drop_gradients, gradient_norm, learning_rate, set_learning_rate
from pmlm_dist.metrics.meter import StepResult, Stopwatch
from pmlm_dist.parallel import seeding
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.training.guards import diagnose_nonfinite
from pmlm_dist.training.job import BatchT, TrainingJob


def train_step(
    job: TrainingJob[BatchT],
    engine: DeepSpeedEngine,
    micro_batches: Sequence[BatchT],
    state: RunState,
    stopwatch: Stopwatch,
    *,
    before_last_backward: Callable[[], None] = lambda: None,
) -> StepResult:
    """Make the update `state.step + 1` from this rank's `micro_batches`; every rank calls.

    `before_last_backward` starts what is to run beside the last backward pass.
    """
    topology, settings = job.topology, job.settings
    with stopwatch.phase("forward"):
        micro_batches = [batch.to(topology.device) for batch in micro_batches]
        scale = job.loss_scale(micro_batches)
    optimizer: Any = engine.optimizer
    set_learning_rate(optimizer, learning_rate(state.step + 1, steps=settings.steps, optim=settings.optim))
    counts, norm = torch.zeros(()), math.nan
    for number, batch in enumerate(micro_batches):
        _seed_dropout(job, state, number)
        stopwatch.heartbeat.enter_part(number + 1, of=len(micro_batches))
        with stopwatch.phase("forward"):
            loss, batch_counts = job.loss(engine, batch, scale)
            counts = counts + batch_counts.double()  # fp32 would round the sums of the log
        is_boundary = number == len(micro_batches) - 1
        if is_boundary:
            before_last_backward()
        with stopwatch.phase("backward"):
            engine.backward(loss)
        with stopwatch.phase("step"):
            norm = optimizer_step(engine, job.engine_config, topology, is_boundary=is_boundary)
    if math.isfinite(norm):  # for all ranks or for none: the norm is reduced over all, at every ZeRO stage
        return StepResult(counts, norm)
    causes = _diagnose(job, engine, micro_batches, scale, state=state, stopwatch=stopwatch)
    return StepResult(torch.zeros_like(counts), None, skipped=True, causes=tuple(causes))


def optimizer_step(engine: DeepSpeedEngine, config: EngineConfig, topology: Topology, *, is_boundary: bool) -> float:
    """Step the engine. At a boundary of accumulation weights change, unless the gradient's norm is not finite.

    Returns the norm; NaN between boundaries, and where DeepSpeed found an overflow.
    """
    if config.zero_stage == 0 and is_boundary:  # DeepSpeed computes no norm at stage 0 and skips no overflow
        _fill_gradients(module_of(engine))
        norm = gradient_norm(module_of(engine), topology)
        clip_or_drop_gradients(module_of(engine), norm=norm, max_norm=config.gradient_clipping)
        engine.step()
        return norm
    engine.step()
    norm = engine.get_global_grad_norm() if is_boundary else None
    overflown = is_boundary and getattr(engine.optimizer, "overflow", False)
    return math.nan if norm is None or overflown else float(norm)


def _fill_gradients(model: nn.Module) -> None:
    """Give parameters without a gradient (an unused head) zeros, as ZeRO does from stage 1 on."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _seed_dropout(job: TrainingJob[Any], state: RunState, number: int) -> None:
    """Seed dropout for micro-batch `number` of the step after `state`: no random state needs saving."""
    micro_step = state.step * job.engine_config.accumulation(job.topology.dp) + number
    seeding.seed_dropout(job.settings.seed, micro_step=micro_step, dp_rank=job.topology.dp_rank)


def _diagnose(
    job: TrainingJob[BatchT],
    engine: DeepSpeedEngine,
    micro_batches: Sequence[BatchT],
    scale: torch.Tensor | float,
    *,
    state: RunState,
    stopwatch: Stopwatch,
) -> list[str]:
    """Return the causes of the skipped step after `state`. None with fp16: that is how its loss scale is found."""
    if job.engine_config.precision == "fp16":
        return []
    module = module_of(engine)

    def loss_of(number: int) -> torch.Tensor:
        stopwatch.heartbeat.beat()
        _seed_dropout(job, state, number)
        return job.loss(module, micro_batches[number], scale)[0]

    # Gradients can be taken outside the engine only where parameters are whole and no layer is recomputed.
    with_gradients = job.engine_config.zero_stage < 3 and not job.model_config.activation_checkpointing
    sample_ids = [job.sample_ids(batch) for batch in micro_batches]
    return diagnose_nonfinite(module, sample_ids, loss_of, job.topology, with_gradients=with_gradients)
