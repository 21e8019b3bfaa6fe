"""Warnings of a plan: what does not fit, what has no effect, what costs time, and which setting fixes it."""

from collections.abc import Sequence

from pmlm_dist.engine.deepspeed_config import batch_problems
from pmlm_dist.planning.estimate import Estimate
from pmlm_dist.planning.parameters import rank_parameters
from pmlm_dist.planning.reliability import Checkpoints

_MAX_OVERHEAD = 0.2
"""Fraction of a step from which communication or launch overhead causes a warning."""
_MAX_LOST = 0.01
"""Fraction of the time lost by the checkpoint interval from which a warning is given."""
_SHORT_S = 3600.0
"""A run shorter than this needs no advice on its checkpoints: it loses minutes at most."""


def advice(
    estimate: Estimate, saving: Checkpoints, alternatives: Sequence[Estimate], *, checkpoint_every: int, steps: int
) -> list[str]:
    """One sentence for each problem of `estimate`, with the setting that fixes it."""
    return [
        *_batch(estimate, alternatives),
        *_memory(estimate, alternatives),
        *_engine(estimate),
        *_time(estimate),
        *_intervals(estimate, saving, checkpoint_every=checkpoint_every, steps=steps),
    ]


def _batch(estimate: Estimate, alternatives: Sequence[Estimate]) -> list[str]:
    problems = batch_problems(estimate.job.engine, dp=estimate.dp)
    if not problems:
        return []
    fix = f"; valid and fitting: {alternatives[0].layout.options}" if alternatives else ""
    return [*problems, f"the run would not start; this plan assumes {estimate.global_batch} sequences a step{fix}"]


def _memory(estimate: Estimate, alternatives: Sequence[Estimate]) -> list[str]:
    if estimate.fits:
        return []
    device = estimate.job.cluster.device
    excess = (
        f"does not fit: {estimate.memory.device / 1e9:.1f} GB of {device.memory / 1e9:.1f} GB per GPU are needed "
        f"(peak: {estimate.memory.moment})"
    )
    if not alternatives:
        return [f"{excess}; no layout fits on this cluster: use more or larger GPUs, or offloading"]
    same_stage = next((other for other in alternatives if other.layout.zero == estimate.layout.zero), None)
    options = [other.layout.options for other in (same_stage, alternatives[0]) if other]
    return [f"{excess}; use {' or '.join(dict.fromkeys(options))}"]


def _engine(estimate: Estimate) -> list[str]:
    zero, engine = estimate.zero, estimate.job.engine
    section = engine.raw.get("zero_optimization", {})
    numbers = rank_parameters(estimate.work)
    warnings = []
    if zero.optimizer_class == "bf16" and not zero.overlaps:
        warnings.append(
            "gradients are averaged after the backward pass: set zero_optimization.overlap_comm to do it meanwhile"
        )
    if zero.optimizer_class == "bf16" and zero.overlaps and zero.reduce_bucket > numbers:
        warnings.append(
            f"zero_optimization.reduce_bucket_size ({zero.reduce_bucket:,}) exceeds the parameters of a rank "
            f"({numbers:,}): one bucket is averaged after the backward pass; use 14000000"
        )
    if zero.optimizer_class in ("stage 1 and 2", "stage 3") and zero.reduce_bucket > numbers:
        wasted = (2 if zero.overlaps and zero.stage < 3 else 1) * (zero.reduce_bucket - numbers) * zero.communicated
        warnings.append(
            f"zero_optimization.reduce_bucket_size ({zero.reduce_bucket:,}) exceeds the parameters of a rank "
            f"({numbers:,}) and wastes {wasted / 1e9:.1f} GB: lower it"
        )
    if section.get("offload_param"):
        warnings.append("zero_optimization.offload_param is not modeled: weights are planned on the device")
    return warnings


def _time(estimate: Estimate) -> list[str]:
    time, warnings = estimate.time, []
    if time.exposed > _MAX_OVERHEAD * time.total:
        warnings.append(
            f"communication takes {time.exposed / time.total:.0%} of a step: use a larger global batch, a smaller tp, "
            "or fewer GPUs"
        )
    if time.issuing > _MAX_OVERHEAD * time.total and estimate.job.cluster.device.is_accelerator:
        warnings.append(
            f"GPUs wait {time.issuing / time.total:.0%} of a step for the host to launch operations: use a larger "
            "micro-batch"
        )
    return warnings


def _intervals(estimate: Estimate, saving: Checkpoints, *, checkpoint_every: int, steps: int) -> list[str]:
    step_s = estimate.time.total
    best = min(steps, max(1, round(saving.interval / step_s)))
    lost, least = saving.lost(checkpoint_every * step_s), saving.lost(best * step_s)
    if lost - least < _MAX_LOST or steps * step_s < _SHORT_S:
        return []
    return [
        f"checkpoints every {checkpoint_every} steps ({checkpoint_every * step_s / 60:.1f} minutes) lose {lost:.1%} of "
        f"the time to failures and saving, every {best} steps only {least:.1%}: use --train.checkpoint-every {best}"
    ]
