"""What DeepSpeed holds of the model on one rank: weights, gradients, optimizer, buffers, by ZeRO stage and precision.

Theory (Rajbhandari et al., ZeRO, 2020, section 3; bytes a parameter over D data-parallel ranks, half precision):

    stage 0: 16        stage 1: 4 + 12 / D        stage 2: 2 + 14 / D        stage 3: 16 / D

DeepSpeed 0.19 differs from it, and the formulas here are what it does, read in its source and compared with what it
allocates (tests/planning/test_memory.py). There are four keepers of the model:

    plain     stage 0, fp32: torch's AdamW; gradients are averaged through a flat copy
    bf16      stage 1 in bf16 with fp32 accumulation: fp32 sums of *all* gradients stand between steps; a gradient goes
              into its sum as soon as it is there. After the backward pass several ranks flatten the sums and round
              them to the communication's precision to average them
    cutting   other stages 1 and 2: a master copy even in fp32; two buckets where communication overlaps
    stage 3   weights are gathered layer by layer, but a model that is smaller than `max_live_parameters` stays whole
              from its first use to the end of the backward pass

Legend: P parameters of this tensor-parallel rank, D data-parallel ranks, w bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.planning.parameters import largest_tensor, model_parameters, uncut_numbers
from pmlm_dist.planning.workload import ELEMENT, Workload

FULL = 4
"""Bytes of an fp32 number."""
_FLATTENED = 500_000_000  # numbers that DeepSpeed flattens at a time where no bucket is set
_DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}

Keeper = Literal["plain", "bf16", "cutting", "stage 3"]


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's JSON bears on memory and communication, with DeepSpeed's defaults filled in."""

    stage: int
    precision: str
    accumulated: int
    """Bytes of an accumulated gradient."""
    communicated: int
    """Bytes of a gradient while it is averaged."""
    offload: bool
    overlap: bool
    reduce_bucket: int
    """Numbers in a bucket."""
    prefetch_bucket: int
    max_live: int
    uncut: int
    """Numbers up to which ZeRO-3 leaves a parameter whole."""

    @classmethod
    def from_engine(cls, engine: EngineConfig, *, stage: int | None = None) -> Zero:
        """The settings of a checked DeepSpeed JSON, at another `stage` if one is given."""
        stage = engine.zero_stage if stage is None else stage
        zero: Mapping[str, Any] = engine.raw.get("zero_optimization", {})
        overlap = zero.get("overlap_comm")
        accumulated = (engine.raw.get("data_types") or {}).get("grad_accum_dtype") or engine.precision
        communicated = engine.raw.get("communication_data_type") or engine.precision
        return cls(
            stage=stage,
            precision=engine.precision,
            accumulated=ELEMENT[_DTYPES[accumulated]],
            communicated=ELEMENT[_DTYPES[communicated]],
            offload=engine.offload_optimizer,
            overlap=stage == 3 if overlap is None else bool(overlap),
            reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            uncut=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        )

    @property
    def keeper(self) -> Keeper:
        """Which of DeepSpeed's optimizers keeps the model."""
        if self.stage == 0:
            return "plain"
        if self.stage == 3:
            return "stage 3"
        fp32_accumulation = self.precision == "bf16" and self.accumulated == FULL
        return "bf16" if self.stage == 1 and fp32_accumulation and not self.offload else "cutting"

    @property
    def overlaps(self) -> bool:
        """Whether gradients are averaged while the backward pass goes on."""
        return self.overlap and self.keeper in ("cutting", "stage 3")


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank's device, and in its host's memory."""

    weights: float
    """Always there: what forward and backward multiply with."""
    optimizer: float
    """Always there: fp32 copy and both moments of what this rank updates."""
    gradients: float = 0.0
    """Always there."""
    buffers: float = 0.0
    """Always there."""
    gathered: float = 0.0
    """From forward to backward: weights of other ranks."""
    gathering: float = 0.0
    """For a moment of the forward pass, beyond `gathered`."""
    grown: float = 0.0
    """Gradients at the end of a backward pass, beyond `gradients`; they grow with the layers that are done."""
    carried: float = 0.0
    """What of `grown` stands from one micro-batch to the next."""
    buckets: float = 0.0
    """During the backward pass."""
    averaging: float = 0.0
    """At the end of the step's last backward pass, beyond gradients and buckets."""
    updating: float = 0.0
    """In the update, beyond what is always there; gradients included."""
    host: float = 0.0
    """In the host's memory, by offloading."""


def model_states(work: Workload, zero: Zero, *, dp: int) -> ModelStates:
    """What a rank of `dp` data-parallel ones holds of the model."""
    makers = {"plain": _plain, "bf16": _bf16, "cutting": _cutting, "stage 3": _stage_3}
    return makers[zero.keeper](work, zero, dp)


def _plain(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers = model_parameters(work).on_rank(work.tp)
    flattened = FULL * min(numbers, _FLATTENED) if dp > 1 else 0
    return ModelStates(
        weights=FULL * numbers,
        optimizer=2 * FULL * numbers,
        grown=FULL * numbers,
        carried=FULL * numbers,
        averaging=flattened,
        updating=FULL * numbers,
    )


def _bf16(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers = model_parameters(work).on_rank(work.tp)
    rounded = zero.communicated if zero.communicated != FULL else 0
    # All sums are flattened together, unless those of the matrices alone fill a bucket: that is averaged in place.
    flattened = (rounded + (FULL if numbers <= _FLATTENED else 0)) * numbers if dp > 1 else 0
    tied = work.element * work.vocabulary * work.model.hidden_size  # the head's gradient waits for the embedding's
    return ModelStates(
        weights=work.element * numbers,
        optimizer=3 * FULL * numbers / dp,
        gradients=FULL * numbers,
        buckets=tied,
        averaging=max(0, flattened - tied),
        updating=_copied_to_gather(work, work.element * numbers, dp),
    )


def _cutting(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers, w = model_parameters(work).on_rank(work.tp), work.element
    share = numbers / dp
    kept = FULL if zero.stage == 1 and zero.accumulated == FULL else w  # of a gradient until it is averaged
    bucket = kept * zero.reduce_bucket
    flattened = kept * min(zero.reduce_bucket, numbers) if dp > 1 else 0
    averaged = zero.accumulated if zero.stage == 2 else kept  # of a gradient that this rank updates with
    own = averaged * share
    whole = zero.stage == 1 and not zero.overlap  # all gradients stand until they are averaged
    states = ModelStates(
        weights=w * numbers,
        optimizer=3 * FULL * share,
        grown=kept * numbers if whole else own,
        carried=kept * numbers if zero.stage == 1 else own,
        buckets=(2 if zero.overlap else 1) * bucket,
        averaging=own + flattened if whole else flattened,
        updating=max(own + _converted(kept, averaged) * share, _copied_to_gather(work, w * numbers, dp)),
    )
    return _offloaded(states, work, share) if zero.offload else states


def _copied_to_gather(work: Workload, weights: float, dp: int) -> float:
    """Bytes of the copy into which gloo gathers updated weights: all of them, whatever the bucket; NCCL makes none."""
    return weights if dp > 1 and not work.on_accelerator else 0.0


def _converted(kept: int, averaged: int) -> int:
    """Bytes a number, beyond averaged gradients, of the flat fp32 one that the update reads."""
    if kept != averaged:  # written flat and in fp32 as they are averaged
        return 0
    return FULL if kept == FULL else kept + FULL


def _offloaded(states: ModelStates, work: Workload, share: float) -> ModelStates:
    """fp32 copy, moments and fp32 gradients move to the host; a bucket of the largest parameter stands on each side."""
    largest = work.element * largest_tensor(work)
    return ModelStates(
        weights=states.weights,
        optimizer=0.0,
        buffers=largest,
        grown=states.grown,
        carried=states.carried,
        buckets=states.buckets,
        averaging=states.averaging,
        host=(4 * FULL + work.element) * share + largest,
    )


def _stage_3(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers, w = model_parameters(work).on_rank(work.tp), work.element
    share, uncut = numbers / dp, uncut_numbers(work, threshold=zero.uncut)
    live = max(0, min(numbers, zero.max_live) - uncut)
    bucket = zero.communicated * zero.reduce_bucket
    averaged = zero.accumulated * share
    masters = 3 * FULL * share
    return ModelStates(
        weights=w * (share + uncut),
        optimizer=0.0 if zero.offload else masters,
        gradients=0.0 if zero.offload else averaged,
        buffers=bucket,
        gathered=w * live,
        gathering=(1 if work.on_accelerator else 2) * w * min(live, zero.prefetch_bucket),  # gloo makes a copy
        buckets=w * min(zero.reduce_bucket, numbers) if dp > 1 else 0.0,
        updating=0.0 if zero.offload else _converted(w, w) * share,
        host=masters + averaged + FULL * share if zero.offload else 0.0,
    )
