"""Dataset rows: dictionaries by column, from files, saved Hugging Face datasets or the Hugging Face hub.

    FOLDER/train.jsonl | .csv | .tsv | .json         one file per split (`dev` is a synonym of `validation`)
    FOLDER/dataset_dict.json                         written by `save_to_disk` of Hugging Face `datasets`
    NAME or NAME:CONFIG                              a data set of the Hugging Face hub (extra `datasets`), or a folder
                                                     with a copy of its repository

CSV and TSV start with a line of column names. TSV is read without quoting, as GLUE's files are written: they have
irregular lines, which are skipped and counted in one line. `.json` is SQuAD's nested format: one row per question.
Hugging Face class labels are replaced by their names.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError
from pmlm_dist.console import print_safely
from pmlm_dist.json_input import InvalidJson, parse_json, read_json
from pmlm_dist.launch_environment import is_rank_zero

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
_OTHER_NAMES = {
    "train": ("train-v1.1", "train-v2.0"),
    "validation": ("dev", "dev-v1.1", "dev-v2.0"),
    "validation_matched": ("dev_matched",),
    "validation_mismatched": ("dev_mismatched",),
}
_COLA = ("source", "label", "note", "sentence")
"""Columns of CoLA's files, which have no header."""
_GLUE_TEXTS = frozenset(
    ("sentence", "sentence1", "sentence2", "#1 String", "#2 String", "question", "question1", "question2")
)
_GLUE_COLUMNS = _GLUE_TEXTS.union(
    ("label", "gold_label", "label1", "label2", "label3", "label4", "label5", "Quality", "score", "is_duplicate"),
    ("index", "id", "#1 ID", "#2 ID", "qid1", "qid2", "promptID", "pairID", "old_index"),
    ("source", "source1", "source2", "genre", "filename", "year", "note"),
    ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"),
)
"""Columns of GLUE's files. Those of QQP have lines cut by a line feed in a question, and questions without text."""
_NO_GOLD_LABEL = "-"
"""In MNLI: the annotators did not agree."""
_NO_LABEL = -1
"""Class label of hidden test sets in Hugging Face data sets."""


def absolute_source(source: str | None) -> str | None:
    """Return `source` for any working directory: the absolute path of a folder, a name of the hub unchanged."""
    if source is None:
        return None
    folder, colon, config = (source, "", "") if Path(source).exists() else source.partition(":")
    return f"{Path(folder).absolute()}{colon}{config}" if Path(folder).exists() else source


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Return all rows of `split` at `source` in order. Raises `ConfigError` if it is missing, empty or invalid."""
    if not split or Path(split).name != split:
        raise ConfigError([f"a split ({split}) is a name, not a path: put its file into {source} and give its name"])
    folder = Path(source)
    if folder.is_absolute() and not any(Path(path).exists() for path in (source, source.partition(":")[0])):
        raise ConfigError([f"--data ({source}) does not exist: name the folder that holds {split}.jsonl and others"])
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
    if path.suffix not in _SUFFIXES:
        raise ConfigError([f"{path}: its name must end in {', '.join(_SUFFIXES)}, the formats that are read"])
    try:
        if path.suffix == ".jsonl":
            return list(_json_lines(path))
        if path.suffix == ".json":
            return list(_squad_questions(path))
        return list(_tsv(path) if path.suffix == ".tsv" else _csv(path))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:  # a lone \r is no line end
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except InvalidJson as error:
                raise ConfigError([f"{path}, line {number}: not JSON ({error}): correct or remove it"]) from error
            if not isinstance(row, dict):
                raise ConfigError([f"{path}, line {number}: not a JSON object"])
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # passages exceed the default of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        _check_header(names, path)
        for row in filter(None, lines):
            if len(row) != len(names):
                raise ConfigError([_column_problem(path, lines.line_num, row, names)])
            yield dict(zip(names, row, strict=True))


def _tsv(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file without quoting. Irregular lines are an error, in GLUE's files they are skipped."""
    names: Sequence[str] = ()
    rows, irregular = 0, []
    for number, fields in _tsv_lines(path):
        if not names:
            has_header = not (len(fields) == len(_COLA) and fields[1] in ("0", "1"))
            names = fields if has_header else _COLA
            _check_header(names, path)
            if has_header:
                continue
        rows += 1
        row = dict(zip(names, fields, strict=False))
        if len(fields) == len(names) and not (_GLUE_COLUMNS.issuperset(names) and _is_without_text(row)):
            yield row
        else:
            irregular.append(_column_problem(path, number, fields, names))
    if not irregular:
        return
    # Half: far more than in any file of GLUE, and still few of a small file.
    if not _GLUE_COLUMNS.issuperset(names) or 2 * len(irregular) > rows:
        raise ConfigError([f"{irregular[0]}{_and_more(irregular)}: replace tabs and line feeds in texts by spaces"])
    if is_rank_zero(os.environ):
        print_safely(f"note: {len(irregular)} of {rows:,} lines skipped, as GLUE's files have some: {irregular[0]}")


def _tsv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields). A line ends at a line feed alone: texts hold every other separator."""
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removesuffix("\n").removesuffix("\r")
            if text:
                yield number, text.split("\t")


def _is_without_text(row: dict[str, Any]) -> bool:
    has_text = all(value.strip() for name, value in row.items() if name in _GLUE_TEXTS)
    return not has_text or row.get("gold_label") == _NO_GOLD_LABEL


def _check_header(names: Sequence[str], path: Path) -> None:
    duplicates = sorted(name for name, count in Counter(names).items() if count > 1)
    if duplicates:
        raise ConfigError([f"{path}, line 1: more than one column is called {', '.join(map(repr, duplicates))}"])


def _column_problem(path: Path, number: int, fields: Sequence[str], names: Sequence[str]) -> str:
    if len(fields) == len(names):
        return f"{path}, line {number}: no text or no gold label"
    return f"{path}, line {number}: {len(fields)} columns instead of {len(names)}"


def _and_more(problems: list[str]) -> str:
    return f" (and {len(problems) - 1:,} more lines)" if len(problems) > 1 else ""


def _squad_questions(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for article in read_json(path)["data"]:
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
    except (KeyError, TypeError, AttributeError) as error:
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
