"""Rows of a data set: dictionaries by column, whatever holds them.

    FOLDER/train.jsonl | .csv | .tsv | .json         files, a split each (`dev` and `validation` are the same)
    FOLDER/dataset_dict.json                         what Hugging Face `datasets` saved
    NAME or NAME:CONFIG                              a data set of the Hugging Face hub (extra `datasets`), or a folder
                                                     that its repository was copied to

CSV and TSV have a line of column names; TSV is read as GLUE writes it, without quoting, and CoLA's, which has no names,
gets them. `.json` is SQuAD's own nesting, one row a question. Hugging Face class labels become their names.
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
"""Columns of CoLA's files, which do not name them."""
_NO_LABEL = -1
"""How Hugging Face marks a class label that is kept secret."""


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of `split` at `source`, in their order. Raises `ConfigError` when there is none, or they are no rows."""
    if not split or Path(split).name != split:
        raise ConfigError([f"a split ({split}) is a name, not a path: put its file into {source} and name that"])
    folder = Path(source)
    if not folder.exists() or _is_repository(folder):
        rows = _read_hub(source, split)
    elif (folder / "dataset_dict.json").is_file() or (folder / split / "dataset_info.json").is_file():
        rows = _read_saved(folder, split)
    elif folder.is_dir():
        rows = read_file(_find(folder, split))
    else:
        raise ConfigError([f"--data ({source}) is a file: give the folder that holds {split}.jsonl and the others"])
    if not rows:
        raise ConfigError([f"the split {split} of {source} is empty"])
    return rows


# --------------------------------------------------------------------------------------------------------------- files


def _find(folder: Path, split: str) -> Path:
    names = [f"{name}{suffix}" for name in (split, *_OTHER_NAMES.get(split, ())) for suffix in _SUFFIXES]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ConfigError([f"{folder} holds the split {split} more than once: {', '.join(p.name for p in found)}"])
    if not found:
        here = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            [f"{folder} has no split {split}: it should hold {split}.jsonl, .csv or .tsv; it holds {here}"]
        )
    return found[0]


def read_file(path: Path) -> list[dict[str, Any]]:
    """All rows of one file. Raises `ConfigError` when it cannot be read as what its suffix says."""
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
    csv.field_size_limit(2**31 - 1)  # a field is a text, and texts are long
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(file)
        names = next(lines, None)
        if names is None:
            return
        if is_tsv and len(names) == len(_COLA) and names[1] in ("0", "1"):
            yield dict(zip(_COLA, names, strict=True))
            names = list(_COLA)
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ConfigError([f"{path}, line 1: more than one column is called {', '.join(map(repr, twice))}"])
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
                    answers = question.get("answers", [])
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {name: [answer[name] for answer in answers] for name in ("text", "answer_start")},
                    }
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} is not in SQuAD's form: {error!r}"]) from error


# ------------------------------------------------------------------------------------------------ Hugging Face datasets


def _is_repository(folder: Path) -> bool:
    """Whether `folder` is a copy of a hub's repository: its README.md begins with what `datasets` reads."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes()[:3] == b"---"


def _read_saved(folder: Path, split: str) -> list[dict[str, Any]]:
    datasets = _library(str(folder))
    return _plain(_chosen(datasets.load_from_disk(str(folder)), split, source=str(folder)))


def _read_hub(source: str, split: str) -> list[dict[str, Any]]:
    datasets = _library(source)
    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:  # what the library raises for anything from no network to no such name
        raise ConfigError(
            [f"--data ({source}) is no folder here, and the Hugging Face hub does not give it: {_first_line(error)}"]
        ) from error
    return _plain(_chosen(found, split, source=source))


def _chosen(found: Any, split: str, *, source: str) -> Any:
    if split not in found:
        raise ConfigError([f"{source} has no split {split}: it has {', '.join(map(str, found))}"])
    return found[split]


def _plain(table: Any) -> list[dict[str, Any]]:
    """Rows with class labels by name; None where they are kept secret."""
    names = {column: feature.names for column, feature in table.features.items() if hasattr(feature, "int2str")}

    def named(column: str, value: Any) -> Any:
        if column not in names or value is None:
            return value
        return None if value == _NO_LABEL else names[column][value]

    return [{column: named(column, value) for column, value in row.items()} for row in table]


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            [
                f"--data ({source}) is no folder of files, and to read anything else needs "
                "`pip install pmlm_dist[datasets]`"
            ]
        ) from error
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
