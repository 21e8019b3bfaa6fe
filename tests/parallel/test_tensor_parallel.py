"""The sharded pieces compute what whole ones do: cross entropy, argmax, dropout, initial weights."""

from __future__ import annotations

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


def read_words(tp: int, padding: int) -> dict[str, torch.Tensor]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.cross_entropy import tied_cross_entropy, tied_logits, vocab_parallel_argmax

    topology = groups.init_process_groups(tp=tp)
    x, weight, bias, targets = head_and_targets(padding)
    x.requires_grad_()
    own_weight, own_bias = (whole.chunk(tp)[topology.tp_rank].clone().requires_grad_() for whole in (weight, bias))
    likely = vocab_parallel_argmax(tied_logits(x, own_weight, own_bias))
    nll, right = tied_cross_entropy(x, own_weight, own_bias, targets)
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    gradients = {"x": x.grad, "weight": own_weight.grad, "bias": own_bias.grad}
    return {
        "nll": nll.detach(),
        "right": right,
        "likely": likely,
        **{k: g for k, g in gradients.items() if g is not None},
    }


@pytest.mark.parametrize("padding", [3, 12])  # with 12 some ranks hold padding alone
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cross_entropy_and_argmax_of_shards_equal_those_of_the_whole(tp, padding):
    answers = run_world(read_words, tp, tp, padding)
    x, weight, bias, targets = head_and_targets(padding)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    logits = F.linear(x, weight, bias)
    nll = F.cross_entropy(logits, targets, reduction="none")
    (nll * torch.arange(1.0, N + 1)).sum().backward()
    for answer in answers:
        torch.testing.assert_close(answer["nll"], nll.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(answer["likely"], logits.argmax(-1))
        assert torch.equal(answer["right"], logits.argmax(-1) == targets)
        torch.testing.assert_close(answer["x"], x.grad)
    for name, whole in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(torch.cat([answer[name] for answer in answers]), whole.grad)
    assert 0 < int(answers[0]["right"].sum()) < N


def smoothed(tp: int, padding: int) -> dict[str, torch.Tensor]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.parallel.cross_entropy import gather_logits, smoothing_nll, tied_cross_entropy

    topology = groups.init_process_groups(tp=tp)
    x, weight, bias, targets = head_and_targets(padding)
    x.requires_grad_()
    own_weight, own_bias = (whole.chunk(tp)[topology.tp_rank].clone().requires_grad_() for whole in (weight, bias))
    nll, _ = tied_cross_entropy(x, own_weight, own_bias, targets)
    loss = nll + 0.1 * smoothing_nll(x, own_weight, own_bias, targets, vocab_size=V - padding)
    (loss * torch.arange(1.0, N + 1)).sum().backward()
    gathered = gather_logits(F.linear(x, own_weight, own_bias).detach())
    gradients = {"x": x.grad, "weight": own_weight.grad, "bias": own_bias.grad}
    return {"loss": loss.detach(), "logits": gathered, **{k: g for k, g in gradients.items() if g is not None}}


@pytest.mark.parametrize("padding", [3, 12])  # with 12 some ranks hold padding alone
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_smoothed_losses_of_shards_equal_those_of_torch_on_the_whole(tp, padding):
    answers = run_world(smoothed, tp, tp, padding)
    x, weight, bias, targets = head_and_targets(padding)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits[:, : V - padding], targets, reduction="none", label_smoothing=0.1)
    (loss * torch.arange(1.0, N + 1)).sum().backward()
    for answer in answers:
        torch.testing.assert_close(answer["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(answer["x"], x.grad)
        torch.testing.assert_close(answer["logits"], logits.detach())
    for name, whole in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(torch.cat([answer[name] for answer in answers]), whole.grad)


def draws(tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from pmlm_dist.parallel import groups, seeding

    groups.init_process_groups(tp=tp)
    seeding.seed_dropout(3, micro_step=5, dp_rank=0)
    before = torch.rand(4)
    with seeding.distinct_across_tp():
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

    groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
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
