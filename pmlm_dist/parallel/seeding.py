"""Random numbers as a function of (seed, place in the run): nothing to save, nothing to restore.

Dropout is seeded anew for every micro-batch from the number of samples consumed, so a resumed run draws what the
uninterrupted one drew. Tensor-parallel peers share the default generator (they must drop the same hidden units);
inside `different_on_tp_peers` they part (they hold different heads). The parting seed is drawn from the default
CPU generator, whose state activation checkpointing restores: the recomputed pass drops what the first one dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core import parallel_state

_INITIALISATION, _DROPOUT = 0, 1
_LARGEST_SEED = 2**62


def seed_initialisation(seed: int) -> None:
    """Seed the drawing of the weights: the same on every rank of every topology."""
    torch.manual_seed(_mix(seed, _INITIALISATION))


def seed_dropout(seed: int, *, micro_step: int, dp_rank: int) -> None:
    """Seed dropout for the micro-batch `micro_step` of the run on data-parallel rank `dp_rank`."""
    torch.manual_seed(_mix(seed, _DROPOUT, micro_step, dp_rank))


@contextmanager
def distinct_across_tp() -> Iterator[None]:
    """Random numbers drawn inside differ among tensor-parallel peers; outside only the seed for them has been drawn."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        yield
        return
    shared = int(torch.randint(_LARGEST_SEED, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mix(shared, parallel_state.get_tensor_model_parallel_rank()))
        yield


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] % _LARGEST_SEED)
