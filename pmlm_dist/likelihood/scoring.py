"""Log-likelihoods of texts: exact from left to right, or pseudo-log-likelihoods from masked tokens.

    par        sum of log p(x_i | x_1 .. x_(i-1)): every token is a step of its own, at its pseudo mask
               [CLS] | x_1 .. x_n | pseudo masks of x_1 .. x_n          one row of 2n + 1 slots, the layout of decoding
    pll        sum of log p(x_i | the other tokens): each token masked alone (Salazar et al., 2020)
    pll-word   the same, with the later pieces of x_i's word masked too (Kauf and Ivanova, 2023): pieces of a word give
               one another away
               [CLS] x_1 .. [MASK] .. x_n [SEP]                         n rows of n + 2 slots

`par` needs a model that was trained with PAR or AR, the others one that was trained with AE. [SEP] is not scored.

Legend: B rows of a forward pass, S context slots, M predictions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pmlm_dist.masking.layout import Layout, SlotInputs, empty_layout
from pmlm_dist.masking.seq2seq_layout import fill_pair
from pmlm_dist.vocabulary.files import CONTINUATION
from pmlm_dist.vocabulary.vocabulary import Vocabulary

Method = Literal["par", "pll", "pll-word"]
METHODS: tuple[Method, ...] = ("par", "pll", "pll-word")


@dataclass(frozen=True)
class _Row:
    """A row of a forward pass: tokens `first` .. `first + count` of a text are predicted."""

    text: int
    first: int
    count: int
    masked: slice
    """Tokens that are [MASK] in the context; with `par` the context has none of the text."""


@torch.no_grad()
def score_texts(
    model: torch.nn.Module, texts: Sequence[Sequence[int]], *, method: Method, vocabulary: Vocabulary, slots: int
) -> list[list[float]]:
    """Return the log-probability, in nats, of every token of `texts` (ids without special tokens, at least one each).

    `model` is in evaluation mode; texts and two special tokens must fit its positions. `slots`: slots of a forward
    pass, or a single row. Tensor-parallel peers must pass equal texts and get equal results.
    """
    device, scores = next(model.parameters()).device, [[0.0] * len(text) for text in texts]
    rows = [row for number, text in enumerate(texts) for row in _rows(number, text, method, vocabulary)]
    for batch in _batches(rows, texts, method, slots):
        layout = _lay_out([(texts[row.text], row) for row in batch], method, vocabulary)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in layout._asdict().items()}
        objectives = ("par",) if method == "par" else ("ae",)
        nll_1MB, _ = model(inputs=SlotInputs.of(tensors), targets_BM=tensors["targets_BM"], objectives=objectives)
        for row, nll_M in zip(batch, nll_1MB[0].t().tolist(), strict=True):
            scores[row.text][row.first : row.first + row.count] = [-nll for nll in nll_M[: row.count]]
    return scores


def num_slots(length: int, method: Method) -> int:
    """Return the slots of all rows of a text of `length` tokens."""
    return 1 + 2 * length if method == "par" else length * (length + 2)


def batches_of_texts(lengths: Sequence[int], method: Method, *, slots: int) -> list[list[int]]:
    """Group texts, longest first, so that the rows of a group have at most `slots` slots; a longer text is alone."""
    groups: list[list[int]] = []
    used = slots
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        needed = num_slots(lengths[number], method)
        if used + needed > slots:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += needed
    return groups


def _rows(number: int, text: Sequence[int], method: Method, vocabulary: Vocabulary) -> Iterator[_Row]:
    if method == "par":
        yield _Row(number, 0, len(text), slice(0, 0))
        return
    end = len(text)
    for token in range(len(text) - 1, -1, -1):
        yield _Row(number, token, 1, slice(token, end if method == "pll-word" else token + 1))
        if not vocabulary.tokens[text[token]].startswith(CONTINUATION):
            end = token  # of the word before


def _batches(
    rows: Sequence[_Row], texts: Sequence[Sequence[int]], method: Method, slots: int
) -> Iterator[Sequence[_Row]]:
    """Split `rows`, which are sorted by the length of their texts, into forward passes of at most `slots` slots."""
    ordered = sorted(rows, key=lambda row: -len(texts[row.text]))
    start = 0
    while start < len(ordered):
        length = len(texts[ordered[start].text])
        count = max(1, slots // (num_slots(length, method) // (1 if method == "par" else length)))
        yield ordered[start : start + count]
        start += count


def _lay_out(rows: Sequence[tuple[Sequence[int], _Row]], method: Method, vocabulary: Vocabulary) -> Layout:
    longest = max(len(text) for text, _ in rows)
    context, predictions = (1, longest) if method == "par" else (longest + 2, 1)
    layout = empty_layout(len(rows), sequence_length=context, num_predictions=predictions, pad_id=vocabulary.pad_id)
    for number, (text, row) in enumerate(rows):
        ids = np.array(text, dtype=np.int64)
        if method == "par":
            start, pseudo = np.array([vocabulary.cls_id]), np.full_like(ids, vocabulary.mask_id)
            fill_pair(layout, number, start, ids, shown=ids, pseudo=pseudo, segment=0)
            continue
        shown = ids.copy()
        shown[row.masked] = vocabulary.mask_id
        layout.tokens_BT[number, : len(ids) + 2] = [vocabulary.cls_id, *shown, vocabulary.sep_id]
        layout.valid_BT[number, : len(ids) + 2] = True
        layout.predicted_BM[number, 0] = 1 + row.first
        layout.targets_BM[number, 0] = ids[row.first]
    return layout
