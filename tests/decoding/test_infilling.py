"""Infilling in steps against one pass over the layout of pre-training with the same order and predictions."""

import pytest
import torch
from support.batches import SPECIAL, VOCABULARY, model_of

from pmlm_dist.decoding.infilling import FilledMask, fill
from pmlm_dist.masking.layout import SlotInputs

SPANS = [[2, 3, 4], [7], [9, 10]]
IDS = [SPECIAL.cls, *range(10, 21), SPECIAL.sep]
for _span in SPANS:
    for _position in _span:
        IDS[_position] = SPECIAL.mask


def one_pass(model, steps: list[list[FilledMask]], objective: str) -> torch.Tensor:
    """Probabilities [M, V] of the slots of `steps`, each given the predictions of earlier steps, in one pass."""
    masks = [(number, mask) for number, step in enumerate(steps, start=1) for mask in step]
    order = torch.tensor([number for number, _ in masks])
    positions = torch.tensor([mask.position for _, mask in masks])
    tokens = torch.tensor([mask.choices[0][0] for _, mask in masks])
    context = torch.arange(len(IDS))
    slots = torch.cat([context, positions, positions])[None]
    inputs = SlotInputs(
        tokens_BT=torch.cat([torch.tensor(IDS), tokens, torch.full_like(tokens, SPECIAL.mask)])[None],
        positions_BT=slots,
        segments_BT=torch.zeros_like(slots),
        order_BT=torch.cat([torch.zeros_like(context), order, -order])[None],
        valid_BT=torch.ones_like(slots, dtype=torch.bool),
        predicted_BM=positions[None],
    )
    with torch.no_grad():
        logits = model(inputs=inputs, objectives=(objective,))[0, :, 0, :VOCABULARY]
    logits[:, list(SPECIAL.special)] = float("-inf")
    return logits.softmax(-1)


def check(masks: list[FilledMask], expected: torch.Tensor, shown: int = 4):
    for mask, p in zip(masks, expected, strict=True):
        best = p.topk(shown)
        assert [token for token, _ in mask.choices] == best.indices.tolist()
        assert [value for _, value in mask.choices] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], "left", "right"], ids=str)
def test_steps_equal_one_pass_over_layout_of_pretraining(order):
    model = model_of().eval()
    filled = fill(model, IDS, SPANS, order=order, special=SPECIAL, shown=4)
    assert [mask.position for mask in filled] == [2, 3, 4, 7, 9, 10]
    by_name = {"left": [[p] for s in SPANS for p in s], "right": [[p] for s in SPANS for p in s][::-1]}
    expected = by_name[order] if isinstance(order, str) else [SPANS[index] for index in order]
    steps = [[mask for mask in filled if mask.step == number] for number in range(1, len(expected) + 1)]
    assert [[mask.position for mask in step] for step in steps] == expected
    check([mask for step in steps for mask in step], one_pass(model, steps, "par"))


def test_autoencoding_fills_all_masks_in_one_step():
    model = model_of().eval()
    filled = fill(model, IDS, SPANS, order="ae", special=SPECIAL, shown=4)
    assert {mask.step for mask in filled} == {1}
    check(filled, one_pass(model, [filled], "ae"))


def test_confidence_order_fills_most_probable_mask_first():
    model = model_of().eval()
    filled = fill(model, IDS, SPANS, order="confidence", special=SPECIAL, shown=4)
    by_step = sorted(filled, key=lambda mask: mask.step)
    assert [mask.step for mask in by_step] == [1, 2, 3, 4, 5, 6]
    at_once = fill(model, IDS, [[2, 3, 4, 7, 9, 10]], order=[0], special=SPECIAL)
    most_probable = max(at_once, key=lambda mask: mask.choices[0][1])
    assert by_step[0].position == most_probable.position
    assert by_step[0].choices[0][0] == most_probable.choices[0][0]
