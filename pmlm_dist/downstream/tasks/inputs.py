"""One or two texts as the network reads them: `[CLS] text [SEP]`, `[CLS] text [SEP] pair [SEP]`.

Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.downstream.tasks.task import Row, TaskBatch
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.transformer import context_inputs
from pmlm_dist.vocab import Vocabulary

_SHOWN = 5
"""Problems of rows that are listed before the rest is counted."""
_PADDED_TO = 8


@dataclass(frozen=True)
class Encoded:
    """Token ids with their special tokens, and how many of them are of the first segment."""

    ids: list[int]
    first: int


def join(parts: Sequence[Sequence[int]], vocabulary: Vocabulary) -> Encoded:
    """`[CLS]`, then each part with `[SEP]` after it."""
    ids = [vocabulary.cls_id]
    for part in parts:
        ids += [*part, vocabulary.sep_id]
    return Encoded(ids, first=len(parts[0]) + 2)


def fit(parts: Sequence[Sequence[int]], *, room: int) -> list[list[int]]:
    """`parts` cut to `room` tokens in all: the longest part (of equals the last) loses tokens at its end first."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        longest = max(range(len(parts)), key=lambda number: (lengths[number], number))
        rest = max([lengths[number] for number in range(len(parts)) if number != longest], default=0)
        lengths[longest] -= max(1, min(sum(lengths) - room, lengths[longest] - rest))
    return [list(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def collate(encoded: Sequence[Encoded], vocabulary: Vocabulary, **labels: Any) -> TaskBatch:
    """Padded at the end to a multiple of 8; `labels` become tensors beside `tokens_BT`, `segments_BT`, `valid_BT`."""
    length = -(-max(len(one.ids) for one in encoded) // _PADDED_TO) * _PADDED_TO
    tokens_BT = torch.full((len(encoded), length), vocabulary.pad_id)
    segments_BT, valid_BT = torch.zeros_like(tokens_BT), torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, one in enumerate(encoded):
        tokens_BT[row, : len(one.ids)] = torch.tensor(one.ids)
        segments_BT[row, one.first : len(one.ids)] = 1
        valid_BT[row, : len(one.ids)] = True
    tensors = {"tokens_BT": tokens_BT, "segments_BT": segments_BT, "valid_BT": valid_BT}
    return TaskBatch(tensors | {name: torch.tensor(values) for name, values in labels.items()}, len(encoded))


def network_inputs(batch: TaskBatch) -> SlotInputs[torch.Tensor]:
    """The model's input for a batch."""
    tensors = batch.tensors
    return context_inputs(tensors["tokens_BT"], segments_BT=tensors["segments_BT"], valid_BT=tensors["valid_BT"])


def longest_input(wanted: int | None, *, default: int, model: ModelConfig) -> int:
    """Tokens of an input: `wanted`, or the default as far as the model has positions. Raises `ConfigError`."""
    if wanted is None:
        return min(default, model.max_positions)
    if not _PADDED_TO <= wanted <= model.max_positions:
        raise ConfigError(
            [f"inputs.max_tokens ({wanted}) must be at least {_PADDED_TO} and at most the model's "
             f"{model.max_positions} positions"]
        )  # fmt: skip
    return wanted


def column(rows: Sequence[Row], wanted: str | None, known: Iterable[str], *, what: str, origin: str) -> str:
    """The column of `rows` that holds `what`: `wanted`, or the first of `known` that is there. Raises `ConfigError`."""
    names = [wanted] if wanted else list(known)
    found = next((name for name in names if name in rows[0]), None)
    if found is None:
        raise ConfigError(
            [f"{origin}: no column {' or '.join(names)} for the {what}, there are {', '.join(map(str, rows[0]))}: "
             f"name it by --inputs.{what}"]
        )  # fmt: skip
    return found


def raise_row_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` for what is wrong with rows: the first few, and how many more there are."""
    more = [f"... and {len(problems) - _SHOWN} more rows"] if len(problems) > _SHOWN else []
    raise_if_any([*problems[:_SHOWN], *more])


def id_of(row: Row, number: int) -> Any:
    """What a row is called: GLUE and SQuAD have `id`, `idx` or `index`; else its number in the split, from 0."""
    return next((row[name] for name in ("id", "idx", "index") if row.get(name) is not None), number)


def text_of(row: Row, name: str, *, where: str, problems: list[str]) -> str:
    """The text in a column; what is no text goes to `problems`."""
    value = row.get(name)
    if isinstance(value, str) and value.strip() and is_unicode(value):
        return value
    problems.append(f"{where}: column {name} holds no text ({value!r})")
    return ""


def is_unicode(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it, as JSON's escapes can give one; no tokenizer reads that."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
