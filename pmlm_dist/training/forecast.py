"""Estimated time of a step and of the run, before anything is built.

settings + device (data sheet, or rates measured for a second)  --planning/step_time.py-->  seconds of a step
"""

import dataclasses
import os

import torch

from pmlm_dist.config import ConfigError, RunConfig, raise_if_any
from pmlm_dist.devices import Device, device_named
from pmlm_dist.engine.deepspeed_config import EngineConfig, load_engine_config
from pmlm_dist.launch_environment import local_world_size
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.metrics.run_log import format_duration
from pmlm_dist.objectives import OBJECTIVES
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.planning.communication import Cluster
from pmlm_dist.planning.estimate import Job, Layout
from pmlm_dist.planning.measure import measure_device
from pmlm_dist.presets import PRESETS
from pmlm_dist.training.resolve import ResolvedRun

_NEGLIGIBLE_FLOPS = 1e11
"""Of a rank in the whole run: seconds on any device, which a measurement would only prolong."""
_MAX_STEP_S = 300.0
_MEASURED_TOKENS, _MEASURED_S = 64, 0.2


def forecast(run: ResolvedRun, *, first_step: int) -> str:
    """Return a line with the estimated time of a step and of the steps after `first_step`; every rank calls.

    Empty for a run of seconds. Raises `ConfigError` on all ranks for steps of more than five minutes, unless
    `train.allow_slow_steps` is set.
    """
    steps, topology = run.last_step - first_step, run.topology
    if steps * run.engine.global_batch * run.sample_flops / topology.world_size < _NEGLIGIBLE_FLOPS:
        return ""
    step_s = _step_s(run, run.config, run.engine)
    if step_s > _MAX_STEP_S and not run.config.train.allow_slow_steps:
        raise_if_any([_too_slow(run, step_s)])
    return (
        f"estimate: {_seconds(step_s)} a step, {_seconds(steps * step_s)} for {steps:,} steps on "
        f"{topology.world_size} {topology.device.type} rank{'' if topology.world_size == 1 else 's'}"
    )


def _too_slow(run: ResolvedRun, step_s: float) -> str:
    """Return the message, with the largest preset whose steps are fast enough here; every rank calls."""
    fitting = None
    for name in ("large", "base", "tiny"):
        preset = PRESETS[name]()
        try:
            engine = load_engine_config(preset.ds_config, has_accelerator=run.topology.device.type != "cpu")
            preset_s = _step_s(run, preset, engine)
        except ConfigError:
            continue
        if fitting is None and preset_s <= _MAX_STEP_S:
            fitting = f"--preset {name} ({_seconds(preset_s)} a step here), "
    return (
        f"a step of {run.engine.global_batch:,} sequences is estimated to take {_seconds(step_s)} on "
        f"{run.topology.world_size} {run.topology.device.type} rank(s), the run "
        f"{_seconds(run.last_step * step_s)}: use {fitting or ''}a smaller --batch.global, more ranks, or "
        "--train.allow-slow-steps"
    )


def _step_s(run: ResolvedRun, config: RunConfig, engine: EngineConfig) -> float:
    world_size = run.topology.world_size
    in_node = min(world_size, local_world_size(os.environ, default=world_size))
    device = _device(run.topology, config, precision=engine.precision)
    job = Job(
        model=dataclasses.replace(config.model, vocab_size=run.vocabulary.size),
        context=run.manifest.sequence_length,
        predictions=max_predictions(run.manifest.sequence_length, config.masking),
        objectives=OBJECTIVES[config.objective.kind],
        engine=engine,
        cluster=Cluster(device, world_size // in_node, in_node),
    )
    checkpointing = config.model.activation_checkpointing
    layout = Layout(config.parallel.tp, engine.zero_stage, engine.micro_batch, checkpointing)
    # Ranks measure different rates, and must decide alike.
    return run.topology.broadcast_object(job.estimate(layout).time.total)


def _device(topology: Topology, config: RunConfig, *, precision: str) -> Device:
    """Return the device by its data sheet, or as measured; every rank calls."""
    known = device_named(torch.cuda.get_device_name(topology.device)) if topology.device.type == "cuda" else None
    if known is not None and precision in known.peak:
        return known
    return measure_device(precision, topology, model=config.model, tokens=_MEASURED_TOKENS, seconds=_MEASURED_S)


def _seconds(seconds: float) -> str:
    if seconds > 2 * 86_400:
        return f"{seconds / 86_400:,.0f} days"
    return f"{seconds:.2g} s" if seconds < 60 else format_duration(seconds)
