"""Saves of runs that are killed or end: the next attempt resumes from the last checkpoint before."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.saving_runs import check_equal, patched, printed_by_pretrain
from support.small_runs import run_config, with_train
from support.worlds import RankFailed, run_world

from pmlm_dist.checkpoint.files import checkpoint_problems
from pmlm_dist.config import RunConfig
from pmlm_dist.metrics.run_log import read_metrics

pytestmark = pytest.mark.distributed


def pretrain_until_killed(config: RunConfig, rank: int, moment: str) -> None:
    """Pre-train; the process of `rank` is killed at a moment of the save after step 4."""

    def kill(function: Any, *args: Any, **kwargs: Any) -> Any:
        is_step_4 = any("step-00000004" in str(arg) for arg in args)
        if is_step_4 and int(os.environ["RANK"]) == rank:
            if moment == "write_numbers":  # killed in the middle of the file
                function(*args)
                os.truncate(args[0], args[0].stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    with patched(moment, kill):
        printed_by_pretrain(config)


@pytest.mark.parametrize(
    ("rank", "moment"), [(1, "write_numbers"), (1, "write_json"), (0, "write_json"), (0, "read_json")]
)
@pytest.mark.fault("F20")
def test_kill_during_a_save_costs_the_steps_since_the_previous_one(
    small_corpus: Path, tmp_path: Path, rank: int, moment: str
):
    """Killed in the middle of a rank file, before its report, before `state.json`, while rank 0 collects reports."""
    config = with_train(run_config(small_corpus, tmp_path / "run", steps=6), checkpoint_every=2)
    uninterrupted = replace(config, run_dir=tmp_path / "uninterrupted")
    run_world(printed_by_pretrain, 2, uninterrupted)
    with pytest.raises(RankFailed):
        run_world(pretrain_until_killed, 2, config, rank, moment)
    assert sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*[0-9]")) != []
    assert checkpoint_problems(config.run_dir / "checkpoints/step-00000004") != []
    first, _ = run_world(printed_by_pretrain, 2, config)
    assert "after step 2;" in first
    assert not list((config.run_dir / "checkpoints").glob("*.tmp*"))
    check_equal(uninterrupted.run_dir / "checkpoints/step-00000006", config.run_dir / "checkpoints/step-00000006")


def fail_last_save(config: RunConfig) -> str:
    def full(write: Any, path: Path, *args: Any) -> Any:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args)

    with patched("write_numbers", full), pytest.raises(RuntimeError) as caught:
        printed_by_pretrain(config)
    return str(caught.value)


def test_run_whose_last_save_fails_is_not_complete_and_can_be_restarted(small_corpus: Path, tmp_path: Path):
    config = with_train(run_config(small_corpus, tmp_path, steps=4), checkpoint_every=2)
    messages = run_world(fail_last_save, 2, config)
    assert all("the last checkpoint, of step 4, could not be written" in line for line in messages)
    assert not (tmp_path / "COMPLETE").exists()
    assert read_metrics(tmp_path)[4]["checkpoint/failed"] == 1
    assert "after step 2;" in run_world(printed_by_pretrain, 2, config)[0]
    assert json.loads((tmp_path / "COMPLETE").read_text())["step"] == 4


def test_run_keeps_the_newest_and_every_kth_and_removes_leftovers(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path, steps=7, micro_batch=8)
    config = with_train(config, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    leftover = tmp_path / "checkpoints/step-00000002.tmp-dead"
    leftover.mkdir(parents=True)
    (printed,) = run_world(printed_by_pretrain, 1, config)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *(f"step-{step:08d}" for step in (3, 6, 7))]
    assert printed.count("checkpoint: ") == 7
    shutil.rmtree(folder / "step-00000007")
    assert "after step 6;" in run_world(printed_by_pretrain, 1, config)[0]
