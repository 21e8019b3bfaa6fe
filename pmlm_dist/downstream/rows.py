"""Dataset rows: dictionaries by column, from files, saved Hugging Face datasets or the Hugging Face hub.

    FOLDER/train.jsonl | .csv | .tsv | .json         one file per split (`dev` is a synonym of `validation`)
    FOLDER/dataset_dict.json                         written by `save_to_disk` of Hugging Face `datasets`
    NAME or NAME:CONFIG                              a data set of the Hugging Face hub (extra `datasets`), or a folder
                                                     with a copy of its repository

CSV and TSV start with a line of column names. TSV is read without quoting, as GLUE's files are written; CoLA's files
have no column names and get `_COLA`. `.json` is SQuAD's nested format: one row per question. Hugging Face class labels
are replaced by their names.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
_OTHER_NAMES = {
    "train": ("train-v1.1", "train-v2.0"),
    "validation": ("dev", "dev-v1.1", "dev-v2.0"),
    "validation_matched": ("dev_matched",),
    "validation_mismatched": ("dev_mismatched",),
}
_COLA = ("source", "label", "note", "sentence")
"""Columns of CoLA's files, which have no header."""
_NO_LABEL = -1
"""Class label of hidden test sets in Hugging Face data sets."""


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Return all rows of `split` at `source` in order. Raises `ConfigError` if it is missing, empty or invalid."""
    if not split or Path(split).name != split:
        raise ConfigError([f"a split ({split}) is a name, not a path: put its file into {source} and give its name"])
    folder = Path(source)
    if not folder.exists() or _is_repository(folder):
        rows = _read_hub(source, split)
    elif (folder / "dataset_dict.json").is_file() or (folder / split / "dataset_info.json").is_file():
        rows = _read_saved(folder, split)
    elif folder.is_dir():
        rows = read_file(_split_file(folder, split))
    else:
        raise ConfigError([f"--data ({source}) is a file: give the folder that holds {split}.jsonl and the others"])
    if not rows:
        raise ConfigError([f"the split {split} of {source} is empty"])
    return rows


# --------------------------------------------------------------------------------------------------------------- files


def _split_file(folder: Path, split: str) -> Path:
    names = [f"{name}{suffix}" for name in (split, *_OTHER_NAMES.get(split, ())) for suffix in _SUFFIXES]
    files = [folder / name for name in names if (folder / name).is_file()]
    if len(files) > 1:
        raise ConfigError([f"{folder} has the split {split} more than once: {', '.join(p.name for p in files)}"])
    if not files:
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            [f"{folder} has no split {split}: it should contain {split}.jsonl, .csv or .tsv; it contains {content}"]
        )
    return files[0]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Return all rows of one file; its suffix names the format. Raises `ConfigError` for an invalid file."""
    try:
        if path.suffix == ".jsonl":
            return list(_json_lines(path))
        if path.suffix == ".json":
            return list(_squad_questions(path))
        return list(_table(path))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError([f"{path}, line {number}: not JSON ({error})"]) from error
            if not isinstance(row, dict):
                raise ConfigError([f"{path}, line {number}: not a JSON object"])
            yield row


def _table(path: Path) -> Iterator[dict[str, Any]]:
    is_tsv = path.suffix == ".tsv"
    csv.field_size_limit(2**31 - 1)  # passages exceed the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(file)
        names = next(lines, None)
        if names is None:
            return
        if is_tsv and len(names) == len(_COLA) and names[1] in ("0", "1"):
            yield dict(zip(_COLA, names, strict=True))
            names = list(_COLA)
        duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
        if duplicates:
            raise ConfigError([f"{path}, line 1: more than one column is called {', '.join(map(repr, duplicates))}"])
        for row in filter(None, lines):
            if len(row) != len(names):
                raise ConfigError([f"{path}, line {lines.line_num}: {len(row)} columns instead of {len(names)}"])
            yield dict(zip(names, row, strict=True))


def _squad_questions(path: Path) -> Iterator[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = question.get("answers")  # None: a test file without labels
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": None
                        if answers is None
                        else {name: [answer[name] for answer in answers] for name in ("text", "answer_start")},
                    }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} is not in SQuAD's format: {error!r}"]) from error


# ------------------------------------------------------------------------------------------------ Hugging Face datasets


def _is_repository(folder: Path) -> bool:
    """Return True for a copy of a hub repository: its README.md starts with the YAML header that `datasets` reads."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes()[:3] == b"---"


def _read_saved(folder: Path, split: str) -> list[dict[str, Any]]:
    datasets = _library(str(folder))
    return _plain_rows(_select(datasets.load_from_disk(str(folder)), split, source=str(folder)))


def _read_hub(source: str, split: str) -> list[dict[str, Any]]:
    datasets = _library(source)
    name, _, config = source.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:  # the library raises them for a missing network and an unknown name alike
        raise ConfigError(
            [f"--data ({source}) is not a folder here, and loading it from the Hugging Face hub failed: "
             f"{_first_line(error)}"]
        ) from error  # fmt: skip
    return _plain_rows(_select(splits, split, source=source))


def _select(splits: Any, split: str, *, source: str) -> Any:
    if split not in splits:
        raise ConfigError([f"{source} has no split {split}: it has {', '.join(map(str, splits))}"])
    return splits[split]


def _plain_rows(table: Any) -> list[dict[str, Any]]:
    """Convert to dictionaries, with class labels by name; None for hidden labels."""
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "int2str")}

    def with_name(column: str, value: Any) -> Any:
        if column not in names or value is None:
            return value
        return None if value == _NO_LABEL else names[column][value]

    return [{column: with_name(column, value) for column, value in row.items()} for row in table]


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            [f"--data ({source}) is not a folder of split files; other sources need `pip install pmlm_dist[datasets]`"]
        ) from error
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
