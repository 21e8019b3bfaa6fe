"""Attention backend `fused` against `reference`: outputs and gradients; activation checkpointing changes neither."""

from typing import Any

import pytest
import torch
from support.batches import MODEL, logits_of, model_of, random_batch

from pmlm_dist.config import MaskingConfig
from pmlm_dist.model.attention import ATTENTION_BACKENDS


def outputs_and_gradients(attention: str, *, relative_bias: bool, masking: MaskingConfig, checkpointing: bool = False):
    model = model_of(attention=attention, relative_bias=relative_bias, activation_checkpointing=checkpointing)
    batch = random_batch(masking=masking)
    logits = logits_of(model, batch)[..., : MODEL.vocab_size]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights * batch.weights_BM.t()[None, :, :, None]).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("stop", ["exact", "paper"])
@pytest.mark.parametrize(
    "attention", sorted(set(ATTENTION_BACKENDS) - {"reference", "triton"})
)  # triton: test_triton_attention.py
def test_outputs_and_gradients_equal_reference(attention, stop, relative_bias):
    masking = MaskingConfig(rate=0.3, stop=stop)
    logits, gradients = outputs_and_gradients(attention, relative_bias=relative_bias, masking=masking)
    expected, expected_gradients = outputs_and_gradients("reference", relative_bias=relative_bias, masking=masking)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_activation_checkpointing_changes_nothing():
    masking = MaskingConfig(rate=0.3)
    logits, gradients = outputs_and_gradients("fused", relative_bias=True, masking=masking, checkpointing=True)
    expected, expected_gradients = outputs_and_gradients("fused", relative_bias=True, masking=masking)
    assert torch.equal(logits, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def test_activation_checkpointing_recomputes_the_same_dropout():
    def gradient(*, checkpointing: bool) -> torch.Tensor:
        model = model_of(hidden_dropout=0.2, attention_dropout=0.2, activation_checkpointing=checkpointing)
        torch.manual_seed(3)
        logits_of(model, random_batch())[..., : MODEL.vocab_size].square().mean().backward()
        layer: Any = model.layers[0]
        return layer.attention.query.weight.grad

    torch.testing.assert_close(gradient(checkpointing=True), gradient(checkpointing=False), rtol=1e-12, atol=1e-12)
