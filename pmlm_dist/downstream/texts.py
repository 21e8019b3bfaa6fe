"""Files of texts for `pmlm score` and `pmlm embed`: ids, texts, token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.downstream.rows import read_file
from pmlm_dist.downstream.tasks.inputs import find_column, raise_row_problems, row_id, row_text

COLUMNS = ("text", "sentence")


def read_texts(file: Path, column: str | None) -> tuple[list[Any], list[str]]:
    """Return ids and texts of a .txt file with a text a line, or of rows: .jsonl, .csv, .tsv. Raises `ConfigError`."""
    if not file.is_file():
        raise ConfigError([f"{file}: no such file"])
    if file.suffix == ".txt":
        column, rows = "text", _lines(file)
    else:
        rows = read_file(file)
    raise_if_any([] if rows else [f"{file} holds no text"])
    column = find_column(rows, column, COLUMNS, role="text", origin=str(file), option="--column")
    problems: list[str] = []
    texts, ids = [], []
    for number, row in enumerate(rows):
        location = f"{file}, text {number + 1}"
        texts.append(row_text(row, column, location=location, problems=problems))
        ids.append(row_id(row, number, location=location, problems=problems))
    raise_row_problems(problems)
    return ids, texts


def encode_texts(texts: Sequence[str], pretrained: PretrainedWeights, *, origin: str) -> list[list[int]]:
    """Return token ids without special tokens. Raises `ConfigError` for texts without tokens or too long ones."""
    room, encoded = pretrained.model.max_positions - 2, pretrained.vocabulary.encode_batch(texts)
    raise_row_problems(
        [
            f"{origin}, text {number} ({text[:40]!r}): it has {len(ids):,} tokens, and the model takes 1 to {room}: "
            f"{'split' if ids else 'remove'} it"
            for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), start=1)
            if not 1 <= len(ids) <= room
        ]
    )
    return [list(ids) for ids in encoded]


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:  # a line ends at a line feed alone
            return [{"text": line.rstrip("\r\n")} for line in lines if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError([f"{file} cannot be read: {error}"]) from error
