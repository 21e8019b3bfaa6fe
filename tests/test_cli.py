import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmlm_dist import __version__, cli
from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.shards import ShardError

ROOT = Path(__file__).parent.parent


def test_help_lists_every_command_and_imports_nothing_heavy():
    program = (
        "import sys; from pmlm_dist import cli; code = cli.main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'tyro', 'mpi4py', 'webdataset', 'tokenizers') if m in sys.modules]);"
        "sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in found.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version"], ["--local_rank=0", "train", "--version"]])
def test_version_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"pmlm_dist {__version__}\n"


def test_unknown_command_exits_2_with_the_closest(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prepare-corpse"]) == 2
    assert "did you mean 'prepare-corpus'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError(["seed (-1) is wrong"]), 2), (ShardError("seed (-1) is wrong"), 1)]
)
def test_user_errors_print_a_message(monkeypatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "prepare-corpus", fail)
    assert cli.main(["prepare-corpus"]) == code
    printed = capsys.readouterr().err
    assert "seed (-1) is wrong" in printed
    assert "Traceback" not in printed


def test_program_errors_print_a_traceback(monkeypatch, capsys: pytest.CaptureFixture[str]):
    def fail(arguments):
        raise ValueError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "prepare-corpus", fail)
    assert cli.main(["prepare-corpus"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("ValueError: a bug")


@pytest.mark.parametrize("command", ["export", "import", "extend-positions"])
def test_single_process_commands_exit_2_on_several_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main([command, "model", "output"]) == 2
    assert f"{command} runs in one process but was started as 2" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("program", ["train.py", "-m pmlm_dist.cli plan", "-m pmlm_dist.cli finetune"])
def test_closed_pipe_of_help_gives_no_traceback(program: str):
    command = [sys.executable, *program.split(), "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    with process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Error" not in errors
    assert "supervisor" not in errors


def test_all_setting_problems_are_listed_together(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prepare-corpus", "--sequence-length", "4"]) == 2
    message = capsys.readouterr().err
    assert "sequence_length (4)" in message
    assert "--source" in message
    assert "--vocabulary-size" in message


def test_closed_standard_streams_change_no_exit_code(tmp_path: Path):
    """`>&- 2>&-`: a file that the command writes must not become its standard output either."""
    command = f"{sys.executable} -m pmlm_dist.cli"
    inspect = f"{command} inspect --example --png {tmp_path}/layout.png"
    for line in (f"{command} finetune --task list >&- 2>&-", f"{inspect} <&- >&- 2>&-"):
        assert subprocess.run(["bash", "-c", line], cwd=ROOT, timeout=120, check=False).returncode == 0, line
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")
    # Messages for standard error do not end up in standard output.
    printed = subprocess.run(
        ["bash", "-c", f"{command} no-command 2>&-"], cwd=ROOT, timeout=60, capture_output=True, check=False
    )
    assert (printed.returncode, printed.stdout) == (2, b"")


def test_output_that_the_locale_cannot_encode_is_printed_as_escapes():
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    code = "import sys; from pmlm_dist.console import prepare_streams; prepare_streams(); print('\u4eca')"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, check=True)
    assert printed.stdout == b"\\u4eca\n"
