"""docs/operations.md, the run book, against the code: its messages are in the code, its settings exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SCRIPTS = "\n".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))

PLACEHOLDER = re.compile(r"\.\.\.|\bRUN_DIR\b|\bSIG\b|\b[NRTS]\b")
"""Placeholders in the messages of the document."""


def all_texts() -> str:
    """Return every string of the package, a line each, with `...` for values, and the batch scripts."""
    texts = [SCRIPTS]
    for path in (ROOT / "pmlm_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


TEXTS = all_texts()
TABLE = DOCUMENT.partition("## What warnings mean")[2].partition("\n## ")[0]
MESSAGES = [
    message
    for row in re.findall(r"^\| (`.*?) \| ", TABLE, flags=re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", row)
]


def test_document_has_messages():
    assert len(MESSAGES) >= 10


@pytest.mark.parametrize("message", MESSAGES)
def test_message_of_the_run_book_is_in_the_code(message: str):
    pieces = [piece.strip(" :;()") for piece in PLACEHOLDER.split(message.removeprefix("supervisor: "))]
    pieces = [piece for piece in pieces if len(piece) > 3]
    assert pieces
    assert not [piece for piece in pieces if piece not in TEXTS]


def test_settings_of_the_run_book_exist():
    from pmlm_dist.config import RunConfig, as_dict

    settings = as_dict(RunConfig())
    for option in set(re.findall(r"--((?:train|watchdog|optim|data|model)\.[\w.-]+)", DOCUMENT)):
        group, _, name = option.rstrip(".").replace("-", "_").partition(".")
        assert name in settings[group], option
    for variable in set(re.findall(r"\b(GRACE_S|MAX_\w+|ON_STOP|CONTAINER\w*|VENV|PROJECT)\b", DOCUMENT)):
        assert f"{variable}=" in SCRIPTS or f"${{{variable}:-" in SCRIPTS, variable
