"""Input files of a preparation: their list, its comparison with that of an interrupted run, and warnings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmlm_dist.config import raise_if_any
from pmlm_dist.corpus.input.sources import SourceFile, local_file
from pmlm_dist.corpus.prepare.journal import Journal
from pmlm_dist.corpus.prepare.settings import PYTHON_DOCS, PrepareConfig, input_files


def source_files(config: PrepareConfig, journal: Journal) -> list[SourceFile]:
    """Return the input files. Docstrings are collected first if requested, unless an interrupted run did so."""
    files = input_files(config)
    if PYTHON_DOCS not in config.source:
        return files
    from pmlm_dist.corpus.input.python_docs import write_python_docs

    path = config.output / f"{PYTHON_DOCS}.jsonl"
    if journal.identity() is None or not path.is_file():
        journal.add_outputs([path.name])
        counts = write_python_docs(path)
        print(
            f"{counts.docstrings} docstrings in {counts.files} files, {counts.unparsable} files unreadable", flush=True
        )
    return [local_file(path), *files]


def unsplittable_warnings(files: Sequence[SourceFile], *, ranks: int, unit_bytes: int) -> list[str]:
    """Return a warning if a file that cannot be cut into units is more than a rank's share: other ranks would idle."""
    share = max(sum(file.size for file in files) / ranks, unit_bytes)
    unsplittable = [file for file in files if file.kind[1] != "none" or not file.seekable]
    largest = max(unsplittable, key=lambda file: file.size, default=None)
    if ranks == 1 or largest is None or largest.size <= share:
        return []
    return [
        f"{largest.name} ({largest.size:,} bytes) cannot be cut: it is compressed, or its server sends whole files "
        f"only. One of {ranks} ranks reads it while the others wait: unpack it, or split it into {ranks} files or more"
    ]


def raise_if_changed(folder: Path, before: list[list[Any]], now: list[list[Any]]) -> None:
    """Raise ConfigError if files changed (size or time) since the interrupted run listed them."""
    names = [file[0] for file in now if file not in before] or [file[0] for file in before if file not in now]
    if names:
        raise_if_any(
            [
                f"{folder} holds an unfinished corpus of other input: {len(names)} files changed since, {names[0]} for "
                "example: remove the folder or give another --output"
            ]
        )
