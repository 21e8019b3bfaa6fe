"""Demo source: the docstrings of a Python installation, which are English prose.

    *.py of the standard library and of site-packages  --ast-->  distinct docstrings  ->  one JSONL file

No code is imported or executed. Fields of a line: `text` (the dedented docstring), `package` (the top-level package),
and `name` (the dotted name of the module, class or function).
"""

import ast
import inspect
import multiprocessing
import os
import signal
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pmlm_dist.files import json_line, open_atomically
from pmlm_dist.json_input import is_unicode

MIN_CHARACTERS = 200
_WORKERS = 4
_MAX_SOURCE_BYTES = 4 << 20


@dataclass(frozen=True)
class PythonFile:
    """One Python file and the dotted name of its module."""

    path: Path
    module: str


@dataclass(frozen=True)
class Docstring:
    """One documented module, class or function."""

    text: str
    package: str
    name: str


@dataclass(frozen=True)
class PythonDocsCounts:
    """Counts of one call of `write_python_docs`."""

    files: int
    docstrings: int
    unparsable: int


def library_folders() -> list[Path]:
    """Return the standard library and every site-packages folder of `sys.path`."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    folders += [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def python_files(folders: Iterable[Path]) -> list[PythonFile]:
    """Return all Python files below `folders`, sorted by module name, without nested site-packages."""
    files = []
    for folder in folders:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if "site-packages" not in parts and "dist-packages" not in parts:
                files.append(PythonFile(path, ".".join(part for part in parts if part != "__init__")))
    return sorted(files, key=lambda file: (file.module, str(file.path)))


def read_docstrings(file: PythonFile) -> list[Docstring] | None:
    """Return docstrings of more than `MIN_CHARACTERS` in source order; None if the file cannot be parsed."""
    try:
        if file.path.stat().st_size > _MAX_SOURCE_BYTES:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in third-party code
            tree = ast.parse(file.path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return None
    package = file.module.partition(".")[0]
    return [Docstring(text, package, name) for name, text in _docstrings_in(tree, name=file.module)]


def write_python_docs(path: Path, *, folders: Iterable[Path] | None = None) -> PythonDocsCounts:
    """Write the distinct docstrings of `folders` (default: `library_folders()`) to the JSONL file `path`, atomically.

    The order is that of the sorted module names.
    """
    files = python_files(library_folders() if folders is None else folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    unparsable = 0
    with open_atomically(path) as out:
        for docstrings in _read_all(files):
            unparsable += docstrings is None
            for docstring in docstrings or ():
                if docstring.text not in seen:
                    seen.add(docstring.text)
                    out.write(json_line(vars(docstring)))
    return PythonDocsCounts(files=len(files), docstrings=len(seen), unparsable=unparsable)


def _read_all(files: list[PythonFile]) -> Iterator[list[Docstring] | None]:
    workers = min(_WORKERS, os.cpu_count() or 1, 1 + len(files) // 100)
    if workers == 1:
        yield from map(read_docstrings, files)
        return
    # `spawn`, because forking a process that runs MPI is not safe.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # this process alone handles Ctrl-C
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers, initializer=_use_all_cores)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with pool:
        yield from pool.imap(read_docstrings, files, chunksize=32)


def _use_all_cores() -> None:
    """Remove the binding to one core: an MPI launcher binds its ranks, and child processes inherit it."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _docstrings_in(node: ast.AST, *, name: str) -> Iterator[tuple[str, str]]:
    """Yield dotted names and docstrings of `node` and of all its definitions, at any depth."""
    pending = [(name, node)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            text = inspect.cleandoc(docstring) if len(docstring) > MIN_CHARACTERS else ""
            if len(text) > MIN_CHARACTERS and is_unicode(text):
                yield name, text
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                defines = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                pending.append((f"{name}.{child.name}" if defines else name, child))
