"""Model inputs of one text or a pair, `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`, and checks of dataset rows.

Legend: B batch, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.downstream.tasks.task import Row, TaskBatch
from pmlm_dist.files import json_line
from pmlm_dist.json_input import is_unicode
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.model.transformer import context_inputs
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_MAX_LISTED = 5
"""Row problems listed in an error message; the others are counted."""
_LENGTH_MULTIPLE = 8


@dataclass(frozen=True)
class EncodedInput:
    """Token ids with special tokens; the first `first` of them belong to segment 0, the others to segment 1."""

    ids: list[int]
    first: int


def join(parts: Sequence[Sequence[int]], vocabulary: Vocabulary) -> EncodedInput:
    """Return `[CLS]`, then each part followed by `[SEP]`."""
    ids = [vocabulary.cls_id]
    for part in parts:
        ids += [*part, vocabulary.sep_id]
    return EncodedInput(ids, first=len(parts[0]) + 2)


def truncate(parts: Sequence[Sequence[int]], *, room: int) -> list[list[int]]:
    """Truncate `parts` to `room` tokens in total: the longest part (the last of equals) loses tokens at its end first.

    Equal to the usual token-by-token loop, but removes all tokens of a part in one step.
    """
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        longest = max(range(len(parts)), key=lambda number: (lengths[number], number))
        rest = max([lengths[number] for number in range(len(parts)) if number != longest], default=0)
        lengths[longest] -= max(1, min(sum(lengths) - room, lengths[longest] - rest))
    return [list(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def collate(encoded: Sequence[EncodedInput], vocabulary: Vocabulary, **labels: Any) -> TaskBatch:
    """Pad to a multiple of 8; `labels` become tensors beside `tokens_BT`, `segments_BT`, `valid_BT`."""
    length = -(-max(len(one.ids) for one in encoded) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    tokens_BT = torch.full((len(encoded), length), vocabulary.pad_id)
    segments_BT, valid_BT = torch.zeros_like(tokens_BT), torch.zeros_like(tokens_BT, dtype=torch.bool)
    for row, one in enumerate(encoded):
        tokens_BT[row, : len(one.ids)] = torch.tensor(one.ids)
        segments_BT[row, one.first : len(one.ids)] = 1
        valid_BT[row, : len(one.ids)] = True
    tensors = {"tokens_BT": tokens_BT, "segments_BT": segments_BT, "valid_BT": valid_BT}
    return TaskBatch(tensors | {name: torch.tensor(values) for name, values in labels.items()}, len(encoded))


def model_inputs(batch: TaskBatch) -> SlotInputs[torch.Tensor]:
    """Return the model's input for `batch`: context slots only."""
    tensors = batch.tensors
    return context_inputs(tensors["tokens_BT"], segments_BT=tensors["segments_BT"], valid_BT=tensors["valid_BT"])


def max_input_tokens(value: int | None, *, default: int, model: ModelConfig) -> int:
    """Return `value` (`inputs.max_tokens`), or `default` limited to the model's positions. Raises `ConfigError`."""
    if value is None:
        return min(default, model.max_positions)
    if not _LENGTH_MULTIPLE <= value <= model.max_positions:
        raise ConfigError(
            [f"inputs.max_tokens ({value}) must be at least {_LENGTH_MULTIPLE} and at most the model's "
             f"{model.max_positions} positions"]
        )  # fmt: skip
    return value


def find_column(
    rows: Sequence[Row], name: str | None, known: Iterable[str], *, role: str, origin: str, option: str | None = None
) -> str:
    """Return `name`, or the first column of `known` in `rows`. Raises `ConfigError` if there is none.

    For the error message: `role` (text, pair, label) and the `option` that sets `name`; None: `--inputs.ROLE`.
    """
    candidates = [name] if name else list(known)
    column = next((candidate for candidate in candidates if candidate in rows[0]), None)
    if column is None:
        raise ConfigError(
            [f"{origin}: no column {' or '.join(candidates)} for the {role}, there are "
             f"{', '.join(map(str, rows[0]))}: name it by {option or f'--inputs.{role}'}"]
        )  # fmt: skip
    return column


class ValidRow(NamedTuple):
    """A row of a data set with its texts."""

    values: Row
    id: Any
    texts: tuple[str, ...]
    location: str
    """For messages."""
    problems: list[str]
    """Problems of the rows so far; what the caller adds is raised with them."""


def valid_rows(rows: Sequence[Row], texts: Sequence[str], *, label: str | None, origin: str) -> Iterator[ValidRow]:
    """Yield each row with the contents of its columns `texts`; after the last one, raise the problems of all.

    Raises `ConfigError`, first for columns that are missing, among them `label` unless that is None.
    """
    columns = [*texts, *([label] if label else [])]
    missing = [name for name in columns if name not in rows[0]]
    raise_if_any([f"{origin}: no column {name}, there are {', '.join(rows[0])}" for name in missing])
    problems: list[str] = []
    for number, row in enumerate(rows):
        location = f"{origin}, row {number + 1}"
        contents = tuple(row_text(row, column, location=location, problems=problems) for column in texts)
        row_number = row_id(row, number, location=location, problems=problems)
        yield ValidRow(row, row_number, contents, location, problems)
    raise_row_problems(problems)


def raise_row_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` with the first few `problems` and the number of the others."""
    more = [f"... and {len(problems) - _MAX_LISTED} more rows"] if len(problems) > _MAX_LISTED else []
    raise_if_any([*problems[:_MAX_LISTED], *more])


def row_id(row: Row, number: int, *, location: str, problems: list[str]) -> Any:
    """Return the id of a row: `id`, `idx` or `index` (GLUE, SQuAD), else its number in the split, from 0.

    An id that is no JSON value, and could not be written with its prediction, is added to `problems`.
    """
    value = next((row[name] for name in ("id", "idx", "index") if row.get(name) is not None), number)
    try:
        json_line(value)
    except (TypeError, ValueError, RecursionError) as error:
        problems.append(f"{location}: its id cannot be written as JSON: {error}")
    return value


def row_text(row: Row, column: str, *, location: str, problems: list[str]) -> str:
    """Return the text in a column; a missing, empty or undecodable text is added to `problems`."""
    value = row.get(column)
    if isinstance(value, str) and value.strip() and is_unicode(value):
        return value
    problems.append(f"{location}: column {column} holds no text ({value!r})")
    return ""
