"""`pmlm checkpoint`: listing, verification, and a checkpoint rewritten as full tensors."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pmlm_dist import cli
from pmlm_dist.checkpoint.files import KINDS, checkpoint_problems, read_weights, write_numbers
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.manifest import rank_file, write_json
from pmlm_dist.commands import checkpoint

ROWS, COLUMNS = Fragment.whole("a.weight", (4, 6), used_rows=3), Fragment.whole("b.weight", (6, 4), dim=1)


def cut(whole: Fragment) -> list[list[Fragment]]:
    """Fragments by rank: two slices of two ranges each, as with two tensor-parallel and two data-parallel ranks."""
    half = whole.shape[whole.dim] // 2
    slices = [
        Fragment(**{**vars(whole), "first_row": first, "last_row": first + half, "stop": 12}) for first in (0, half)
    ]
    return [[share] for part in slices for dp_rank in (0, 1) if (share := part.share(dp_rank, 2))]


def values(whole: Fragment, kind: str) -> np.ndarray:
    return np.arange(24, dtype=np.float32).reshape(whole.shape) + 100 * KINDS.index(kind) + 1000 * (whole is ROWS)


def chunk_of(whole: Fragment, fragment: Fragment, kind: str) -> bytes:
    tensor_slice = values(whole, kind).take(range(fragment.first_row, fragment.last_row), axis=fragment.dim)
    return tensor_slice.reshape(-1)[fragment.start : fragment.stop].tobytes()


def write(folder: CheckpointFolder, step: int) -> Path:
    """Write a checkpoint of four ranks, an hour and a half old."""
    temporary = folder.temporary(step, attempt="a")
    temporary.mkdir(parents=True)
    files = {}
    for rank, (rows, columns) in enumerate(zip(cut(ROWS), cut(COLUMNS), strict=True)):
        chunks = [chunk_of(whole, p, kind) for whole, (p,) in ((ROWS, rows), (COLUMNS, columns)) for kind in KINDS]
        files[rank_file(rank)] = write_numbers(temporary / rank_file(rank), [*rows, *columns], chunks)
    engine = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    state: dict[str, Any] = {
        "step": step,
        "samples_consumed": 8 * step,
        "tokens_seen": 1,
        "identity": {"train.seed": 3},
    }
    state |= {"configuration": {"topology": {"dp": 2, "tp": 2}, "engine": engine}, "written_at": time.time() - 5400}
    return folder.commit(step, temporary, files | {"state.json": write_json(temporary / "state.json", state)})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two checkpoints of a run."""
    for step in (20, 30):
        write(CheckpointFolder(tmp_path / "run/checkpoints", keep=9), step)
    return tmp_path / "run"


def pmlm(*arguments: str | Path) -> int:
    return cli.main(["checkpoint", *map(str, arguments)])


def test_ls_shows_step_size_age_and_writers(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    (run_dir / "checkpoints/step-00000020" / rank_file(2)).unlink()
    assert pmlm("ls", run_dir) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    for line, step in ((first, "20"), (second, "30")):
        assert line.split()[0] == step
        assert "kB" in line
        assert "1.5 h" in line
        assert "dp 2 x tp 2, ZeRO 2, bf16" in line
    assert first.endswith("rank-00002.safetensors is missing")
    assert second.endswith("complete")


def test_ls_accepts_a_run_a_folder_of_checkpoints_or_one_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    for folder, lines in ((run_dir, 3), (run_dir / "checkpoints", 3), (run_dir / "checkpoints/step-00000020", 2)):
        assert pmlm("ls", folder) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines
    assert pmlm("ls", run_dir / "elsewhere") == 2
    assert "there is no checkpoint in" in capsys.readouterr().err


def test_verify_detects_a_flipped_byte_that_ls_does_not_check(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert pmlm("verify", run_dir) == 0
    assert capsys.readouterr().out.count(": valid") == 2
    file = run_dir / "checkpoints/step-00000030" / rank_file(1)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert pmlm("ls", run_dir) == 0
    assert pmlm("verify", run_dir) == 2
    printed = capsys.readouterr()
    assert "step-00000030: corrupt" in printed.out
    assert "step-00000020: valid" in printed.out
    assert f"{rank_file(1)} has another checksum than when it was written" in printed.err


def test_reshape_writes_full_tensors_readable_as_plain_safetensors(run_dir: Path, tmp_path: Path):
    assert pmlm("reshape", run_dir, "--output", tmp_path / "out") == 0
    path = tmp_path / "out/step-00000030"
    assert checkpoint_problems(path) == []
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", rank_file(0), "state.json"]
    tensors = load_file(path / rank_file(0))
    assert len(tensors) == 6
    for whole in (ROWS, COLUMNS):
        for kind in KINDS:
            assert np.array_equal(tensors[f"{kind}/{whole.name}"], values(whole, kind))
    weights = read_weights(path)
    assert np.array_equal(weights["a.weight"], values(ROWS, "weight")[:3])  # without the padding row
    source = run_dir / "checkpoints/step-00000030/state.json"
    assert json.loads((path / "state.json").read_text()) == json.loads(source.read_text())
    assert CheckpointFolder(tmp_path / "out", keep=1).newest_valid() == (path, [])


def test_reshape_takes_the_newest_valid_checkpoint_and_never_overwrites(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (run_dir / "checkpoints/step-00000030/state.json").write_text("{")
    assert pmlm("reshape", run_dir, "--output", tmp_path / "out") == 0
    assert [path.name for path in CheckpointFolder(tmp_path / "out", keep=1).steps()] == ["step-00000020"]
    assert pmlm("reshape", run_dir, "--output", tmp_path / "out") == 2
    assert "already exists: choose another --output" in capsys.readouterr().err
    (run_dir / "checkpoints/step-00000020/state.json").unlink()
    assert pmlm("reshape", run_dir, "--output", tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()
    assert "step-00000020: state.json is missing" in capsys.readouterr().err


def test_reshape_onto_a_full_disk_leaves_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_numbers", full)
        assert pmlm("reshape", run_dir, "--output", tmp_path / "out") == 1
    assert "out cannot be written: No space left on device; make room" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert pmlm("reshape", run_dir, "--output", tmp_path / "out") == 0


@pytest.mark.fault("F42")
def test_killed_reshape_leaves_no_committed_checkpoint(run_dir: Path, tmp_path: Path):
    program = (
        "import os, signal, sys; from pmlm_dist.commands import checkpoint as c;"
        "c.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        f"c.reshape(c.Path({str(run_dir)!r}), output=c.Path({str(tmp_path / 'out')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -9
    out = CheckpointFolder(tmp_path / "out", keep=1)
    assert sorted(path.name for path in out.root.iterdir()) == [".lock", "step-00000030.tmp-reshape"]
    assert out.newest_valid() == (None, [])
    assert pmlm("reshape", run_dir, "--output", out.root) == 0
    assert sorted(path.name for path in out.root.iterdir()) == ["latest", "step-00000030"]
