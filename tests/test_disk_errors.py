"""A disk that is full, read-only or out of quota: one message with the way out in every command, no traceback."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.preparations import content, write_source

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import new_folder
from pmlm_dist.corpus.arrays import save_array
from pmlm_dist.files import open_atomically
from pmlm_dist.folder_lock import FolderLock
from pmlm_dist.supervision.exit_codes import ExitCode, explain, run

FULL = Path("/dev/full")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def pmlm(*arguments: str, limit: int | None = None, stdout: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pmlm` with a limit of the size of a file (EFBIG), or standard output on a full disk."""
    command = [sys.executable, "-m", "pmlm_dist.cli", *arguments]
    with (stdout or Path(os.devnull)).open("w") as output:
        return subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=None if limit is None else lambda: limit_files(limit),
        )


@pytest.mark.fault("F45")
@pytest.mark.distributed
@pytest.mark.parametrize("limit", [700, 3000, 6000])
def test_full_disk_ends_prepare_corpus_with_one_message(tmp_path: Path, limit: int):
    """In the journal, in the vocabulary, in a shard; with room the same command resumes."""
    source = write_source(tmp_path)
    settings = ("--source", f"{source}/a.jsonl", "--output", str(tmp_path / "out"), "--vocabulary-size", "150")
    arguments = ("prepare-corpus", *settings, "--sequence-length", "32", "--shards", "2")
    done = pmlm(*arguments, limit=limit)
    assert done.returncode == ExitCode.FAILED
    assert "Traceback" not in done.stderr
    assert f"pmlm: {tmp_path}/out/" in done.stderr
    assert "cannot be written: File too large; raise the limit" in done.stderr
    assert done.stderr.rstrip().endswith(", then start again")
    assert done.stderr.count("pmlm:") == 1  # beside MPI's own complaint
    assert not (tmp_path / "out/manifest.json").exists()
    assert pmlm(*arguments).returncode == 0
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


@pytest.mark.fault("F45")
@pytest.mark.parametrize("arguments", [("--help",), ("checkpoint", "ls", "--help")])
def test_full_disk_of_standard_output_is_one_message(arguments: tuple[str, ...]):
    done = pmlm(*arguments, stdout=FULL)
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.startswith("pmlm: standard output cannot be written: No space left on device; make room")
    assert len(done.stderr.splitlines()) == 1


def disk_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "runs/mine/file")


@pytest.mark.fault("F45")
@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "make room on the disk"),
        (errno.EDQUOT, "make room, or raise the quota"),
        (errno.EFBIG, "raise the limit of the size of a file (`ulimit -f`)"),
        (errno.EROFS, "choose a folder that can be written to"),
        (errno.EACCES, "change its permissions, or choose another"),
        (errno.ENOTDIR, "choose another path"),
        (errno.ENAMETOOLONG, "choose a shorter path"),
    ],
)
def test_every_error_of_a_disk_has_its_way_out(number: int, way_out: str, capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise disk_error(number)

    assert run(fail, program="pmlm") == ExitCode.FAILED
    printed = capsys.readouterr().err
    assert printed.startswith("pmlm: runs/mine/file cannot be ")
    assert os.strerror(number) in printed
    assert printed.endswith(f"{way_out}, then start again\n")


def test_other_errors_keep_their_traceback():
    code, message = explain(OSError(errno.EIO, "Input/output error"))
    assert code == ExitCode.FAILED
    assert message.rstrip().endswith("OSError: [Errno 5] Input/output error")


def write_with_python(folder: Path) -> None:
    with (folder / "file").open("wb", buffering=0) as file:
        os.dup2(os.open(FULL, os.O_WRONLY), file.fileno())
        file.write(b"x")


def write_with_torch(folder: Path) -> None:
    with FULL.open("wb") as file:
        torch.save({"a": torch.ones(300_000)}, file)


def write_little_with_torch(folder: Path) -> None:
    """Its first write fails; while it closes the file, it raises a RuntimeError without a number."""
    with FULL.open("wb", buffering=0) as file:
        torch.save({"a": torch.ones(3)}, file)


@pytest.mark.fault("F45")
@pytest.mark.parametrize("write", [write_with_python, write_with_torch, write_little_with_torch])
def test_full_disk_during_an_export_names_the_output_and_leaves_nothing(tmp_path: Path, write):
    with pytest.raises(Exception) as caught, new_folder(tmp_path / "model") as temporary:
        write(temporary)
    assert explain(caught.value)[1].startswith(
        f"{tmp_path}/model cannot be written: No space left on device; make room"
    )
    assert not list(tmp_path.iterdir())


def test_error_of_a_library_in_rust_is_recognized_by_its_number():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(error) == (
        1,
        "a file cannot be written: No space left on device; make room on the disk, then start again",
    )


def test_error_in_an_atomic_write_names_the_file_and_not_the_temporary_one(tmp_path: Path):
    with pytest.raises(OSError, match=r"No space left on device: '\S+/file'$"), open_atomically(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"'\S+/folder/array\.npy'$"):
        save_array(tmp_path / "folder" / "array.npy", np.arange(5))


@pytest.mark.fault("F43", "F44")
def test_new_folder_keeps_what_others_have_written(tmp_path: Path):
    foreign = tmp_path / f"model.tmp-{os.getpid()}"
    foreign.mkdir()
    (foreign / "file").write_text("foreign")
    with new_folder(tmp_path / "model") as temporary:
        (temporary / "file").write_text("own")
        with pytest.raises(ConfigError), FolderLock.acquire(tmp_path / "other", beside=True), new_folder(foreign):
            pass
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(ConfigError, match="already exists and is not overwritten"), new_folder(tmp_path / "link"):
        pass
    (tmp_path / "link").unlink()
    assert content(tmp_path) == {f"{foreign.name}/file": b"foreign", "model/file": b"own"}
