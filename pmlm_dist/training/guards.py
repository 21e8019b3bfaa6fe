"""Consistency checks over ranks while training, and the handling of steps that are not finite.

    check_batches        tensor-parallel peers hold the same batch, data-parallel ranks different samples
    check_replicas       replicated parameters are equal bit for bit
    diagnose_nonfinite   which rank's losses, activations, gradients or weights were not finite in a step
    SkippedSteps         counts such steps, which change no weight; too many in a row end the run

Batches and replicas are compared at the first step of an attempt and every `train.guard_every` steps: a hash of a
batch, a pass over the weights and a small gather. The gradient norm of every step shows whether it is finite.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pmlm_dist.data.batch import Batch
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.parallel.layers import is_sharded

_SHOWN = 3
"""Names listed in a message before the rest is only counted."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GuardError(RuntimeError):
    """Ranks disagree on batches or replicas: further steps would train another model than the one configured."""


def check_batches(micro_batches: Sequence[Batch], topology: Topology) -> None:
    """Compare a step's batches over all ranks; every rank calls. Raises `GuardError` on all alike."""
    own = [
        (batch.fingerprint(), list(zip(batch.epochs_B.tolist(), batch.sample_ids_B.tolist(), strict=True)))
        for batch in micro_batches
    ]
    per_rank = topology.all_gather_object(own)
    for rank, batches in enumerate(per_rank):
        first = rank - rank % topology.tp
        if [fingerprint for fingerprint, _ in batches] != [fingerprint for fingerprint, _ in per_rank[first]]:
            raise GuardError(
                f"ranks {first} and {rank} share one copy of the model (tensor parallel) but hold different batches: "
                "their corpora or settings differ; compare --corpus and its files on their nodes"
            )
    readers: dict[tuple[int, int], int] = {}
    for rank in range(0, topology.world_size, topology.tp):
        for epoch, number in (sample for _, samples in per_rank[rank] for sample in samples):
            reader = readers.setdefault((epoch, number), rank)
            if reader != rank:
                raise GuardError(
                    f"ranks {reader} and {rank} both read sample {number} of epoch {epoch}: data-parallel ranks must "
                    "read different ones; compare the corpora on their nodes"
                )


def check_replicas(model: nn.Module, topology: Topology) -> None:
    """Compare the replicas of parameters; every rank calls. Raises `GuardError` on all alike.

    Data-parallel ranks hold equal parameters, except those that ZeRO-3 partitions. Tensor-parallel peers hold equal
    parameters, except the sharded ones.
    """
    checksums = torch.stack([_checksum(parameter) for parameter in model.parameters()]).tolist()
    per_rank = topology.all_gather_object(checksums)
    problems = []
    for number, (name, parameter) in enumerate(model.named_parameters()):
        for ranks in _replica_groups(topology, parameter):
            ((usual, _),) = Counter(per_rank[rank][number] for rank in ranks).most_common(1)
            odd = [rank for rank in ranks if per_rank[rank][number] != usual]
            if odd:
                problems.append(f"{name}: ranks {_some(odd)} differ from ranks {_some(sorted(set(ranks) - set(odd)))}")
    if problems:
        raise GuardError(
            f"replicas of parameters are not equal ({_some(problems)}): memory or communication of a rank is at fault; "
            "restart from the last checkpoint, without the node of the rank that differs"
        )


def _replica_groups(topology: Topology, parameter: nn.Parameter) -> Iterable[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in range(topology.world_size):
        dp_rank, tp_rank = divmod(rank, topology.tp)
        place = (dp_rank if hasattr(parameter, "ds_tensor") else -1, tp_rank if is_sharded(parameter) else -1)
        groups.setdefault(place, []).append(rank)
    return groups.values()


def _checksum(parameter: nn.Parameter) -> Tensor:
    """Return the sum of the values' bits as integers: any single flipped bit changes it."""
    held = _local_values(parameter)
    return held.contiguous().view(_INTEGERS[held.element_size()]).sum(dtype=torch.int64)


@dataclass
class SkippedSteps:
    """Steps skipped in this attempt because a rank's gradient was not finite."""

    limit: int
    total: int = 0
    in_a_row: int = 0

    def count(self, *, skipped: bool, last_good: Path | None) -> None:
        """Count a step. Raises FloatingPointError, naming the last good checkpoint, after `limit` skips in a row."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had gradients that are not finite and were skipped "
                "(train.max_skipped_steps): lower --optim.peak-lr, set gradient_clipping, or check the causes named "
                f"above; the last good checkpoint is {last_good or 'the start: none was written yet'}"
            )


def diagnose_nonfinite(
    model: nn.Module,
    sample_ids: Sequence[Sequence[int]],
    loss_of: Callable[[int], Tensor],
    topology: Topology,
    *,
    with_gradients: bool,
) -> list[str]:
    """Compute a skipped step's losses again and return what was not finite, one line a rank; every rank calls.

    `sample_ids`: those of each micro-batch. `loss_of(i)`: the loss of micro-batch i, without effect on the optimizer.
    `with_gradients` false: gradients cannot be taken (ZeRO-3, activation checkpointing); activations are checked only.
    """
    problems = [_names("weights", (name for name, p in model.named_parameters() if not _is_finite(_local_values(p))))]
    for number, ids in enumerate(sample_ids):
        with _recorded(model) as outputs, torch.set_grad_enabled(with_gradients):
            loss = loss_of(number)
        if not _is_finite(loss.detach()):
            problems.append(f"loss of micro-batch {number}, samples {_some(ids)}")
            problems.append(_names("outputs", outputs))
        if with_gradients:
            problems.append(_names("gradients", _bad_gradients(model, loss)))
    per_rank = topology.all_gather_object([sentence for sentence in dict.fromkeys(problems) if sentence])
    causes = [f"rank {rank}: {'; '.join(sentences)}" for rank, sentences in enumerate(per_rank) if sentences]
    return causes or ["computed again, everything is finite: a hardware or communication error"]


def _bad_gradients(model: nn.Module, loss: Tensor) -> list[str]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [name for name, g in zip(names, gradients, strict=True) if g is not None and not _is_finite(g)]


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in order of computation."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(_is_finite(t.detach()) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()):
                names.append(name)

        return record

    leaves = ((name, module) for name, module in model.named_modules() if not list(module.children()))
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _local_values(parameter: nn.Parameter) -> Tensor:
    """Return this rank's partition of a ZeRO-3 parameter, or all of another one."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _names(what: str, names: Iterable[str]) -> str:
    listed = list(names)
    return f"{what} of {_some(listed)}" if listed else ""


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
