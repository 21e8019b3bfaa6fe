"""No prediction depends on its target: gradients of the predicted slots with respect to the embeddings of all slots.

The slots that can reach a predicted slot over L layers are the closure of the visibility rule. Outside of it all
gradients must be exactly zero. Inside, with random weights, they are nonzero, so missing connections are detected too.
"""

import pytest
import torch
from support.batches import model_of, random_batch

from pmlm_dist.config import MaskingConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.model.transformer import PseudoMaskedLM


def is_visible(q_order: int, k_order: int) -> bool:
    """Visibility rule by kind of the query: context, original of step q, pseudo mask of step q."""
    if q_order == 0:
        return k_order == 0
    if q_order > 0:
        return 0 <= k_order <= q_order
    return 0 <= k_order < -q_order or k_order == q_order


def closure(batch: Batch, sample: int, layers: int) -> torch.Tensor:
    """[T, T]: True where slot j can reach slot i over `layers` layers, including residual connections."""
    order, valid = batch.order_BT[sample].tolist(), batch.valid_BT[sample].tolist()
    slots = list(enumerate(order))
    one = torch.tensor([[i == j or (valid[j] and is_visible(q, k)) for j, k in slots] for i, q in slots])
    reach = one
    for _ in range(layers - 1):
        reach = (reach.double() @ one.double()) > 0
    return reach


def influence(model: PseudoMaskedLM, batch: Batch) -> torch.Tensor:
    """[B, R, T]: largest gradient of each predicted slot's output with respect to each slot's embedding."""
    embeddings: list[torch.Tensor] = []

    def keep(_module, _inputs, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = model.embeddings.register_forward_hook(keep)
    hidden_RBE = model.encode(batch.inputs)
    handle.remove()
    probe = torch.randn(hidden_RBE.shape[-1], dtype=hidden_RBE.dtype, generator=torch.Generator().manual_seed(1))
    rows = []
    for output_B in hidden_RBE @ probe:
        (gradient_TBE,) = torch.autograd.grad(output_B.sum(), embeddings[0], retain_graph=True)
        rows.append(gradient_TBE.abs().amax(dim=-1).t())
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("attention", ["reference", "fused"])
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_zero_exactly_outside_closure_of_visibility(attention, relative_bias, seed):
    model = model_of(attention=attention, relative_bias=relative_bias, seed=seed)
    masking = MaskingConfig(rate=0.3, stop="paper" if seed else "exact", prefix_share=0.5)
    batch = random_batch(seed=seed, masking=masking)
    assert set(batch.prefix_BM[batch.weights_BM > 0].tolist()) == {False, True}
    influence_BRT = influence(model, batch)
    M, T = batch.num_predictions, batch.tokens_BT.shape[1]
    for sample in range(len(influence_BRT)):
        reach = closure(batch, sample, layers=model.config.num_layers)
        pseudo = torch.arange(T - M, T)
        predicted_R = torch.cat([batch.predicted_BM[sample], pseudo])
        allowed_RT = reach[predicted_R]
        used = batch.weights_BM[sample].bool().repeat(2)
        assert (influence_BRT[sample][~allowed_RT] == 0).all()
        assert (influence_BRT[sample][used][allowed_RT[used]] > 0).all()


@pytest.mark.parametrize("prefix_share", [0.0, 1.0])
def test_pseudo_masks_never_depend_on_own_or_later_targets(prefix_share):
    batch = random_batch(masking=MaskingConfig(rate=0.3, corruption="mask_only", prefix_share=prefix_share))
    influence_BRT = influence(model_of(num_layers=4), batch)
    S, M = batch.num_context, batch.num_predictions
    for sample in range(len(influence_BRT)):
        steps = batch.order_BT[sample, S : S + M]
        for m in range(M):
            if batch.weights_BM[sample, m] == 0:
                continue
            later_or_own = steps >= steps[m]
            assert (influence_BRT[sample, M + m, S : S + M][later_or_own] == 0).all()
            assert (influence_BRT[sample, m, S:] == 0).all()  # AE depends on no appended slot
