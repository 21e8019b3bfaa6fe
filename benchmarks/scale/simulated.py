"""A world of many ranks in one process: rank 0 on torch's fake process group, and the checkpoints of all ranks."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import KINDS
from pmlm_dist.config import ModelConfig
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology

MODEL = ModelConfig(
    vocab_size=1024, hidden_size=32, num_layers=12, num_heads=2, ffn_size=128, max_positions=32, hidden_dropout=0.0
)


def join(ranks: int) -> Topology:
    """Join a fake world of `ranks` as rank 0, unless that is done."""
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE="8")
    return groups.init_process_groups()


@contextmanager
def created_groups() -> Iterator[list[tuple[int, str | None]]]:
    """Collect size and backend of this rank's groups; none of them is asked for its backend, which may not exist."""
    new_group, created = dist.new_group, []

    def recorded(ranks: Any, **options: Any) -> Any:
        if dist.get_rank() in ranks:
            created.append((len(ranks), options["backend"]))
        return new_group(ranks, **{**options, "backend": None})

    with mock.patch.object(dist, "new_group", recorded):
        yield created


def model() -> PseudoMaskedLM:
    """The model whose states are saved, on this rank's world of one tensor-parallel rank."""
    assert MODEL.vocab_size is not None
    torch.manual_seed(0)
    return build_model(MODEL, padded_vocab_size=MODEL.vocab_size)


class Ranks:
    """The optimizer states of all ranks of a world at a ZeRO stage, made when they are needed."""

    def __init__(self, ranks: int, *, stage: int):
        self._ranks, self._stage, self._model = ranks, stage, model()
        self._parameters = list(self._model.parameters())
        self._values = {kind: _values(self._parameters, number) for number, kind in enumerate(KINDS)}
        self._replica: EngineState | None = None
        if stage == 3:
            for parameter in self._parameters:
                vars(parameter)["ds_shape"] = parameter.shape
                vars(parameter)["partition_numel"] = partial(int, -(-parameter.numel() // ranks))

    def topology(self, rank: int) -> Topology:
        """The place of a rank: data-parallel ranks alone, eight on a node."""
        device = torch.device("cpu")
        return Topology(rank, self._ranks, rank % 8, tp_rank=0, tp=1, dp_rank=rank, dp=self._ranks, device=device)

    def state(self, rank: int, *, filled: bool) -> EngineState:
        """The real `EngineState` of a rank, above a stand-in for its engine; `filled`: with values, else with zeros."""
        if self._stage == 0 and filled and self._replica is not None:
            state = copy.copy(self._replica)
            state.topology = self.topology(rank)
            return state
        master, zero = self._partition(rank)
        adam = torch.optim.AdamW(self._parameters if self._stage == 0 else [master])
        engine: Any = SimpleNamespace(
            module=self._model,
            optimizer=zero,
            basic_optimizer=adam,
            zero_optimization_stage=lambda: self._stage,
            gradient_accumulation_steps=lambda: 1,
            global_steps=0,
            global_samples=0,
            skipped_steps=0,
        )
        state = EngineState(engine, self.topology(rank))
        for owned, number in self._owned(state):
            for kind, tensor in owned.tensors.items():
                start, stop = owned.fragment.start, owned.fragment.stop
                tensor.copy_(self._values[kind][number][start:stop] if filled else torch.zeros(stop - start))
        self._replica = state if filled else None
        return state

    def check(self, state: EngineState) -> None:
        """Raise unless `state` holds the values of its rank."""
        for owned, number in self._owned(state):
            for kind, tensor in owned.tensors.items():
                expected = self._values[kind][number][owned.fragment.start : owned.fragment.stop]
                assert torch.equal(tensor, expected), f"{owned.fragment} was not restored"

    def _owned(self, state: EngineState) -> Iterator[tuple[Any, int]]:
        numbers = {name: number for number, (name, _) in enumerate(self._model.named_parameters())}
        return ((owned, numbers[owned.fragment.name]) for owned in state.owned_fragments())

    def _partition(self, rank: int) -> tuple[Tensor, Any]:
        """The flat master of a rank, and the attributes of DeepSpeed's optimizer that tell what is in it."""
        sizes = [parameter.numel() for parameter in self._parameters]
        if self._stage == 3:
            master = torch.zeros(sum(-(-size // self._ranks) for size in sizes))
            names = ("_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_epilogue")
            nothing = dict.fromkeys(names, lambda *_: None)
            groups_of_3 = {"fp16_groups": [self._parameters], "fp32_partitioned_groups_flat": [master]}
            return master, SimpleNamespace(**groups_of_3, **nothing)
        master = torch.zeros(-(-sum(sizes) // self._ranks))
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        return master, SimpleNamespace(
            round_robin_bit16_groups=[self._parameters],
            round_robin_bit16_offsets=[offsets],
            single_partition_of_fp32_groups=[master],
        )


def _values(parameters: list[Any], number: int) -> list[Tensor]:
    """Distinct values for every parameter, flat."""
    return [
        torch.arange(math.prod(parameter.shape), dtype=torch.float32) + 1000 * place + 0.25 * number
        for place, parameter in enumerate(parameters)
    ]
