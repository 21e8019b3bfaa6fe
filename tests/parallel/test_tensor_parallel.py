"""The sharded pieces compute what whole ones do: cross entropy, argmax, dropout, initial weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import MODEL
from worlds import run_world

pytestmark = pytest.mark.distributed

N, V = 6, 16


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, V, generator=random)
    logits[:, V - 3 :] = float("-inf")  # rows that pad the vocabulary
    return logits, torch.randint(V - 3, (N,), generator=random)


def sharded_cross_entropy(tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.cross_entropy import most_likely, token_nll

    topology = groups.start(tp=tp)
    logits, targets = logits_and_targets()
    own = logits.chunk(tp, dim=-1)[topology.tp_rank].clone().requires_grad_()
    likely = most_likely(own)
    nll = token_nll(own, targets)
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    assert own.grad is not None
    return nll.detach(), likely, own.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cross_entropy_and_argmax_of_shards_equal_those_of_the_whole(tp):
    answers = run_world(sharded_cross_entropy, tp, tp)
    logits, targets = logits_and_targets()
    whole = logits.clone().requires_grad_()
    nll = F.cross_entropy(whole, targets, reduction="none")
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    for found_nll, likely, _ in answers:
        torch.testing.assert_close(found_nll, nll.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(likely, logits.argmax(-1))
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in answers], dim=-1), whole.grad)


def draws(tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from pmlm_dist.parallel import groups, seeding

    groups.start(tp=tp)
    seeding.seed_dropout(3, micro_step=5, dp_rank=0)
    before = torch.rand(4)
    with seeding.different_on_tp_peers():
        inside = torch.rand(4)
    return before, inside, torch.rand(4)


def test_tensor_parallel_peers_part_only_inside():
    (before_0, inside_0, after_0), (before_1, inside_1, after_1) = run_world(draws, 2, 2)
    assert torch.equal(before_0, before_1)
    assert torch.equal(after_0, after_1)
    assert not torch.equal(inside_0, inside_1)
    assert not torch.equal(before_0, after_0)


def initial_weights(tp: int) -> dict[str, tuple[bool, int, torch.Tensor]]:
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups, seeding
    from pmlm_dist.parallel.layers import is_sharded

    groups.start(tp=tp)
    seeding.seed_initialisation(0)
    model = build_model(replace(MODEL, vocab_size=125), padded_vocab_size=128)
    return {
        name: (is_sharded(parameter), getattr(parameter, "partition_dim", -1), parameter.detach())
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_slices_of_the_weights_that_one_rank_draws(tp):
    (whole,) = run_world(initial_weights, 1, 1)
    parts = run_world(initial_weights, tp, tp)
    sharded = 0
    for name, (_, _, expected) in whole.items():
        is_sharded, dimension, _ = parts[0][name]
        pieces = [part[name][2] for part in parts]
        if is_sharded:
            sharded += 1
            assert torch.equal(torch.cat(pieces, dim=dimension), expected), name
        else:
            assert all(torch.equal(piece, expected) for piece in pieces), name
    # Words, head bias, relative table; a layer's q, kv, in with their biases, and two outputs.
    assert sharded == 3 + MODEL.num_layers * 8
