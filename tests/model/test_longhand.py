"""Loss and gradients against the longhand reference (`support/longhand.py`) for random settings."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import longhand
from support.batches import MODEL, model_of, random_batch

from pmlm_dist.config import MaskingConfig, ObjectiveConfig
from pmlm_dist.objectives import OBJECTIVES, loss_scales
from pmlm_dist.training.validation import forward_losses, weights_of

objectives = st.builds(
    ObjectiveConfig,
    kind=st.sampled_from(sorted(OBJECTIVES)),
    ae_weight=st.sampled_from([1.0, 0.5]),
    par_weight=st.sampled_from([1.0, 2.0]),
    drop_kept=st.booleans(),
)
maskings = st.builds(
    MaskingConfig,
    rate=st.sampled_from([0.15, 0.3, 0.45]),
    span_probability=st.sampled_from([0.0, 0.4, 1.0]),
    max_span=st.integers(2, 4),
    stop=st.sampled_from(["exact", "paper"]),
    corruption=st.sampled_from(["paper", "mask_only"]),
    prefix_share=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    objective=objectives,
    masking=maskings,
    relative_bias=st.booleans(),
    heads=st.sampled_from([1, 2, 4]),
    attention=st.sampled_from(["fused", "reference"]),
    length=st.integers(8, 14),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_longhand(*, objective, masking, relative_bias, heads, attention, length, seed):
    assume(objective.kind != "ae" or not masking.prefix_share)
    model = model_of(
        seed=seed,
        vocab_size=20,
        hidden_size=8,
        num_layers=2,
        num_heads=heads,
        ffn_size=12,
        relative_bias=relative_bias,
        relative_buckets=8,
        relative_max_distance=6,
        attention=attention,
    )
    batch = random_batch(batch=2, length=length, seed=seed, masking=masking, vocabulary=20)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = longhand.loss(weights, batch, model.config, objective)
    expected.backward()

    targets_K = weights_of(batch, objective).sum(dim=(1, 2))
    sums = forward_losses(model, batch, objective)
    loss = (sums.nll_K * loss_scales(objective, targets_K)).sum()
    loss.backward()
    assert MODEL.layer_norm_eps == model.config.layer_norm_eps
    # `loss_scales` are fp32: 24 bits.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        reference = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weights[name])
        actual = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert reference is not None
        torch.testing.assert_close(
            actual, reference, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
