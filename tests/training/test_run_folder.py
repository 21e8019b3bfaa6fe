"""The folder of a run: another program's files in it are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.preparations import content

from pmlm_dist.config import ConfigError, WatchdogConfig
from pmlm_dist.folder_lock import LOCK
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


def test_own_folder_of_a_run_opens_again(tmp_path: Path):
    for _ in range(2):
        with attempt(tmp_path / "run"):
            (tmp_path / "run" / "config.json").write_text("{}")
            assert (tmp_path / "run" / LOCK).exists()
