"""Failures of a save: they cost that checkpoint alone, and are logged and counted."""

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.saving_runs import SavingRun, patched
from support.small_runs import run_config
from support.worlds import RankFailed, run_world

from pmlm_dist.checkpoint.files import checkpoint_problems
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.config import RunConfig

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Outcome:
    """Observations of one rank: a failed save between two successful ones."""

    after_failure: list[str]
    after_next: list[str]
    logged: list[str]
    counted: list[int]
    last_step: int


def fail_second_save(config: RunConfig, rank: int, can_report: bool) -> Outcome:
    """Save after steps 1, 2 and 3; the second save fails on `rank`, which may not even be able to report it."""
    saving = SavingRun(config)
    saving.take_steps(1)
    saving.save()
    saving.join_thread()

    def full(write: Any, path: Path, *_: Any, **__: Any) -> Any:
        if path.suffix == ".safetensors":  # JSON files are written atomically
            path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    saving.take_steps(1)
    with contextlib.ExitStack() as patches:
        if saving.rank == rank:
            patches.enter_context(patched("write_numbers", full))
            if not can_report:
                patches.enter_context(patched("write_json", full))
        saving.save()
        if can_report:  # rank 0 reads a file
            saving.join_thread()
        else:  # rank 0 learns of it at the next save, by a collective
            writer = saving.checkpointer._writer
            assert writer is not None
            if saving.rank == rank:
                writer.join(60)
    after_failure = saving.names()
    saving.take_steps(1)
    saving.save()
    saving.checkpointer.close()
    return Outcome(after_failure, saving.names(), saving.log.lines, saving.log.failures, saving.state.step)


@pytest.mark.parametrize(("rank", "can_report"), [(0, True), (1, True), (1, False)])
@pytest.mark.fault("F28")
def test_full_disk_costs_one_checkpoint_and_is_logged_and_counted(
    small_corpus: Path, tmp_path: Path, rank: int, can_report: bool
):
    config = run_config(small_corpus, tmp_path, steps=9)
    first, second = run_world(fail_second_save, 2, config, rank, can_report)
    if can_report:
        assert first.after_failure == ["latest", "step-00000001"]
    assert first.after_next == ["latest", "step-00000001", "step-00000003"]
    assert [line.split(":")[0] for line in first.logged] == ["checkpoint", "warning", "checkpoint"]
    assert "the checkpoint of step 2 was not written" in first.logged[1]
    assert "No space left on device" in first.logged[1]
    assert ("rank 1" in first.logged[1]) == (rank == 1)
    assert first.counted == [1]
    assert first.last_step == second.last_step == 3
    assert all(not checkpoint_problems(tmp_path / "checkpoints" / name) for name in first.after_next if "step" in name)


def hang_in_first_save(config: RunConfig) -> tuple[list[str], list[str]]:
    """Rank 1's first write exceeds the time limit and ends only after the second save is complete."""
    saving, released, calls = SavingRun(config, timeout_s=1), threading.Event(), []

    def hang(write: Any, *args: Any) -> Any:
        calls.append(args)
        if saving.rank == 1 and len(calls) == 1:
            released.wait(60)
        return write(*args)

    with patched("write_numbers", hang):
        saving.take_steps(1)
        saving.save()
        hung = saving.checkpointer._writer
        saving.take_steps(1)
        saving.save()
        saving.join_thread()
        released.set()
        assert hung is not None
        hung.join(60)
        saving.checkpointer.close()
    return saving.names(), saving.log.lines


@pytest.mark.fault("F31")
def test_hung_write_is_abandoned_and_never_committed(small_corpus: Path, tmp_path: Path):
    (names, logged), _ = run_world(hang_in_first_save, 2, run_config(small_corpus, tmp_path, steps=9))
    assert [name for name in names if ".tmp" not in name] == ["latest", "step-00000002"]
    assert "the checkpoint of step 1 was not written" in logged[0]
    assert "longer than --train.save-timeout-s" in logged[0]
    assert checkpoint_problems(tmp_path / "checkpoints/step-00000002") == []


def problems_with_separate_disks(config: RunConfig, elsewhere: Path) -> list[str]:
    """Problems at the start when rank 1 has a local disk in place of the shared folder."""
    from pmlm_dist.config import ConfigError

    if int(os.environ["RANK"]) == 1:
        config = replace(config, run_dir=elsewhere)
    try:
        SavingRun(config)
    except ConfigError as error:
        return error.problems
    return []


def test_folder_not_shared_by_all_ranks_raises_at_the_start(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path / "here", steps=9)
    first, second = run_world(problems_with_separate_disks, 2, config, tmp_path / "there")
    assert len(first) == len(second) == 1
    assert "rank 1 does not see in" in first[0]
    assert "that all nodes share" in first[0]


def save_with_program_error(config: RunConfig) -> None:
    saving = SavingRun(config)
    saving.take_steps(1)
    with patched("write_numbers", lambda *_: 1 / 0):
        saving.save()
        saving.checkpointer.close()


@pytest.mark.fault("F31")
def test_program_error_in_the_thread_ends_the_run(small_corpus: Path, tmp_path: Path):
    with pytest.raises(RankFailed, match="ZeroDivisionError"):
        run_world(save_with_program_error, 1, run_config(small_corpus, tmp_path, steps=9, micro_batch=8))


@contextlib.contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """Mount a small file system at `folder`; skip the test where mounting is not allowed."""
    folder.mkdir(parents=True)
    size = f"size={kilobytes}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def save_three_times(config: RunConfig, disk: Path, fault: str) -> tuple[list[str], list[str], list[str]]:
    """Save three times, with the disk in state `fault` during the second."""
    saving = SavingRun(config)
    saving.folder = saving.checkpointer._folder = CheckpointFolder(disk / "checkpoints", keep=1)
    saving.take_steps(1)
    saving.save()
    saving.join_thread()
    set_disk(disk, fault)
    saving.take_steps(1)
    saving.save()
    saving.join_thread()
    after_fault = sorted(path.name for path in (disk / "checkpoints").iterdir())
    set_disk(disk, "none")
    saving.take_steps(1)
    saving.save()
    saving.checkpointer.close()
    return after_fault, sorted(path.name for path in (disk / "checkpoints").iterdir()), saving.log.lines


def set_disk(disk: Path, fault: str) -> None:
    """Make the disk full, read-only, or (`none`) usable again."""
    mode = "ro" if fault == "read-only" else "rw"
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
    if fault == "full":
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
            while filler.write(b"\0" * 4096):
                filler.flush()
    elif fault == "none":
        (disk / "filler").unlink(missing_ok=True)


def start_on_a_read_only_disk(config: RunConfig, disk: Path) -> list[str]:
    from pmlm_dist.config import ConfigError

    set_disk(disk, "read-only")
    with pytest.raises(ConfigError) as caught:
        SavingRun(replace(config, run_dir=disk / "run"))
    return caught.value.problems


def test_read_only_disk_raises_at_the_start(small_corpus: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=100):
        config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8)
        ((problem,),) = run_world(start_on_a_read_only_disk, 1, config, tmp_path / "disk")
    assert problem.startswith("no checkpoint can be written: ")
    assert "Read-only file system" in problem


@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.fault("F28", "F29")
def test_save_to_a_real_disk_that_is_full_or_read_only_costs_one_checkpoint(
    small_corpus: Path, tmp_path: Path, fault: str
):
    disk = tmp_path / "disk"
    with small_disk(disk, kilobytes=1500):
        config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8)
        ((after_fault, after_next, logged),) = run_world(save_three_times, 1, config, disk, fault)
        assert after_fault == ["latest", "step-00000001"]
        assert after_next == ["latest", "step-00000003"]
        assert checkpoint_problems(disk / "checkpoints/step-00000003") == []
    assert ("No space left" if fault == "full" else "Read-only file system") in logged[1]
