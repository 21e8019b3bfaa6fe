import json
from pathlib import Path

from pmlm_dist.corpus.input import python_docs
from pmlm_dist.corpus.input.python_docs import Docstring, PythonFile, python_files, read_docstrings, write_python_docs

LONG = "A sentence that says what this does. " * 8


def write_library(folder: Path) -> Path:
    files = {
        "beta/__init__.py": f'"""{LONG}beta"""\n',
        "beta/inner.py": (
            f'class C:\n    """{LONG}C\n\n    At the margin:\n        indented\n    """\n'
            f'    async def m(self):\n        """{LONG}m"""\n'
            f'        if True:\n            def n():\n                """{LONG}n"""\n'
        ),
        "alpha.py": f'def f():\n    """{LONG}beta"""\ndef g():\n    """Short."""\n',
        "broken.py": "def (:\n",
        "nul.py": "x = 1\0",
        "half.py": f'"""{LONG} \\ud800"""\n',
        "site-packages/hidden.py": f'"""{LONG}hidden"""\n',
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_docstrings_are_distinct_and_sorted_by_module(tmp_path: Path):
    counts = write_python_docs(tmp_path / "out.jsonl", folders=[write_library(tmp_path / "lib")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # alpha.f has the same docstring as beta; the first one is kept.
    assert [(line["package"], line["name"]) for line in lines] == [
        ("alpha", "alpha.f"),
        ("beta", "beta.inner.C"),
        ("beta", "beta.inner.C.m"),
        ("beta", "beta.inner.C.m.n"),
    ]
    assert lines[1]["text"] == f"{LONG}C\n\nAt the margin:\n    indented"
    assert (counts.files, counts.docstrings, counts.unparsable) == (6, 4, 2)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.jsonl"]


def test_docstrings_are_independent_of_the_number_of_processes(tmp_path: Path, monkeypatch):
    folder = write_library(tmp_path / "lib")
    for number in range(150):
        (folder / f"many{number:03d}.py").write_text(f'"""{LONG}{number}"""')
    write_python_docs(tmp_path / "several.jsonl", folders=[folder])
    monkeypatch.setattr(python_docs, "_WORKERS", 1)
    write_python_docs(tmp_path / "one.jsonl", folders=[folder])
    assert (tmp_path / "several.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_docstrings_equal_those_of_the_imported_module():
    import argparse

    files = [file for file in python_files(python_docs.library_folders()) if file.module == "argparse"]
    docstrings = read_docstrings(files[0])
    assert docstrings
    assert docstrings[0] == Docstring((argparse.__doc__ or "").strip(), "argparse", "argparse")


def test_huge_files_are_skipped(tmp_path: Path):
    path = tmp_path / "huge.py"
    path.write_text("x = 1\n" * 1_000_000)
    assert read_docstrings(PythonFile(path, "huge")) is None
