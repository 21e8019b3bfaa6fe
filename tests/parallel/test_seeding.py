"""Dropout is a function of the place in the run: other in every micro-batch and on every data-parallel rank."""

from __future__ import annotations

import itertools

import torch

from pmlm_dist.parallel.seeding import seed_dropout, seed_initialization


def draws(seed: int, micro_step: int, dp_rank: int) -> tuple[float, ...]:
    seed_dropout(seed, micro_step=micro_step, dp_rank=dp_rank)
    return tuple(torch.rand(4).tolist())


def test_every_place_of_a_run_draws_its_own_numbers_again_and_again():
    places = list(itertools.product((0, 1), range(5), range(3)))
    drawn = [draws(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert [draws(*place) for place in places] == drawn


def test_initial_weights_are_not_drawn_like_dropout():
    seed_initialization(0)
    assert tuple(torch.rand(4).tolist()) not in {draws(0, step, rank) for step in range(3) for rank in range(3)}
