"""Infilling in steps, against one pass over the layout of pre-training with the same order and answers."""

from __future__ import annotations

import pytest
import torch
from support.batches import SPECIAL, VOCABULARY, model_of

from pmlm_dist.decoding.infilling import FilledMask, fill

SPANS = [[2, 3, 4], [7], [9, 10]]
IDS = [SPECIAL.cls, *range(10, 21), SPECIAL.sep]
for _span in SPANS:
    for _place in _span:
        IDS[_place] = SPECIAL.mask


def one_pass(model, steps: list[list[FilledMask]], read: str) -> torch.Tensor:
    """Probabilities [M, V] of the slots of `steps`, each given the answers before, in one forward pass."""
    guesses = [(number, guess) for number, of in enumerate(steps, start=1) for guess in of]
    order = torch.tensor([number for number, _ in guesses])
    places = torch.tensor([guess.position for _, guess in guesses])
    answers = torch.tensor([guess.choices[0][0] for _, guess in guesses])
    context = torch.arange(len(IDS))
    slots = torch.cat([context, places, places])[None]
    with torch.no_grad():
        logits = model(
            torch.cat([torch.tensor(IDS), answers, torch.full_like(answers, SPECIAL.mask)])[None],
            positions_BT=slots,
            segments_BT=torch.zeros_like(slots),
            order_BT=torch.cat([torch.zeros_like(context), order, -order])[None],
            valid_BT=torch.ones_like(slots, dtype=torch.bool),
            predicted_BM=places[None],
            objectives=(read,),
        )[0, :, 0, :VOCABULARY]
    logits[:, list(SPECIAL.special)] = float("-inf")
    return logits.softmax(-1)


def check(guesses: list[FilledMask], expected: torch.Tensor, shown: int = 4):
    for guess, p in zip(guesses, expected, strict=True):
        best = p.topk(shown)
        assert [token for token, _ in guess.choices] == best.indices.tolist()
        assert [value for _, value in guess.choices] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], "left", "right"], ids=str)
def test_steps_equal_one_pass_over_the_layout_of_pre_training(order):
    model = model_of().eval()
    found = fill(model, IDS, SPANS, order=order, special=SPECIAL, shown=4)
    assert [guess.position for guess in found] == [2, 3, 4, 7, 9, 10]
    places = {"left": [[p] for s in SPANS for p in s], "right": [[p] for s in SPANS for p in s][::-1]}
    wanted = places[order] if isinstance(order, str) else [SPANS[number] for number in order]
    steps = [[guess for guess in found if guess.step == number] for number in range(1, len(wanted) + 1)]
    assert [[guess.position for guess in of] for of in steps] == wanted
    check([guess for of in steps for guess in of], one_pass(model, steps, "par"))


def test_autoencoding_reads_all_masks_at_once():
    model = model_of().eval()
    found = fill(model, IDS, SPANS, order="ae", special=SPECIAL, shown=4)
    assert {guess.step for guess in found} == {1}
    check(found, one_pass(model, [found], "ae"))


def test_the_surest_is_filled_first_and_the_rest_is_asked_again():
    model = model_of().eval()
    found = fill(model, IDS, SPANS, order="confidence", special=SPECIAL, shown=4)
    by_step = sorted(found, key=lambda guess: guess.step)
    assert [guess.step for guess in by_step] == [1, 2, 3, 4, 5, 6]
    at_once = fill(model, IDS, [[2, 3, 4, 7, 9, 10]], order=[0], special=SPECIAL)
    surest = max(at_once, key=lambda guess: guess.choices[0][1])
    assert by_step[0].position == surest.position
    assert by_step[0].choices[0][0] == surest.choices[0][0]
