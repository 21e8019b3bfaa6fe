"""Bytes of weights, gradients, optimizer states and buffers on one rank, by ZeRO stage and precision.

Theory (Rajbhandari et al., ZeRO, 2020, section 3; bytes a parameter over D data-parallel ranks, half precision):

    stage 0: 16        stage 1: 4 + 12 / D        stage 2: 2 + 14 / D        stage 3: 16 / D

DeepSpeed 0.19 differs from the theory. The formulas here follow its source and are compared with its allocations in
tests/planning/test_memory.py. It has four optimizer classes:

    plain           stage 0, fp32: torch's AdamW; gradients are averaged through a flat copy
    bf16            stage 1 in bf16 with fp32 accumulation: keeps fp32 sums of *all* gradients between steps. A gradient
                    is added to its sum as soon as it is computed. With D > 1 the sums are rounded to the precision of
                    the communication to average them (engine/bf16_optimizer.py)
    stage 1 and 2   all other cases of these stages: a master copy even in fp32; two buckets with `overlap_comm`
    stage 3         weights are gathered layer by layer, but a model below `stage3_max_live_parameters` stays gathered
                    from its first use to the end of the backward pass

Legend: P parameters of this tensor-parallel rank, D data-parallel ranks, w bytes of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.planning.parameters import largest_tensor, persistent_numbers, rank_parameters
from pmlm_dist.planning.workload import ELEMENT, Workload

FULL = 4
"""Bytes of an fp32 number."""
_FLATTENED = 500_000_000  # elements that DeepSpeed flattens at a time where no bucket size is set
_DTYPES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}

OptimizerClass = Literal["plain", "bf16", "stage 1 and 2", "stage 3"]


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed's JSON that affect memory and communication, with DeepSpeed's defaults."""

    stage: int
    precision: str
    accumulated: int
    """Bytes of an element of the accumulated gradients."""
    communicated: int
    """Bytes of an element of the gradients while they are averaged."""
    offload: bool
    overlap: bool
    reduce_bucket: int
    """Elements of a bucket."""
    prefetch_bucket: int
    """Elements that ZeRO-3 gathers ahead."""
    max_live: int
    """Elements that ZeRO-3 keeps gathered at most."""
    persistence_threshold: int
    """Elements up to which ZeRO-3 does not partition a parameter."""

    @classmethod
    def from_engine(cls, engine: EngineConfig, *, stage: int | None = None) -> Self:
        """The settings of a validated DeepSpeed JSON; `stage` replaces its stage."""
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
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        )

    @property
    def optimizer_class(self) -> OptimizerClass:
        """DeepSpeed's optimizer class for these settings."""
        if self.stage == 0:
            return "plain"
        if self.stage == 3:
            return "stage 3"
        fp32_accumulation = self.precision == "bf16" and self.accumulated == FULL
        return "bf16" if self.stage == 1 and fp32_accumulation and not self.offload else "stage 1 and 2"

    @property
    def overlaps(self) -> bool:
        """True if gradients are averaged during the backward pass; the plain class ignores `overlap_comm`."""
        return self.overlap and self.optimizer_class != "plain"


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank's device, and in its host's memory. The first four are permanent, the others temporary."""

    weights: float
    """Weights that forward and backward pass multiply with."""
    optimizer: float
    """fp32 copy and both moments of the parameters that this rank updates."""
    gradients: float = 0.0
    """Gradients that exist between steps."""
    buffers: float = 0.0
    """Buffers that exist between steps."""
    gathered: float = 0.0
    """Weights of other ranks, from the forward to the end of the backward pass."""
    gathering: float = 0.0
    """In the forward pass, beyond `gathered`."""
    backward_gradients: float = 0.0
    """Gradients at the end of a backward pass, beyond `gradients`; they grow layer by layer."""
    retained_gradients: float = 0.0
    """Part of `backward_gradients` that exists from one micro-batch to the next."""
    buckets: float = 0.0
    """During the backward pass."""
    averaging: float = 0.0
    """At the end of the last backward pass of a step, beyond gradients and buckets."""
    updating: float = 0.0
    """In the optimizer step, beyond the permanent bytes; gradients included."""
    host: float = 0.0
    """In the host's memory, by offloading."""


def model_states(work: Workload, zero: Zero, *, dp: int) -> ModelStates:
    """Bytes of the model states on one of `dp` data-parallel ranks."""
    formulas = {"plain": _plain, "bf16": _bf16, "stage 1 and 2": _stage_1_and_2, "stage 3": _stage_3}
    return formulas[zero.optimizer_class](work, zero, dp)


def _plain(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers = rank_parameters(work)
    flattened = FULL * min(numbers, _FLATTENED) if dp > 1 else 0
    return ModelStates(
        weights=FULL * numbers,
        optimizer=2 * FULL * numbers,
        backward_gradients=FULL * numbers,
        retained_gradients=FULL * numbers,
        averaging=flattened,
        updating=FULL * numbers,
    )


def _bf16(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers = rank_parameters(work)
    # fp32 sums are averaged in place, others as a rounded copy.
    rounded = zero.communicated * numbers if dp > 1 and zero.communicated != FULL else 0
    # The gradient of the tied matrix from the head is kept until the embedding's is computed.
    tied = work.element * work.vocabulary * work.model.hidden_size
    return ModelStates(
        weights=work.element * numbers,
        optimizer=3 * FULL * numbers / dp,
        gradients=FULL * numbers,
        buckets=tied,
        averaging=max(0, rounded - tied),
        updating=_copied_to_gather(work, work.element * numbers, dp),
    )


def _stage_1_and_2(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers, w = rank_parameters(work), work.element
    share = numbers / dp
    unaveraged = FULL if zero.stage == 1 and zero.accumulated == FULL else w  # bytes of an element before averaging
    bucket = unaveraged * zero.reduce_bucket
    flattened = unaveraged * min(zero.reduce_bucket, numbers) if dp > 1 else 0
    averaged = zero.accumulated if zero.stage == 2 else unaveraged  # and after
    own = averaged * share
    keeps_all = zero.stage == 1 and not zero.overlap  # all gradients exist until they are averaged
    states = ModelStates(
        weights=w * numbers,
        optimizer=3 * FULL * share,
        backward_gradients=unaveraged * numbers if keeps_all else own,
        retained_gradients=unaveraged * numbers if zero.stage == 1 else own,
        buckets=(2 if zero.overlap else 1) * bucket,
        averaging=own + flattened if keeps_all else flattened,
        updating=max(own + _converted(unaveraged, averaged) * share, _copied_to_gather(work, w * numbers, dp)),
    )
    return _offloaded(states, work, share) if zero.offload else states


def _copied_to_gather(work: Workload, weights: float, dp: int) -> float:
    """Bytes of gloo's copy of all updated weights while it gathers them, for any bucket size; NCCL makes none."""
    return weights if dp > 1 and not work.on_accelerator else 0.0


def _converted(unaveraged: int, averaged: int) -> int:
    """Bytes an element of the flat fp32 gradient that the optimizer step reads, beyond the averaged gradients."""
    if unaveraged != averaged:  # averaging has written them flat and in fp32 already
        return 0
    return FULL if unaveraged == FULL else unaveraged + FULL


def _offloaded(states: ModelStates, work: Workload, share: float) -> ModelStates:
    """Move fp32 copy, moments and fp32 gradients to the host's memory; each side has a buffer of the largest tensor."""
    largest = work.element * largest_tensor(work)
    host = (4 * FULL + work.element) * share + largest
    return replace(states, optimizer=0.0, updating=0.0, buffers=largest, host=host)


def _stage_3(work: Workload, zero: Zero, dp: int) -> ModelStates:
    numbers, w = rank_parameters(work), work.element
    share, persistent = numbers / dp, persistent_numbers(work, threshold=zero.persistence_threshold)
    live = max(0, min(numbers, zero.max_live) - persistent)
    bucket = zero.communicated * zero.reduce_bucket
    averaged = zero.accumulated * share
    masters = 3 * FULL * share
    return ModelStates(
        weights=w * (share + persistent),
        optimizer=0.0 if zero.offload else masters,
        gradients=0.0 if zero.offload else averaged,
        buffers=bucket,
        gathered=w * live,
        gathering=(1 if work.on_accelerator else 2) * w * min(live, zero.prefetch_bucket),  # gloo copies
        buckets=w * min(zero.reduce_bucket, numbers) if dp > 1 else 0.0,
        updating=0.0 if zero.offload else _converted(w, w) * share,
        host=masters + averaged + FULL * share if zero.offload else 0.0,
    )
