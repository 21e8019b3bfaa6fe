"""What a DeepSpeed engine holds, piece by piece: the only module that knows how ZeRO cuts it.

    parameter [tensor-parallel slice]     fp32 weight, exp_avg, exp_avg_sq of ...
        stage 0                           the whole slice, on every data-parallel rank
        stage 1, 2                        a run of it: parameters one after another, cut into equal partitions
        stage 3                           a run of it: each parameter cut into equal partitions, the last one padded

Every piece is a run of the flat fp32 tensor that the optimizer updates, beside its moments in the optimizer's state.
bf16 and fp16 weights are these masters rounded, so they are never stored but rounded again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from pmlm_dist.checkpoint.files import KINDS, CheckpointReader
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded, sharded_dimension

_VOCABULARY_TENSORS = ("embeddings.token.weight", "head.bias")
"""Their first dimension is the vocabulary, padded."""
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Run:
    """`numel` numbers of a parameter [its slice, flat] from `start` on; they lie in a flat tensor from `at` on."""

    parameter: Tensor
    start: int
    numel: int
    at: int


@dataclass(frozen=True)
class OwnedFragment:
    """A run of a tensor, and where its numbers of each kind (weight and moments) lie on this rank: fp32 [numel]."""

    fragment: Fragment
    numbers: dict[str, Tensor]


class EngineState:
    """The engine's weights, moments and counters, to be read and filled. Every rank makes one, after `build_engine`.

    Moments that do not exist before the first update are made here, as the optimizer would make them: zeros.
    """

    def __init__(self, engine: DeepSpeedEngine, topology: Topology):
        self.engine, self.topology = engine, topology
        assert isinstance(engine.module, PseudoMaskedLM)
        self.model = engine.module
        self._zero: Any = engine.optimizer
        assert isinstance(engine.basic_optimizer, torch.optim.Optimizer)
        self._adam = engine.basic_optimizer
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._layout = list(_layout(engine, topology))
        for flat, _ in self._layout:
            _make_moments(self._adam, flat)

    @property
    def precision(self) -> str:
        """What the model computes with: `fp32`, `bf16` or `fp16`."""
        if self.engine.bfloat16_enabled():
            return "bf16"
        return "fp16" if self.engine.fp16_enabled() else "fp32"

    # -------------------------------------------------------------------------------------------------------- reading

    def owned_fragments(self) -> list[OwnedFragment]:
        """What this rank's optimizer updates."""
        return [self._piece(flat, run, self._placement(run)) for flat, run in self._runs()]

    def fragments_to_write(self) -> list[OwnedFragment]:
        """This rank's part of a checkpoint: what several ranks hold alike is divided evenly among them."""
        return [
            self._piece(flat, run, share)
            for flat, run in self._runs()
            if (share := self._placement(run).share(*self._turn(run.parameter))) is not None
        ]

    def counters(self) -> dict[str, Any]:
        """The engine's counters, Adam's step and the loss scale: JSON values, equal on every rank."""
        steps = {int(self._adam.state[flat]["step"]) for flat, _ in self._layout}
        assert len(steps) == 1, f"parameters have been updated {sorted(steps)} times"
        engine, scaler = self.engine, getattr(self._zero, "loss_scaler", None)
        return {
            "adam_step": steps.pop(),
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "skipped_steps": engine.skipped_steps,
            "loss_scale": {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)},
        }

    def before_optimizer_step(self, callback: Callable[[], None]) -> None:
        """Call `callback` before weights and moments change, in every step from now on."""
        self._adam.register_step_pre_hook(lambda *_: callback())

    # -------------------------------------------------------------------------------------------------------- filling

    def restore(self, reader: CheckpointReader, counters: dict[str, Any]) -> None:
        """Fill weights, moments and counters; every rank must call. Settings of the optimizer stay as they are.

        Raises `ConfigError` when the checkpoint is of another model.
        """
        if not reader.has_moments:
            raise ConfigError(["the checkpoint holds weights alone, no run can go on from it: start one with --init"])
        self._fill_from(reader, KINDS)
        self._restore_counters(counters)

    def load_weights(self, reader: CheckpointReader, *, fresh: str | None = None) -> None:
        """Fill the weights alone, as for a run that is about to start; every rank must call.

        Tensors whose names begin with `fresh` stay as they were drawn, whether the checkpoint has such or not. Raises
        `ConfigError` when the checkpoint is of another model.
        """
        self._fill_from(reader, KINDS[:1], fresh=fresh)

    def _fill_from(self, reader: CheckpointReader, kinds: tuple[str, ...], *, fresh: str | None = None) -> None:
        raise_if_any(self._misfits(reader, but=fresh))
        _before_filling(self._zero)
        for piece in self.owned_fragments():
            for kind in () if fresh and piece.fragment.name.startswith(fresh) else kinds:
                _fill(piece.numbers[kind], piece.fragment, kind, reader)
        _round_weights(self._zero)

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        for flat, _ in self._layout:
            self._adam.state[flat]["step"] = _adam_step(self._adam, flat, counters["adam_step"])
        engine, scaler = self.engine, getattr(self._zero, "loss_scaler", None)
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, counters[name])
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        saved = counters["loss_scale"]
        if saved.keys() == {
            name for name in _LOSS_SCALE if hasattr(scaler, name)
        }:  # else fixed scale <-> dynamic scale
            for name, value in saved.items():
                setattr(scaler, name, value)

    def _misfits(self, reader: CheckpointReader, *, but: str | None = None) -> list[str]:
        saved, mine = reader.tensors, {name: self._whole(p) for name, p in self.model.named_parameters()}
        if but:
            saved, mine = ({n: w for n, w in whole.items() if not n.startswith(but)} for whole in (saved, mine))
        found = [f"the checkpoint has no {name}" for name in mine if name not in saved]
        found += [f"the checkpoint has {name}, the model has not" for name in saved if name not in mine]
        for name in mine.keys() & saved.keys():
            (was, rows), (now, rows_now) = ((w.shape, w.used_rows) for w in (saved[name], mine[name]))
            if was[1:] != now[1:] or rows != rows_now:
                found.append(f"{name} has shape {list(was)} in the checkpoint and {list(now)} in the model")
        return sorted(found)

    # --------------------------------------------------------------------------------------------------------- places

    def _turn(self, parameter: Tensor) -> tuple[int, int]:
        """Which of the ranks that hold the same numbers of a parameter this one is, and how many they are."""
        topology = self.topology
        replicas, turn = (topology.dp, topology.dp_rank) if self.engine.zero_optimization_stage() == 0 else (1, 0)
        if is_sharded(parameter):
            return turn, replicas
        return turn * topology.tp + topology.tp_rank, replicas * topology.tp

    def _whole(self, parameter: Tensor) -> Fragment:
        """All of the tensor that `parameter` is this rank's slice of."""
        name, shape = self._names[id(parameter)], list(_shape(parameter))
        dim = sharded_dimension(parameter)
        if is_sharded(parameter):
            shape[dim] *= self.topology.tp
        rows = self.model.config.vocab_size if name in _VOCABULARY_TENSORS else None
        return Fragment.whole(name, shape, used_rows=rows, dim=dim)

    def _placement(self, run: _Run) -> Fragment:
        whole = self._whole(run.parameter)
        size = _shape(run.parameter)[whole.dim]
        first = self.topology.tp_rank * size if is_sharded(run.parameter) else 0
        return Fragment(
            whole.name,
            whole.shape,
            used_rows=whole.used_rows,
            dim=whole.dim,
            first_row=first,
            last_row=first + size,
            start=run.start,
            stop=run.start + run.numel,
        )

    def _runs(self) -> Iterator[tuple[Tensor, _Run]]:
        return ((flat, run) for flat, runs in self._layout for run in runs)

    def _piece(self, flat: Tensor, run: _Run, fragment: Fragment) -> OwnedFragment:
        """The numbers at `placement`, which is a part of `run`'s."""
        at = run.at + fragment.start - run.start
        state = self._adam.state[flat]
        flats = {"weight": flat.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        return OwnedFragment(fragment, {kind: flat.view(-1)[at : at + fragment.numel] for kind, flat in flats.items()})


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(
        getattr(parameter, "ds_shape", parameter.shape)
    )  # ZeRO-3 empties parameters and keeps their shape here


# ------------------------------------------------------------------------------------------------------- ZeRO's layouts


def _layout(engine: DeepSpeedEngine, topology: Topology) -> Iterator[tuple[Tensor, list[_Run]]]:
    """The flat tensors that this rank's optimizer updates, and which runs of parameters each is made of."""
    zero: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        assert isinstance(engine.module, torch.nn.Module)
        for parameter in engine.module.parameters():
            yield parameter, [_Run(parameter, start=0, numel=parameter.numel(), at=0)]
    elif stage == 3:
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            yield flat, list(_partitions(group, rank=topology.dp_rank))
    else:
        for flat, offsets in _partitioned_groups(zero):
            yield flat, list(_cut(offsets, first=topology.dp_rank * flat.numel(), numel=flat.numel()))


def _partitions(group: list[Any], *, rank: int) -> Iterator[_Run]:
    """Stage 3: rank r holds numbers [r n, (r + 1) n) of each parameter of a group; the last ranks' may be padding."""
    at = 0
    for parameter in group:
        size = parameter.partition_numel()
        numel = min(size, math.prod(parameter.ds_shape) - rank * size)
        if numel > 0:
            yield _Run(parameter, start=rank * size, numel=numel, at=at)
        at += size


def _partitioned_groups(zero: Any) -> Iterator[tuple[Tensor, list[tuple[Tensor, int]]]]:
    """Stages 1 and 2: this rank's flat partition of each group, and where each parameter starts in the whole group."""
    if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1 with bf16 and fp32 gradients
        for group, flat in zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True):
            *starts, _ = itertools.accumulate((parameter.numel() for parameter in group), initial=0)
            yield flat, list(zip(group, starts, strict=True))
    else:
        groups = zip(
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )
        for group, offsets, flat in groups:
            yield flat, list(zip(group, offsets, strict=True))


def _cut(offsets: list[tuple[Tensor, int]], *, first: int, numel: int) -> Iterator[_Run]:
    """The runs of the parameters at `offsets` of a group that lie in its partition [first, first + numel)."""
    for parameter, offset in offsets:
        start, stop = max(offset, first), min(offset + parameter.numel(), first + numel)
        if start < stop:
            yield _Run(parameter, start=start - offset, numel=stop - start, at=start - first)


def _make_moments(adam: torch.optim.Optimizer, flat: Tensor) -> None:
    """Adam's state of `flat` before the first update, as torch's AdamW or DeepSpeed's CPU Adam makes it."""
    if flat.dtype != torch.float32:
        raise ConfigError([f"master weights in {flat.dtype} cannot be saved: remove *_master_weights_and_grads"])
    state = adam.state[flat]
    if state:
        return
    state["step"] = _adam_step(adam, flat, 0)
    for kind in KINDS[1:]:
        state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format, requires_grad=False)


def _adam_step(adam: torch.optim.Optimizer, flat: Tensor, step: int) -> Tensor | int:
    """`step` as torch's fused AdamW counts it, or DeepSpeed's CPU Adam."""
    is_torch = isinstance(adam, torch.optim.AdamW)
    return torch.full((), step, dtype=torch.float32, device=flat.device) if is_torch else step


def _fill(numbers: Tensor, fragment: Fragment, kind: str, reader: CheckpointReader) -> None:
    if numbers.device.type == "cpu":
        reader.fill(numbers.numpy(), fragment, kind)
    else:
        staged = numbers.cpu()
        reader.fill(staged.numpy(), fragment, kind)
        numbers.copy_(staged)


def _before_filling(zero: Any) -> None:
    if hasattr(zero, "checkpoint_event_prologue"):  # stage 3: parameters that are whole would keep their old numbers
        zero.checkpoint_event_prologue()


@torch.no_grad()
def _round_weights(zero: Any) -> None:
    """Make the weights that the model computes with from the masters; every rank must call."""
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
