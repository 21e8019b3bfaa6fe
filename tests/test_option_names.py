"""Every option that a message, a help text or a document names exists in one of the parsers."""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmlm_dist import cli

ROOT = Path(__file__).parent.parent
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)*")
SUBCOMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "corpus": (("verify",),),
    "checkpoint": (("ls",), ("verify",), ("reshape",)),
    "demo-tasks": (("data",), ("table",)),
    "evaluate": ((), ("--suite", "blimp")),
}
EXTERNAL = {
    *("--num_gpus", "--nproc_per_node", "--no-python", "--launcher", "--no_ssh_check", "--master_addr", "--hostfile"),
    *("--local_rank", "--local-rank", "--log_level", "--allow-run-as-root", "--oversubscribe", "--mpi", "--pty"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--array", "--dependency", "--requeue", "--signal"),
    *("--gpus-per-task", "--exclude", "--logdir", "--version", "--help", "--module", "--layers", "--quiet", "--rows"),
}
"""Options of launchers, SLURM, TensorBoard, of every command (--help) and of benchmarks (--layers, --rows)."""
RESTART = {"--key", "--code", "--max-failures", "--max-preemptions-without-progress"}
"""Of `python -m pmlm_dist.supervision.restart`."""


def helps() -> Iterator[str]:
    for command in cli.COMMANDS:
        for sub in SUBCOMMANDS.get(command, ((),)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
                cli.COMMANDS[command]([*sub, "--help"])
            yield printed.getvalue()


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return the options of all commands, and the groups of nested ones (`--train`)."""
    own = {"--preset", *RESTART}
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("COLUMNS", "100")  # one column of options
    texts = list(helps())
    monkeypatch.undo()
    for text in texts:
        for line in re.findall(r"^. +(?:-\w, )?(--.*)", text, flags=re.MULTILINE):
            own |= set(OPTION.findall(line.partition("  ")[0]))
    assert {"--train.steps", "--batch.global", "--column", "--positions", "--text-field"} <= own
    return own | {name.partition(".")[0] for name in own} | EXTERNAL


def messages() -> Iterator[tuple[str, str]]:
    """String constants of the package but the docstrings of modules, which hold diagrams."""
    for path in sorted((ROOT / "pmlm_dist").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value if node.value != ast.get_docstring(tree, clean=False) else ""


def documents() -> Iterator[tuple[str, str]]:
    names = ("README.md", *(path.relative_to(ROOT) for path in sorted((ROOT / "docs").rglob("*.md"))))
    for path in (ROOT / name for name in names):
        if path.name not in ("performance.md", "testing.md"):  # options of the benchmarks and of pytest
            yield path.name, path.read_text(encoding="utf-8")


def test_every_named_option_exists(known: set[str]):
    unknown = {
        f"{where}: {option}"
        for where, text in (*messages(), *documents())
        for option in OPTION.findall(text)
        if option not in known
    }
    assert not unknown, "\n".join(sorted(unknown))
