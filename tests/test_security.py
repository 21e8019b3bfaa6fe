"""Claims of docs/security.md: no code from data, no shell from settings, no writes outside a folder, no secrets."""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpora import write_corpus

from pmlm_dist.config import ConfigError, DataConfig
from pmlm_dist.conversion.files import read_tensors
from pmlm_dist.corpus.shards import MANIFEST, Manifest
from pmlm_dist.data.remote_files import parse_address
from pmlm_dist.data.stream import CorpusSource

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("pmlm_dist/**/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "train.py"])
DOCUMENT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")

PIPES = {"pmlm_dist/data/worker_pool.py"}
"""Files that send pickles between a rank and its own child processes."""
STARTS_PROGRAMS = {
    "pmlm_dist/data/remote_files.py",
    "pmlm_dist/supervision/restart.py",
    "benchmarks/loader.py",
    "benchmarks/prepare.py",
    "benchmarks/zero.py",
}

UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
NEVER = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|exec\w*|spawn\w*)|\w*\.?extract(all)?"
)


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield file, function and keyword arguments (as source text) of every call in the project's code."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), keywords


CALLS = list(calls())


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module.partition('.')[0]}.{alias.name}" for alias in node.names}
    return names


def files_importing(*modules: str) -> set[str]:
    """Return the files that import any of `modules`, except for an exception class alone."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.partition(".")[0] in modules and name != "pickle.UnpicklingError" for name in imported(path))
    }


def test_all_source_files_are_checked():
    assert len(SOURCES) > 100
    assert len(CALLS) > 3000


def test_only_own_processes_send_pickles():
    assert files_importing(*UNPICKLING) == PIPES
    loads = [(path, keywords) for path, name, keywords in CALLS if name in ("torch.load", "np.load", "numpy.load")]
    assert [path for path, _ in loads].count("pmlm_dist/conversion/files.py") == 1
    for path, keywords in loads:
        assert keywords.get("weights_only", "True") == "True", path
        assert "allow_pickle" not in keywords, path  # numpy rejects pickles by default
    assert all("weights_only" in keywords for _, name, keywords in CALLS if name == "torch.load")


def test_no_text_is_executed_as_code_or_shell():
    assert not [(path, name) for path, name, _ in CALLS if NEVER.fullmatch(name) and name != "re.compile"]
    assert not [(path, name) for path, name, keywords in CALLS if {"shell", "trust_remote_code"} & keywords.keys()]
    assert files_importing("subprocess") == STARTS_PROGRAMS
    assert files_importing("yaml", "pty", "code", "tarfile", "shutil.unpack_archive") == set()
    assert files_importing("zipfile") == {"pmlm_dist/likelihood/minimal_pairs.py"}  # reads members, extracts nothing


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_batch_scripts_evaluate_no_setting(path: Path):
    lines = [line.partition(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.search(r"\beval\b|\bbash -c\b|\bsh -c\b|`", line)]


class Hostile:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_foreign_weights_with_code_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(2), "x": Hostile()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        read_tensors(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pytorch_model.bin"]


def load_manifest(corpus: Path, cache: Path) -> Manifest:
    """Load the manifest of a corpus at an address."""
    return Manifest.load(CorpusSource.open(f"file://{corpus}", DataConfig(cache=str(cache))).folder)


@pytest.mark.fault("F63")
@pytest.mark.parametrize(
    "change",
    [
        {"name": "../outside.tar"},
        {"name": "/outside.tar"},
        {"name": "train/../../outside.tar"},
        {"name": "http://elsewhere/x.tar"},
        {"sha256": "../outside"},
        {"sha256": "/outside"},
        {"sha256": "0" * 63 + "/"},
    ],
    ids=lambda change: "-".join(change.values())[-24:],
)
def test_manifest_names_no_path_outside_the_cache(tmp_path: Path, change: dict[str, str]):
    corpus, cache = write_corpus(tmp_path / "corpus"), tmp_path / "cache"
    plain = json.loads((corpus / MANIFEST).read_text())
    plain["splits"]["train"]["shards"][0].update(change)
    (corpus / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"is not a path below the corpus|is not a sha256"):
        load_manifest(corpus, cache)
    assert not list(tmp_path.rglob("*outside*"))


def test_address_with_a_password_is_rejected_before_it_is_logged():
    with pytest.raises(ConfigError, match="would be written into logs and checkpoints") as caught:
        parse_address("https://me:hunter2@host/corpus")
    assert "hunter2" not in str(caught.value)
    assert parse_address("s3://bucket/a@b") == "s3://bucket/a@b"


def test_document_names_existing_tests_and_modules():
    tests = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(tests) > 10
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name in tests if f"def {name}(" not in sources]
    assert not [
        path
        for path in re.findall(r"`([\w/]+\.(?:py|sh))`", DOCUMENT)
        if not any((folder / path).exists() for folder in (ROOT, ROOT / "pmlm_dist"))
    ]
