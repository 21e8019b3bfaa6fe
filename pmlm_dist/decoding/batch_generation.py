"""Writing an answer to each source: sessions, searches and batches put together.

    sources (token ids) --sorted by length, in batches--> Session --logits--> search --tokens, parents--> Session ...
                                                                                |
    answers in the order of the sources <-----------------------------------hypotheses

A sample that is done leaves the batch when half of those in it are done, so late ones do not pay for early ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pmlm_dist.decoding.beam_search import BeamSearch, Hypothesis, Rules
from pmlm_dist.decoding.incremental import Appended, Context, DecodingSession
from pmlm_dist.decoding.sampling import Sampling
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.model.transformer import PseudoMaskedLM

Search = BeamSearch | Sampling


def search_of(config: DecodingConfig, special: SpecialIds) -> Search:
    """The search that `config` describes; special tokens other than [SEP], which ends, are never written."""
    rules = Rules(
        end_id=special.sep,
        max_length=config.max_length,
        min_length=config.min_length,
        no_repeat_ngram=config.no_repeat_ngram,
        forbidden=tuple(id for id in special.special if id != special.sep),
    )
    if config.method == "beam":
        return BeamSearch(
            rules, config.beam, config.length_penalty, stop=config.stop, returned=config.num_return_sequences
        )
    temperature = 0.0 if config.method == "greedy" else config.temperature
    return Sampling(rules, temperature, config.top_k, config.top_p, config.seed)


def generate_batches(
    model: PseudoMaskedLM,
    sources: Sequence[np.ndarray],
    *,
    search: Search,
    special: SpecialIds,
    batch: int = 16,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Answers to `sources` (ids with [CLS] and [SEP]), best first; none where the rules allow no answer.

    A source and its longest answer must fit the model's positions. Tensor-parallel peers call with the same sources and
    get the same answers. `numbers` decide what is drawn for them; None: their places. Raises `ScoresNotFinite` when the
    model answers with NaN.
    """
    answers: list[list[Hypothesis]] = [[] for _ in sources]
    numbers = range(len(sources)) if numbers is None else numbers
    for places in batches_by_length([len(source) for source in sources], batch=batch):
        own = [sources[place] for place in places]
        drawn = [numbers[place] for place in places]
        found = generate_batch(model, own, search=search, special=special, numbers=drawn)
        for place, hypotheses in zip(places, found, strict=True):
            answers[place] = hypotheses
    return answers


def batches_by_length(lengths: Sequence[int], *, batch: int) -> Iterator[list[int]]:
    """Numbers of samples, longest first, at most `batch` at a time."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    yield from (order[start : start + batch] for start in range(0, len(order), batch))


@torch.no_grad()
def generate_batch(
    model: PseudoMaskedLM,
    sources: Sequence[np.ndarray],
    *,
    search: Search,
    special: SpecialIds,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Answers to `sources` in one batch; `numbers` decide what is drawn for them."""
    device = next(model.parameters()).device
    context, starts_B1 = context_of(sources, special=special, device=device)
    capacity = search.rules.max_length + 1
    session = DecodingSession(model, context, mask_id=special.mask, beams=search.beams, capacity=capacity)
    drawing = {"numbers": numbers} if isinstance(search, Sampling) else {}
    state: Any = search.start(len(sources), device=device, **drawing)
    rows, answers = torch.arange(len(sources), device=device), [[] for _ in sources]
    for step in range(search.rules.max_length):
        logits_BKV = session.step(_next(state, starts_B1, step))[:, 0]
        state = search.advance(state, logits_BKV)
        if int(state.done_B.sum()) * 2 >= len(rows):
            for row, hypotheses in _done(search, state, rows):
                answers[row] = hypotheses
            going_on = (~state.done_B).nonzero()[:, 0]
            if len(going_on) == 0:
                break
            session.keep(going_on)
            state, rows, starts_B1 = state.keep(going_on), rows[going_on], starts_B1[going_on]
    return answers


def context_of(
    sources: Sequence[np.ndarray], *, special: SpecialIds, device: torch.device | str = "cpu"
) -> tuple[Context, torch.Tensor]:
    """Sources padded on the right, and the position [B, 1] at which each answer starts."""
    lengths_B = torch.tensor([len(source) for source in sources])
    tokens_BS = torch.full((len(sources), int(lengths_B.max())), special.pad)
    for row, source in enumerate(sources):
        tokens_BS[row, : len(source)] = torch.from_numpy(np.asarray(source, dtype=np.int64))
    slots_S = torch.arange(tokens_BS.shape[1])
    context = Context(
        tokens_BS.to(device),
        slots_S.expand_as(tokens_BS).to(device),
        torch.zeros_like(tokens_BS).to(device),
        (slots_S < lengths_B[:, None]).to(device),
    )
    return context, lengths_B[:, None].to(device)


def _next(state: Any, starts_B1: torch.Tensor, step: int) -> Appended:
    """The last tokens and the pseudo masks of `step`, counted from 0, at their places."""
    last_B1K = state.tokens_BKL[:, None, :, -1] if step else state.tokens_BKL.new_empty(len(starts_B1), 0, 1)
    places = torch.arange(step - 1 if step else 0, step + 1, device=starts_B1.device)
    positions_BQ = starts_B1 + places
    return Appended(last_B1K, positions_BQ, torch.ones_like(positions_BQ), state.parents_BK if step else None)


def _done(search: Search, state: Any, rows: torch.Tensor) -> Iterator[tuple[int, list[Hypothesis]]]:
    answers = search.hypotheses(state)
    for row, done, hypotheses in zip(rows.tolist(), state.done_B.tolist(), answers, strict=True):
        if done:
            yield row, hypotheses
