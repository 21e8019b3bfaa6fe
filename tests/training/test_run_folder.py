"""The folder of a run: another program's files in it are kept."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.preparations import content

from pmlm_dist import folder_lock
from pmlm_dist.config import ConfigError, WatchdogConfig
from pmlm_dist.conversion.pretrained import new_folder
from pmlm_dist.folder_lock import LOCK, FolderInUse, LockOwner
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.lease import lease
from pmlm_dist.training.attempt import open_attempt


def attempt(run_dir: Path):
    return open_attempt(
        run_dir, tp=1, collective_timeout_s=60, grace_s=5.0, watchdog=WatchdogConfig(), checkpoint_every=10
    )


@pytest.mark.fault("F43")
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_run_in_a_folder_of_another_program_raises_and_changes_nothing(tmp_path: Path, name: str):
    (tmp_path / name).write_text("foreign")
    with pytest.raises(ConfigError, match=rf"holds {name}, which no run has written"), attempt(tmp_path):
        pass
    assert content(tmp_path) == {name: b"foreign"}


@pytest.mark.fault("F44")
@pytest.mark.parametrize("beside", [True, False])
def test_second_start_with_the_same_output_raises_and_changes_nothing(tmp_path: Path, beside: bool):
    """Of a run, a fine-tuning, or a generation, whose lock is beside its output."""
    owner = replace(LockOwner.current({}), pid=os.getppid(), started=folder_lock._start_ticks(os.getppid()) or 0)
    output = tmp_path / "out"
    lock = tmp_path / f"out{LOCK}" if beside else output / LOCK
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps(asdict(owner)))
    before = content(tmp_path)
    with (
        pytest.raises(FolderInUse, match=rf"out is in use by process {owner.pid}"),
        lease(output, groups.init_process_groups(), beside=beside),
    ):
        pass
    if beside:
        with pytest.raises(FolderInUse), new_folder(output):  # export, import, extend-positions, demo-tasks
            pass
    assert content(tmp_path) == before


def test_own_folder_of_a_run_opens_again(tmp_path: Path):
    for _ in range(2):
        with attempt(tmp_path / "run") as opened:
            opened.record.create()
            (tmp_path / "run" / "config.json").write_text("{}")
            assert (tmp_path / "run" / LOCK).exists()
