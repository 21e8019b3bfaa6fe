"""State of a DeepSpeed engine as fragments: the only module that depends on ZeRO's partitioning.

    parameter [tensor-parallel slice]     where a data-parallel rank holds fp32 master, exp_avg and exp_avg_sq
        stage 0                           all of it, replicated on every rank
        stage 1, 2                        its part of a flat group: parameters concatenated, cut into equal partitions
        stage 3                           its partition of each parameter; the last partitions are padded

Each fragment is a contiguous range of a flat fp32 master that the optimizer updates; the moments in the optimizer's
state have the same layout. bf16 and fp16 weights are rounded masters: never saved, but cast again after loading.
"""

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
"""Tensors whose first dimension is the padded vocabulary."""
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Range:
    """`numel` elements of a parameter, from `start` of its flat slice, stored from `offset` of a flat master."""

    parameter: Tensor
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class OwnedFragment:
    """A fragment, and views of its master and moments on this rank by kind: fp32 [numel] each."""

    fragment: Fragment
    tensors: dict[str, Tensor]


class EngineState:
    """Read and fill the weights, moments and counters of an engine. Every rank makes one, after `initialize_engine`.

    Moments do not exist before the first update; they are created here as the optimizer would: zeros.
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
        for master, _ in self._layout:
            _initialize_moments(self._adam, master)

    @property
    def precision(self) -> str:
        """Precision of the model's weights and activations: `fp32`, `bf16` or `fp16`."""
        if self.engine.bfloat16_enabled():
            return "bf16"
        return "fp16" if self.engine.fp16_enabled() else "fp32"

    # -------------------------------------------------------------------------------------------------------- reading

    def owned_fragments(self) -> list[OwnedFragment]:
        """Return everything that this rank's optimizer updates."""
        return [self._owned(master, part, self._fragment(part)) for master, part in self._ranges()]

    def fragments_to_write(self) -> list[OwnedFragment]:
        """Return this rank's part of a checkpoint: replicated state is divided evenly among its replicas."""
        return [
            self._owned(master, part, share)
            for master, part in self._ranges()
            if (share := self._fragment(part).share_of_replica(*self._replica(part.parameter))) is not None
        ]

    def counters(self) -> dict[str, Any]:
        """Return the engine's counters, Adam's step and the loss scale as JSON values, equal on every rank."""
        steps = {int(self._adam.state[master]["step"]) for master, _ in self._layout}
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
        """Register `callback`, called in every step before weights and moments change."""
        self._adam.register_step_pre_hook(lambda *_: callback())

    # -------------------------------------------------------------------------------------------------------- filling

    def restore(self, reader: CheckpointReader, counters: dict[str, Any]) -> None:
        """Fill weights, moments and counters; every rank must call. Optimizer settings are not changed.

        Raises `ConfigError` when the checkpoint has other tensors than the model.
        """
        if not reader.has_moments:
            raise ConfigError(
                ["the checkpoint holds weights alone, no run can resume from it: start a new run with --init"]
            )
        self._fill_from(reader, KINDS)
        self._restore_counters(counters)

    def load_weights(self, reader: CheckpointReader, *, fresh: str | None = None) -> None:
        """Fill the weights alone, for a run that starts at step 0; every rank must call.

        Tensors whose names begin with `fresh` keep their random initialization, even if the checkpoint has them.
        Raises `ConfigError` when the checkpoint has other tensors than the model.
        """
        self._fill_from(reader, KINDS[:1], fresh=fresh)

    def _fill_from(self, reader: CheckpointReader, kinds: tuple[str, ...], *, fresh: str | None = None) -> None:
        raise_if_any(self._mismatches(reader, ignored=fresh))
        if hasattr(self._zero, "checkpoint_event_prologue"):  # stage 3: gathered parameters would keep their old values
            self._zero.checkpoint_event_prologue()
        for owned in self.owned_fragments():
            for kind in () if fresh and owned.fragment.name.startswith(fresh) else kinds:
                _fill(owned.tensors[kind], owned.fragment, kind, reader)
        _cast_masters_to_weights(self._zero)

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        for master, _ in self._layout:
            self._adam.state[master]["step"] = _adam_step(self._adam, master, counters["adam_step"])
        engine, scaler = self.engine, getattr(self._zero, "loss_scaler", None)
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, counters[name])
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        saved, present = counters["loss_scale"], {name for name in _LOSS_SCALE if hasattr(scaler, name)}
        if saved.keys() == present:  # they differ after a change between fixed and dynamic loss scale
            for name, value in saved.items():
                setattr(scaler, name, value)

    def _mismatches(self, reader: CheckpointReader, *, ignored: str | None = None) -> list[str]:
        saved, own = reader.tensors, {name: self._whole(p) for name, p in self.model.named_parameters()}
        if ignored:
            saved, own = ({n: w for n, w in tensors.items() if not n.startswith(ignored)} for tensors in (saved, own))
        problems = [f"the checkpoint has no {name}" for name in own if name not in saved]
        problems += [f"the checkpoint has {name}, the model has not" for name in saved if name not in own]
        for name in own.keys() & saved.keys():
            (was, rows), (now, rows_now) = ((w.shape, w.used_rows) for w in (saved[name], own[name]))
            if was[1:] != now[1:] or rows != rows_now:  # not was[0] != now[0]: the padding depends on the topology
                problems.append(f"{name} has shape {list(was)} in the checkpoint and {list(now)} in the model")
        return sorted(problems)

    # ------------------------------------------------------------------------------------------------------ fragments

    def _replica(self, parameter: Tensor) -> tuple[int, int]:
        """Return this rank's index among the ranks that hold the same state of a parameter, and their number."""
        topology = self.topology
        replicas, index = (topology.dp, topology.dp_rank) if self.engine.zero_optimization_stage() == 0 else (1, 0)
        if is_sharded(parameter):
            return index, replicas
        return index * topology.tp + topology.tp_rank, replicas * topology.tp

    def _whole(self, parameter: Tensor) -> Fragment:
        """Return the full tensor of which `parameter` is this rank's slice."""
        name, shape = self._names[id(parameter)], list(_shape(parameter))
        dim = sharded_dimension(parameter)
        if is_sharded(parameter):
            shape[dim] *= self.topology.tp
        rows = self.model.config.vocab_size if name in _VOCABULARY_TENSORS else None
        return Fragment.whole(name, shape, used_rows=rows, dim=dim)

    def _fragment(self, part: _Range) -> Fragment:
        whole = self._whole(part.parameter)
        size = _shape(part.parameter)[whole.dim]
        first = self.topology.tp_rank * size if is_sharded(part.parameter) else 0
        return Fragment(
            whole.name,
            whole.shape,
            used_rows=whole.used_rows,
            dim=whole.dim,
            first_row=first,
            last_row=first + size,
            start=part.start,
            stop=part.start + part.numel,
        )

    def _ranges(self) -> Iterator[tuple[Tensor, _Range]]:
        return ((master, part) for master, parts in self._layout for part in parts)

    def _owned(self, master: Tensor, part: _Range, fragment: Fragment) -> OwnedFragment:
        """Views of `fragment`, which lies within `part`."""
        # Both starts count elements of the same flat slice: their difference shifts the offset in the master.
        offset = part.offset + fragment.start - part.start
        state = self._adam.state[master]
        flat = {"weight": master.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        views = {kind: tensor.view(-1)[offset : offset + fragment.numel] for kind, tensor in flat.items()}
        return OwnedFragment(fragment, views)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties parameters; ds_shape is their shape


# ---------------------------------------------------------------------------------------------------- ZeRO's partitions


def _layout(engine: DeepSpeedEngine, topology: Topology) -> Iterator[tuple[Tensor, list[_Range]]]:
    """Yield each fp32 master that this rank's optimizer updates, with the ranges of parameters that it consists of."""
    zero: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        assert isinstance(engine.module, torch.nn.Module)
        for parameter in engine.module.parameters():
            yield parameter, [_Range(parameter, start=0, numel=parameter.numel(), offset=0)]
    elif stage == 3:
        for group, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            yield master, list(_stage3_ranges(group, rank=topology.dp_rank))
    else:
        for master, offsets in _stage12_groups(zero):
            # Partitions are of equal size, so that of rank r starts at r * size of the flat group.
            first = topology.dp_rank * master.numel()
            yield master, list(_ranges_in_partition(offsets, first=first, numel=master.numel()))


def _stage3_ranges(group: list[Any], *, rank: int) -> Iterator[_Range]:
    """Stage 3: rank r holds elements [r n, (r + 1) n) of each parameter; partitions of the last ranks may be padded."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        numel = min(size, math.prod(parameter.ds_shape) - rank * size)
        if numel > 0:  # otherwise the partition is padding alone
            yield _Range(parameter, start=rank * size, numel=numel, offset=offset)
        offset += size  # padding takes space in the flat master too


def _stage12_groups(zero: Any) -> Iterator[tuple[Tensor, list[tuple[Tensor, int]]]]:
    """Stages 1 and 2: this rank's partition of each flat group, and the offset of each parameter in the group."""
    if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1 with bf16 and fp32 gradients
        for group, master in zip(zero.bf16_groups, zero.fp32_groups_flat_partition, strict=True):
            *starts, _ = itertools.accumulate((parameter.numel() for parameter in group), initial=0)
            yield master, list(zip(group, starts, strict=True))
    else:
        # The round-robin lists: with `round_robin_gradients` the order in the flat group is not the model's.
        groups = zip(
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )
        for group, offsets, master in groups:
            yield master, list(zip(group, offsets, strict=True))


def _ranges_in_partition(offsets: list[tuple[Tensor, int]], *, first: int, numel: int) -> Iterator[_Range]:
    """Yield the ranges of a flat group's parameters that lie in its partition [first, first + numel)."""
    for parameter, offset in offsets:
        start, stop = max(offset, first), min(offset + parameter.numel(), first + numel)
        if start < stop:
            yield _Range(parameter, start=start - offset, numel=stop - start, offset=start - first)


def _initialize_moments(adam: torch.optim.Optimizer, master: Tensor) -> None:
    """Create Adam's state of `master` before the first update, as torch's AdamW or DeepSpeed's CPU Adam does."""
    if master.dtype != torch.float32:
        raise ConfigError([f"master weights in {master.dtype} cannot be saved: remove *_master_weights_and_grads"])
    state = adam.state[master]
    if state:
        return
    state["step"] = _adam_step(adam, master, 0)
    for kind in KINDS[1:]:
        state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)


def _adam_step(adam: torch.optim.Optimizer, master: Tensor, step: int) -> Tensor | int:
    """Return `step` in the type that the optimizer uses: a tensor in torch's fused AdamW, an int in CPU Adam."""
    is_torch = isinstance(adam, torch.optim.AdamW)
    return torch.full((), step, dtype=torch.float32, device=master.device) if is_torch else step


def _fill(tensor: Tensor, fragment: Fragment, kind: str, reader: CheckpointReader) -> None:
    if tensor.device.type == "cpu":
        reader.fill(tensor.numpy(), fragment, kind)
    else:
        staged = tensor.cpu()  # a copy of the old values: padding rows are not in the checkpoint and must stay
        reader.fill(staged.numpy(), fragment, kind)
        tensor.copy_(staged)


@torch.no_grad()
def _cast_masters_to_weights(zero: Any) -> None:
    """Cast the fp32 masters to the weights that the model computes with; every rank must call."""
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
