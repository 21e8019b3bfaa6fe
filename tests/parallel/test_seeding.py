"""Dropout seeds are a function of the position in the run: one for each micro-batch and data-parallel rank."""

import itertools

import torch

from pmlm_dist.parallel.seeding import seed_dropout, seed_initialization


def draws(seed: int, micro_step: int, dp_rank: int) -> tuple[float, ...]:
    seed_dropout(seed, micro_step=micro_step, dp_rank=dp_rank)
    return tuple(torch.rand(4).tolist())


def test_dropout_seeds_are_distinct_and_reproducible():
    positions = list(itertools.product((0, 1), range(5), range(3)))
    drawn = [draws(*position) for position in positions]
    assert len(set(drawn)) == len(positions)
    assert [draws(*position) for position in positions] == drawn


def test_initialization_seed_differs_from_dropout_seeds():
    seed_initialization(0)
    assert tuple(torch.rand(4).tolist()) not in {draws(0, step, rank) for step in range(3) for rank in range(3)}
