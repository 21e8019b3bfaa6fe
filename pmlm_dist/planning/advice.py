"""What a plan warns of: what does not fit, what has no effect, what waits, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from pmlm_dist.engine.deepspeed_config import batch_problems
from pmlm_dist.planning.estimate import Estimate
from pmlm_dist.planning.parameters import model_parameters
from pmlm_dist.planning.reliability import Checkpoints

_MUCH = 0.2
"""Share of a step that communication or waiting may take before it is warned of."""
_NOTICEABLE = 0.01
"""Share of the time that a bad interval between checkpoints may lose before it is warned of."""


def advice(
    estimate: Estimate, saving: Checkpoints, alternatives: Sequence[Estimate], *, checkpoint_every: int
) -> list[str]:
    """A sentence for each: what is wrong or wasteful about `estimate`, and what to set instead."""
    return [
        *_batch(estimate, alternatives),
        *_memory(estimate, alternatives),
        *_engine(estimate),
        *_time(estimate),
        *_intervals(estimate, saving, checkpoint_every=checkpoint_every),
    ]


def _batch(estimate: Estimate, alternatives: Sequence[Estimate]) -> list[str]:
    found = batch_problems(estimate.job.engine, dp=estimate.dp)
    if not found:
        return []
    fits = f"; what divides and fits: {alternatives[0].layout.options}" if alternatives else ""
    return [*found, f"the run would not start; this plan counts {estimate.global_batch} sequences a step{fits}"]


def _memory(estimate: Estimate, alternatives: Sequence[Estimate]) -> list[str]:
    if estimate.fits:
        return []
    device = estimate.job.cluster.device
    too_much = (
        f"does not fit: {estimate.memory.device / 1e9:.1f} GB of {device.memory / 1e9:.1f} GB per GPU are needed "
        f"(highest: {estimate.memory.moment})"
    )
    if not alternatives:
        return [f"{too_much}; nothing fits on this cluster: more or larger GPUs, or offloading, are needed"]
    same = next((other for other in alternatives if other.layout.zero == estimate.layout.zero), None)
    ways = [other.layout.options for other in (same, alternatives[0]) if other]
    return [f"{too_much}; use {' or '.join(dict.fromkeys(ways))}"]


def _engine(estimate: Estimate) -> list[str]:
    zero, engine = estimate.zero, estimate.job.engine
    section = engine.raw.get("zero_optimization", {})
    numbers = model_parameters(estimate.work).on_rank(estimate.work.tp)
    found = []
    if section.get("overlap_comm") and zero.keeper in ("plain", "bf16"):
        found.append(
            "zero_optimization.overlap_comm has no effect: with stage 1, bf16 and fp32 accumulation DeepSpeed averages "
            "gradients after the backward pass"
        )
    if zero.keeper in ("cutting", "stage 3") and zero.reduce_bucket > numbers:
        wasted = (2 if zero.overlaps and zero.stage < 3 else 1) * (zero.reduce_bucket - numbers) * zero.communicated
        found.append(
            f"zero_optimization.reduce_bucket_size ({zero.reduce_bucket:,}) exceeds the parameters of a rank "
            f"({numbers:,}) and wastes {wasted / 1e9:.1f} GB: lower it"
        )
    if section.get("offload_param"):
        found.append("zero_optimization.offload_param is not counted: weights are planned on the device")
    return found


def _time(estimate: Estimate) -> list[str]:
    time, found = estimate.time, []
    if time.exposed > _MUCH * time.total:
        found.append(
            f"communication takes {time.exposed / time.total:.0%} of a step: use a larger global batch, a smaller tp, "
            "or fewer GPUs"
        )
    if time.issuing > _MUCH * time.total and estimate.job.cluster.device.is_accelerator:
        found.append(
            f"GPUs wait {time.issuing / time.total:.0%} of a step for the host to issue operations: use a larger "
            "micro-batch"
        )
    return found


def _intervals(estimate: Estimate, saving: Checkpoints, *, checkpoint_every: int) -> list[str]:
    now = checkpoint_every * estimate.time.total
    lost, least = saving.lost(now), saving.lost(saving.interval)
    if lost - least < _NOTICEABLE:
        return []
    best = max(1, round(saving.interval / estimate.time.total))
    return [
        f"checkpoints every {checkpoint_every} steps ({now / 60:.0f} minutes) lose {lost:.1%} of the time to failures "
        f"and saving, every {best} steps {least:.1%}: --train.checkpoint-every {best}"
    ]
