"""Filling masks anywhere in a text, in any order: what pseudo-masked training has taught the network.

    ae              all masks at once, each from the text around alone, read at the [M] slots
    left, right     one mask after the other, from the left or the right
    confidence      one after the other: each time the one that the network is surest of
    spans in order  span after span, all masks of a span at once: the factorization of pre-training (PAR)

But for `ae` the text with its masks is computed once; a step then feeds the tokens decided last (originals of step k)
and pseudo masks for what is asked (step k + 1), at their places in the text (`session.py`).

Legend: S slots of the text, P masks asked in a step, V vocabulary.
"""

from __future__ import annotations

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
    """What was put in a mask: (token id, probability), the likeliest first; the first was taken."""

    position: int
    step: int
    """When it was decided, from 1."""
    choices: tuple[tuple[int, float], ...]


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
    """Fill the masks at the positions `spans` of a text (ids with [CLS] and [SEP]), in the order of the text.

    `order`: a name, or the numbers of the spans (from 0) in the order of filling. Raises `ScoresNotFinite`.
    """
    text = _Text(model, ids, special, shown)
    places = sorted(place for span in spans for place in span)
    if order == "ae":
        found = text.at_once(places)
    elif order == "confidence":
        found = text.surest_first(places)
    elif isinstance(order, str):
        found = text.step_by_step([[place] for place in (places if order == "left" else reversed(places))])
    else:
        found = text.step_by_step([list(spans[number]) for number in order])
    return sorted(found, key=lambda guess: guess.position)


class _Text:
    """A text with masks, and the network that fills them."""

    def __init__(self, model: PseudoMaskedLM, ids: Sequence[int], special: SpecialIds, shown: int):
        self._model, self._special, self._shown = model, special, shown
        self._device = next(model.parameters()).device
        tokens_1S = self._whole([list(ids)])
        slots_1S = torch.arange(len(ids), device=self._device)[None]
        self._context = Context(tokens_1S, slots_1S, torch.zeros_like(tokens_1S), torch.ones_like(tokens_1S).bool())

    def at_once(self, places: list[int]) -> list[FilledMask]:
        """Autoencoding: one pass."""
        context = self._context
        inputs = context_inputs(context.tokens_BS, segments_BT=context.segments_BS, valid_BT=context.valid_BS)
        x_P1E = self._model.encode(inputs)[places]
        logits = gather_logits(self._model.head(x_P1E, self._model.embeddings.token.weight))
        return self._guesses(logits[:, 0], places, step=1)

    def step_by_step(self, steps: list[list[int]]) -> list[FilledMask]:
        """One factorization step after the other."""
        session, found, decided = self._session(sum(map(len, steps))), [], []
        for step, places in enumerate(steps, start=1):
            decided = self._guesses(self._ask(session, decided, places), places, step=step)
            found += decided
        return found

    def surest_first(self, places: list[int]) -> list[FilledMask]:
        """All that are left are asked in each step; the likeliest answer of all is taken."""
        session, found, left = self._session(len(places)), [], list(places)
        while left:
            guesses = self._guesses(self._ask(session, found[-1:], left), left, step=len(found) + 1)
            found.append(max(guesses, key=lambda guess: guess.choices[0][1]))
            left.remove(found[-1].position)
        return found

    def _session(self, masks: int) -> DecodingSession:
        return DecodingSession(self._model, self._context, mask_id=self._special.mask, beams=1, capacity=2 * masks)

    def _ask(self, session: DecodingSession, decided: list[FilledMask], places: list[int]) -> Tensor:
        """Logits [P, V] at `places`, now that `decided` is known."""
        tokens_1A1 = self._whole([[[guess.choices[0][0]] for guess in decided]]).view(1, -1, 1)
        positions_1Q = self._whole([[guess.position for guess in decided] + places])
        return session.step(Appended(tokens_1A1, positions_1Q, torch.zeros_like(positions_1Q)))[0, :, 0]

    def _guesses(self, logits_PV: Tensor, places: list[int], *, step: int) -> list[FilledMask]:
        logits_PV = logits_PV[:, : self._special.vocab_size].float()
        logits_PV[:, list(self._special.special)] = float("-inf")
        p_PN, words_PN = logits_PV.softmax(dim=-1).topk(min(self._shown, logits_PV.shape[1]), dim=-1)
        raise_if_nan(p_PN)
        return [
            FilledMask(place, step, tuple(zip(words, p, strict=True)))
            for place, words, p in zip(places, words_PN.tolist(), p_PN.tolist(), strict=True)
        ]

    def _whole(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)
