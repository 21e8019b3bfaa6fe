"""Ranks of a node look for the failure of another rank in turn, and all of them learn of it."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from pmlm_dist.supervision import failure_reports
from pmlm_dist.supervision.failure_reports import Failure, FailureWatch, write_failure

FAILURE = Failure(3, 81, "failed: x", 7, "step")
RANKS = 8


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders in which the ranks have looked for a failure; the node's temporary files are below `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read, looked = failure_reports.read_failure, []
    monkeypatch.setattr(failure_reports, "read_failure", lambda folder: (looked.append(folder), read(folder))[1])
    return looked


def watches(folder: Path) -> list[FailureWatch]:
    return [FailureWatch(folder, interval_s=1000) for _ in range(RANKS)]


def let_the_interval_pass(tmp_path: Path) -> None:
    (mark,) = tmp_path.glob("pmlm-*/looked")
    os.utime(mark, (time.time() - 2000, time.time() - 2000))


def test_one_rank_of_a_node_looks_in_an_interval_and_all_return_the_failure(tmp_path: Path, looks: list[Path]):
    shared = tmp_path / "logs/attempt"
    of_node = watches(shared)
    assert [watch.read() for watch in of_node * 5] == [None] * 5 * RANKS
    assert looks.count(shared) == 1
    write_failure(shared, FAILURE)
    looks.clear()
    assert [watch.read() for watch in of_node] == [None] * RANKS
    let_the_interval_pass(tmp_path)
    assert [watch.read() for watch in of_node * 2] == [FAILURE] * 2 * RANKS
    assert looks.count(shared) == 1
    for watch in of_node:
        watch.close()
    assert not list(tmp_path.glob("pmlm-*"))


def test_attempts_do_not_share_their_failures(tmp_path: Path, looks: list[Path]):
    write_failure(tmp_path / "a/logs/attempt", FAILURE)
    assert FailureWatch(tmp_path / "a/logs/attempt", interval_s=1).read() == FAILURE
    assert FailureWatch(tmp_path / "b/logs/attempt", interval_s=1).read() is None


@pytest.mark.parametrize("reason", ["no folder", "of another user"])
def test_rank_without_a_folder_of_its_node_looks_itself(
    tmp_path: Path, looks: list[Path], monkeypatch: pytest.MonkeyPatch, reason: str
):
    shared = tmp_path / "logs/attempt"
    of_node = watches(shared)
    if reason == "no folder":
        monkeypatch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(PermissionError()))
    else:
        of_node[0].read()
        looks.clear()
        monkeypatch.setattr(os, "getuid", lambda: -1)
    assert [watch.read() for watch in of_node] == [None] * RANKS
    assert looks.count(shared) == RANKS
