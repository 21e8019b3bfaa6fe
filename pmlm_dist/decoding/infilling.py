"""Infilling: fill masks anywhere in a text, in any order.

    ae              all masks at once, each from the surrounding text alone, predicted at the [M] slots
    left, right     one mask after the other, from the left or the right
    confidence      one after the other, each time the mask with the most probable prediction
    spans in order  span after span, all masks of a span at once: the factorization of pre-training (PAR)

Except for `ae`, the text with its masks is computed once as context. Each step then feeds the tokens chosen last
(originals of step k) and pseudo masks for the next ones (step k + 1), at their positions in the text
(`incremental.py`).

Legend: S slots of the text, A originals and P pseudo masks of a step, Q = A + P, N choices, E hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmlm_dist.decoding.beam_search import raise_if_nan
from pmlm_dist.decoding.incremental import Appended, Context, DecodingSession
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.model.transformer import PseudoMaskedLM, context_inputs
from pmlm_dist.parallel.cross_entropy import gather_logits

Order = Literal["ae", "left", "right", "confidence"]


@dataclass(frozen=True)
class FilledMask:
    """Prediction for one mask."""

    position: int
    step: int
    """Step in which the mask was filled, from 1."""
    choices: tuple[tuple[int, float], ...]
    """(token id, probability), most likely first; the first one fills the mask."""


@torch.no_grad()
def fill(
    model: PseudoMaskedLM,
    ids: Sequence[int],
    spans: Sequence[Sequence[int]],
    *,
    order: Order | Sequence[int],
    special: SpecialIds,
    shown: int = 5,
) -> list[FilledMask]:
    """Fill the masks at the positions `spans` of a text (ids with [CLS] and [SEP]); `shown` choices for each mask.

    `order`: a name, or the indices of the spans in the order of filling. The result is in the order of the text. Raises
    `ScoresNotFinite` for NaN logits.
    """
    text = _MaskedText(model, ids, special, shown)
    positions = sorted(position for span in spans for position in span)
    if order == "ae":
        filled = text.at_once(positions)
    elif order == "confidence":
        filled = text.by_confidence(positions)
    elif isinstance(order, str):
        filled = text.step_by_step([[one] for one in (positions if order == "left" else reversed(positions))])
    else:
        filled = text.step_by_step([list(spans[index]) for index in order])
    return sorted(filled, key=lambda mask: mask.position)


class _MaskedText:
    """A text with masks and the model that fills them."""

    def __init__(self, model: PseudoMaskedLM, ids: Sequence[int], special: SpecialIds, shown: int):
        self._model, self._special, self._shown = model, special, shown
        self._device = next(model.parameters()).device
        tokens_1S = self._integers([list(ids)])
        slots_1S = torch.arange(len(ids), device=self._device)[None]
        self._context = Context(tokens_1S, slots_1S, torch.zeros_like(tokens_1S), torch.ones_like(tokens_1S).bool())

    def at_once(self, positions: list[int]) -> list[FilledMask]:
        context = self._context
        inputs = context_inputs(context.tokens_BS, segments_BT=context.segments_BS, valid_BT=context.valid_BS)
        x_P1E = self._model.encode(inputs)[positions]
        logits = gather_logits(self._model.head(x_P1E, self._model.embeddings.token.weight))
        return self._choices(logits[:, 0], positions, step=1)

    def step_by_step(self, steps: list[list[int]]) -> list[FilledMask]:
        session, filled, last = self._session(sum(map(len, steps))), [], []
        for step, positions in enumerate(steps, start=1):
            last = self._choices(self._logits(session, last, positions), positions, step=step)
            filled += last
        return filled

    def by_confidence(self, positions: list[int]) -> list[FilledMask]:
        """Predict all remaining masks in each step and fill the one with the highest probability."""
        session, filled, remaining = self._session(len(positions)), [], list(positions)
        while remaining:
            step = len(filled) + 1
            masks = self._choices(self._logits(session, filled[-1:], remaining), remaining, step=step)
            filled.append(max(masks, key=lambda mask: mask.choices[0][1]))
            remaining.remove(filled[-1].position)
        return filled

    def _session(self, masks: int) -> DecodingSession:
        # An upper bound: every mask needs a column as pseudo mask and one as original.
        return DecodingSession(self._model, self._context, mask_id=self._special.mask, beams=1, capacity=2 * masks)

    def _logits(self, session: DecodingSession, last: list[FilledMask], positions: list[int]) -> Tensor:
        """Logits [P, V] at `positions`, given the masks filled in the `last` step."""
        tokens_1A1 = self._integers([[[mask.choices[0][0]] for mask in last]]).view(1, -1, 1)
        positions_1Q = self._integers([[mask.position for mask in last] + positions])
        return session.step(Appended(tokens_1A1, positions_1Q, torch.zeros_like(positions_1Q)))[0, :, 0]

    def _choices(self, logits_PV: Tensor, positions: list[int], *, step: int) -> list[FilledMask]:
        logits_PV = logits_PV[:, : self._special.vocab_size].float()
        logits_PV[:, list(self._special.special)] = float("-inf")  # a special token is no text
        p_PN, tokens_PN = logits_PV.softmax(dim=-1).topk(min(self._shown, logits_PV.shape[1]), dim=-1)
        raise_if_nan(p_PN)
        return [
            FilledMask(position, step, tuple(zip(tokens, p, strict=True)))
            for position, tokens, p in zip(positions, tokens_PN.tolist(), p_PN.tolist(), strict=True)
        ]

    def _integers(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
