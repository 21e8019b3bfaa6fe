"""Sharded operations against unsharded ones: cross entropy, argmax, label smoothing, dropout, initial weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.small_runs import MODEL
from support.worlds import run_world

pytestmark = pytest.mark.distributed

N, E, V = 6, 5, 16


def head_and_targets(padding: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, matrix, bias, targets; the last `padding` rows pad the vocabulary."""
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((N, E), (V, E), (V,)))
    bias[V - padding :] = float("-inf")
    targets = (2 * x @ weight.t() + bias).argmax(-1)
    targets[::2] = torch.randint(V - padding, (N // 2,), generator=random)
    return 2 * x, weight, bias, targets


def outcome_on_shards(tp: int, padding: int) -> dict[str, torch.Tensor]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.cross_entropy import tied_cross_entropy, tied_logits, vocab_parallel_argmax

    topology = groups.init_process_groups(tp=tp)
    x, weight, bias, targets = head_and_targets(padding)
    x.requires_grad_()
    own_weight, own_bias = (full.chunk(tp)[topology.tp_rank].clone().requires_grad_() for full in (weight, bias))
    likely = vocab_parallel_argmax(tied_logits(x, own_weight, own_bias))
    nll, correct = tied_cross_entropy(x, own_weight, own_bias, targets)
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    gradients = {"x": x.grad, "weight": own_weight.grad, "bias": own_bias.grad}
    return {
        "nll": nll.detach(),
        "correct": correct,
        "likely": likely,
        **{k: g for k, g in gradients.items() if g is not None},
    }


@pytest.mark.parametrize("padding", [3, 12])  # with 12 some ranks hold padding only
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sharded_cross_entropy_and_argmax_equal_unsharded(tp, padding):
    results = run_world(outcome_on_shards, tp, tp, padding)
    x, weight, bias, targets = head_and_targets(padding)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    logits = F.linear(x, weight, bias)
    nll = F.cross_entropy(logits, targets, reduction="none")
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    for result in results:
        torch.testing.assert_close(result["nll"], nll.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(result["likely"], logits.argmax(-1))
        assert torch.equal(result["correct"], logits.argmax(-1) == targets)
        torch.testing.assert_close(result["x"], x.grad)
    for name, full in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(torch.cat([result[name] for result in results]), full.grad)
    assert 0 < int(results[0]["correct"].sum()) < N


def smoothed(tp: int, padding: int) -> dict[str, torch.Tensor]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.cross_entropy import gather_logits, smoothing_nll, tied_cross_entropy

    topology = groups.init_process_groups(tp=tp)
    x, weight, bias, targets = head_and_targets(padding)
    x.requires_grad_()
    own_weight, own_bias = (full.chunk(tp)[topology.tp_rank].clone().requires_grad_() for full in (weight, bias))
    nll, _ = tied_cross_entropy(x, own_weight, own_bias, targets)
    loss = nll + 0.1 * smoothing_nll(x, own_weight, own_bias, targets, vocab_size=V - padding)
    (loss * torch.arange(1.0, N + 1)).sum().backward()
    gathered = gather_logits(F.linear(x, own_weight, own_bias).detach())
    gradients = {"x": x.grad, "weight": own_weight.grad, "bias": own_bias.grad}
    return {"loss": loss.detach(), "logits": gathered, **{k: g for k, g in gradients.items() if g is not None}}


@pytest.mark.parametrize("padding", [3, 12])  # with 12 some ranks hold padding only
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sharded_smoothed_loss_equals_torch(tp, padding):
    results = run_world(smoothed, tp, tp, padding)
    x, weight, bias, targets = head_and_targets(padding)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits[:, : V - padding], targets, reduction="none", label_smoothing=0.1)
    (loss * torch.arange(1.0, N + 1)).sum().backward()
    for result in results:
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["x"], x.grad)
        torch.testing.assert_close(result["logits"], logits.detach())
    for name, full in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(torch.cat([result[name] for result in results]), full.grad)


def draws(tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from pmlm_dist.parallel import groups, seeding

    groups.init_process_groups(tp=tp)
    seeding.seed_dropout(3, micro_step=5, dp_rank=0)
    before = torch.rand(4)
    with seeding.distinct_across_tp():
        inside = torch.rand(4)
    return before, inside, torch.rand(4)


def test_generators_differ_across_tp_only_within_context():
    (before_0, inside_0, after_0), (before_1, inside_1, after_1) = run_world(draws, 2, 2)
    assert torch.equal(before_0, before_1)
    assert torch.equal(after_0, after_1)
    assert not torch.equal(inside_0, inside_1)
    assert not torch.equal(before_0, after_0)


def initial_weights(tp: int) -> dict[str, tuple[bool, int, torch.Tensor]]:
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups, seeding
    from pmlm_dist.parallel.layers import is_sharded

    groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
    model = build_model(replace(MODEL, vocab_size=125), padded_vocab_size=128)
    return {
        name: (is_sharded(parameter), getattr(parameter, "partition_dim", -1), parameter.detach())
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("tp", [2, 4])
def test_initial_weights_of_shards_are_slices_of_full_weights(tp):
    (full,) = run_world(initial_weights, 1, 1)
    parts = run_world(initial_weights, tp, tp)
    sharded = 0
    for name, (_, _, expected) in full.items():
        is_sharded, dimension, _ = parts[0][name]
        pieces = [part[name][2] for part in parts]
        if is_sharded:
            sharded += 1
            assert torch.equal(torch.cat(pieces, dim=dimension), expected), name
        else:
            assert all(torch.equal(piece, expected) for piece in pieces), name
    # Token embedding, head bias, relative bias; per layer q, kv and ffn_in with their biases, and two outputs.
    assert sharded == 3 + MODEL.num_layers * 8
