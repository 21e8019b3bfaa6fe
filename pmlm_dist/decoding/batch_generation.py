"""Generation for many sources: a decoding session and a search for each batch.

    sources (token ids) --sorted by length, in batches--> DecodingSession --logits--> search --tokens, parents--> ...
                                                                                        |
    hypotheses in the order of the sources <------------------------------------------- done

Done samples are removed once they are half of the batch, so the remaining ones do not compute for them.

Legend: B samples, K beams, S context slots, P pseudo masks, Q originals and pseudo masks of a step, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pmlm_dist.decoding.beam_search import BeamSearch, Hypothesis, Rules
from pmlm_dist.decoding.incremental import Appended, Context, DecodingSession, select_samples
from pmlm_dist.decoding.sampling import Sampling
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.masking.blockwise import SpecialIds
from pmlm_dist.model.transformer import PseudoMaskedLM

Search = BeamSearch | Sampling


def build_search(config: DecodingConfig, special: SpecialIds) -> Search:
    """Build the search of `config`. [SEP] is the end token; the other special tokens are never generated."""
    rules = Rules(config, end_id=special.sep, forbidden=tuple(id for id in special.special if id != special.sep))
    return BeamSearch(rules) if config.method == "beam" else Sampling(rules)


def batches_by_length(lengths: Sequence[int], *, batch: int) -> Iterator[list[int]]:
    """Indices of samples, longest first, at most `batch` at a time."""
    # Similar lengths need little padding, and a batch that does not fit the memory fails first, not after hours.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    yield from (order[start : start + batch] for start in range(0, len(order), batch))


@torch.no_grad()
def generate_batch(
    model: PseudoMaskedLM,
    sources: Sequence[np.ndarray],
    *,
    search: Search,
    special: SpecialIds,
    sample_ids: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Hypotheses for `sources` (ids with [CLS] and [SEP]), best first; an empty list where the rules allow none.

    A source and its longest hypothesis must fit the model's positions. Tensor-parallel peers must pass equal sources
    and get equal results. `sample_ids` seed the draws; None: the indices of the sources. Raises `ScoresNotFinite` for
    NaN logits.
    """
    device = next(model.parameters()).device
    context, starts_B1 = pad_sources(sources, special=special, device=device)
    # Columns for all tokens as originals and for the pseudo mask of a step.
    capacity = search.rules.config.max_length + 1
    session = DecodingSession(model, context, mask_id=special.mask, beams=search.beams, capacity=capacity)
    sampling = {"sample_ids": sample_ids} if isinstance(search, Sampling) else {}
    state: Any = search.start(len(sources), device=device, **sampling)
    rows, results = torch.arange(len(sources), device=device), [[] for _ in sources]
    for step in range(search.rules.config.max_length):
        logits_BKV = session.step(_next_input(state, starts_B1, step))[:, 0]
        state = search.advance(state, logits_BKV)
        # At half of the batch, not for each sample: `select` copies the cache.
        if int(state.done_B.sum()) * 2 >= len(rows):
            for row, hypotheses in _done(search, state, rows):
                results[row] = hypotheses
            remaining = (~state.done_B).nonzero()[:, 0]
            if len(remaining) == 0:
                break
            session.select(remaining)
            state, rows, starts_B1 = select_samples(state, remaining), rows[remaining], starts_B1[remaining]
    return results


def pad_sources(
    sources: Sequence[np.ndarray], *, special: SpecialIds, device: torch.device | str = "cpu"
) -> tuple[Context, torch.Tensor]:
    """Sources padded on the right, and the position [B, 1] of the first generated token of each."""
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


def _next_input(state: Any, starts_B1: torch.Tensor, step: int) -> Appended:
    """The last tokens and the pseudo masks of `step`, counted from 0, at their positions."""
    last_B1K = state.tokens_BKL[:, None, :, -1] if step else state.tokens_BKL.new_empty(len(starts_B1), 0, 1)
    offsets_Q = torch.arange(step - 1 if step else 0, step + 1, device=starts_B1.device)
    positions_BQ = starts_B1 + offsets_Q
    return Appended(last_B1K, positions_BQ, torch.ones_like(positions_BQ), state.parents_BK if step else None)


def _done(search: Search, state: Any, rows: torch.Tensor) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Row and hypotheses of each sample that is done."""
    results = search.hypotheses(state)
    for row, done, hypotheses in zip(rows.tolist(), state.done_B.tolist(), results, strict=True):
        if done:
            yield row, hypotheses
