"""Random numbers as a function of the seed and the position in the run, so that no generator state is saved.

Dropout is seeded for every micro-batch from the number of samples consumed: a resumed run draws the same numbers as an
uninterrupted one. Tensor-parallel peers share the default generator, since they must drop the same hidden units. Within
`distinct_across_tp` their numbers differ, since they hold different heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core import parallel_state

_INITIALIZATION, _DROPOUT = 0, 1
_LARGEST_SEED = 2**62


def seed_initialization(seed: int) -> None:
    """Seed the initialization of the weights: the same on every rank of every topology."""
    torch.manual_seed(_mix(seed, _INITIALIZATION))


def seed_dropout(seed: int, *, micro_step: int, dp_rank: int) -> None:
    """Seed dropout for the micro-batch `micro_step` of the run on data-parallel rank `dp_rank`."""
    torch.manual_seed(_mix(seed, _DROPOUT, micro_step, dp_rank))


@contextmanager
def distinct_across_tp() -> Iterator[None]:
    """Draw different random numbers on tensor-parallel peers; afterwards their generators agree again."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        yield
        return
    # Drawn from the default CPU generator, whose state activation checkpointing restores before it recomputes: both
    # passes get the same seed and drop the same probabilities.
    shared = int(torch.randint(_LARGEST_SEED, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mix(shared, parallel_state.get_tensor_model_parallel_rank()))
        yield


def _mix(*numbers: int) -> int:
    # SeedSequence hashes: neighboring seeds or micro-steps must not give correlated streams.
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] % _LARGEST_SEED)
