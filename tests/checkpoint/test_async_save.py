"""Saving while training goes on: what is saved is the step it says, and what goes wrong costs that checkpoint alone."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.small_runs import run_config, start_run, take_steps, with_train
from support.worlds import RankFailed, run_world

from pmlm_dist.checkpoint import async_save as saver_module
from pmlm_dist.checkpoint.files import checkpoint_problems
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import RunConfig
from pmlm_dist.metrics.run_log import read_metrics

pytestmark = pytest.mark.distributed


class Said:
    """What a log was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed: list[int] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def failed_checkpoints(self, count: int, *, step: int) -> None:
        self.failed.append(count)


class Training:
    """A run on this rank that saves when it is told to."""

    def __init__(self, config: RunConfig, *, timeout_s: float = 60):
        from pmlm_dist.checkpoint.engine_state import EngineState
        from pmlm_dist.training.pretraining import build_engine

        self.run = start_run(config)
        self.engine = build_engine(self.run)
        self.state, self.said = RunState(), Said()
        self.folder = CheckpointFolder(self.run.checkpoints, keep=9)
        log: Any = self.said
        about = {"identity": self.run.identity(), "configuration": self.run.configuration()}
        engine_state = EngineState(self.engine, self.run.topology)
        self.checkpointer = saver_module.AsyncCheckpointer(
            engine_state, self.folder, log, about=about, timeout_s=timeout_s
        )

    @property
    def rank(self) -> int:
        return self.run.topology.rank

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.state, _, _ = take_steps(self.run, self.engine, self.state, steps=1)
            self.checkpointer.log_finished()

    def save(self) -> None:
        self.checkpointer.save(self.state)

    def wait_until_written(self) -> None:
        writer = self.checkpointer._writer
        assert writer is not None
        writer.join(60)
        self.run.topology.barrier()
        self.checkpointer.log_finished()

    def left(self) -> list[str]:
        self.run.topology.barrier()
        return sorted(path.name for path in self.run.checkpoints.iterdir())


@contextlib.contextmanager
def patched(name: str, change: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of the saver's module by `change(function, *args)`."""
    function = getattr(saver_module, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver_module, name, lambda *args: change(function, *args))
        yield


def weights(path: Path) -> dict[str, np.ndarray]:
    """The numbers in a checkpoint by file and name."""
    return {
        f"{file.name}/{name}": value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def check_equal(first: Path, second: Path) -> None:
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    assert len(expected) > 60
    assert all(np.array_equal(value, found[name]) for name, value in expected.items())


# --------------------------------------------------------------------------------------------------- going on meanwhile


def steps_during_a_write(config: RunConfig) -> tuple[list[str], list[str], list[str]]:
    """Save after step 2, take 3 steps while the writer stands still, then let it go on."""
    training, released = Training(config), threading.Event()
    training.steps(2)
    with patched("write_numbers", lambda write, *args: (released.wait(60), write(*args))[1]):
        training.save()
        training.steps(3)
        meanwhile = training.left()
        released.set()
        training.checkpointer.close()
    return meanwhile, training.left(), training.said.lines


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {"zero": 0, "micro_batch": 8}), (2, {"zero": 3}), (2, {"zero": 2})]
)
def test_training_goes_on_while_a_checkpoint_is_written(
    small_corpus: Path, tmp_path: Path, ranks: int, settings: dict[str, Any]
):
    config = run_config(small_corpus, tmp_path / "run", steps=9, **settings)
    (meanwhile, after, said), *_ = run_world(steps_during_a_write, ranks, config)
    assert [name for name in meanwhile if ".tmp" not in name] == []
    assert after == ["latest", "step-00000002"]
    assert said == [f"checkpoint: {tmp_path / 'run/checkpoints/step-00000002'}"]
    straight = replace(config, run_dir=tmp_path / "straight")
    run_world(saved_at, ranks, straight, 2)
    check_equal(straight.run_dir / "checkpoints/step-00000002", config.run_dir / "checkpoints/step-00000002")


def saved_at(config: RunConfig, step: int) -> None:
    training = Training(config)
    training.steps(step)
    training.save()
    training.checkpointer.close()


def steps_during_a_copy(config: RunConfig) -> float:
    """Save after step 2 with a copy that starts late, and take two more steps."""
    training = Training(config)
    training.steps(2)
    before = training.checkpointer.stalled_s
    take = saver_module.StagingBuffer.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver_module.StagingBuffer, "take", lambda *args: (time.sleep(0.5), take(*args)))
        training.save()
        training.steps(2)
        training.checkpointer.close()
    return training.checkpointer.stalled_s - before


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"zero": 1, "precision": "bf16"}])
def test_weights_do_not_change_before_they_are_copied(small_corpus: Path, tmp_path: Path, settings: dict[str, Any]):
    """Steps of this model take a few milliseconds: without the wait the copy would be that of a later step."""
    config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8, **settings)
    straight = replace(config, run_dir=tmp_path / "straight")
    (stalled_s,) = run_world(steps_during_a_copy, 1, config)
    assert stalled_s > 0
    run_world(saved_at, 1, straight, 2)
    check_equal(straight.run_dir / "checkpoints/step-00000002", config.run_dir / "checkpoints/step-00000002")


def slow_storage(config: RunConfig) -> list[str]:
    """Rank 1's disk takes longer than a collective may."""
    training = Training(config)
    training.steps(1)
    seconds = 5.0 if training.rank == 1 else 0.0
    with patched("write_numbers", lambda write, *args: (time.sleep(seconds), write(*args))[1]):
        training.save()
        training.steps(1)
        training.save()  # waits for the first
        training.checkpointer.close()
    return training.left()


@pytest.mark.fault("F30")
def test_a_disk_slower_than_the_collectives_timeout_does_not_end_the_run(small_corpus: Path, tmp_path: Path):
    config = with_train(run_config(small_corpus, tmp_path, steps=9), collective_timeout_s=3)
    assert run_world(slow_storage, 2, config)[0] == ["latest", "step-00000001", "step-00000002"]


# ------------------------------------------------------------------------------------------------------------- failing


@dataclass(frozen=True)
class Failed:
    """What a rank saw of a save that failed between two that did not."""

    after_failure: list[str]
    after_next: list[str]
    said: list[str]
    counted: list[int]
    last_loss_step: int


def fails_once(config: RunConfig, rank: int, *, dumb: bool) -> Failed:
    """Save after steps 1, 2 and 3; the second save fails on `rank`, which (`dumb`) cannot even say so."""
    training = Training(config)
    training.steps(1)
    training.save()
    training.wait_until_written()

    def full(write: Any, path: Path, *args: Any) -> Any:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    training.steps(1)
    with contextlib.ExitStack() as here:
        if training.rank == rank:
            here.enter_context(patched("write_numbers", full))
            if dumb:
                here.enter_context(patched("write_json", full))
        training.save()
        if not dumb:  # rank 0 learns of it from a file
            training.wait_until_written()
        else:  # rank 0 learns of it when all meet for the next save
            writer = training.checkpointer._writer
            assert writer is not None
            if training.rank == rank:
                writer.join(60)
    after_failure = training.left()
    training.steps(1)
    training.save()
    training.checkpointer.close()
    said = training.said
    return Failed(after_failure, training.left(), said.lines, said.failed, training.state.step)


@pytest.mark.parametrize(("rank", "dumb"), [(0, False), (1, False), (1, True)])
@pytest.mark.fault("F28")
def test_a_full_disk_costs_one_checkpoint_and_is_said_and_counted(
    small_corpus: Path, tmp_path: Path, rank: int, dumb: bool
):
    config = run_config(small_corpus, tmp_path, steps=9)
    first, second = run_world(fails_and_goes_on, 2, config, rank, dumb)
    if not dumb:
        assert first.after_failure == ["latest", "step-00000001"]
    assert first.after_next == ["latest", "step-00000001", "step-00000003"]
    assert [line.split(":")[0] for line in first.said] == ["checkpoint", "warning", "checkpoint"]
    assert "the checkpoint of step 2 was not written" in first.said[1]
    assert "No space left on device" in first.said[1]
    assert ("rank 1" in first.said[1]) == (rank == 1)
    assert first.counted == [1]
    assert first.last_loss_step == second.last_loss_step == 3
    assert all(not checkpoint_problems(tmp_path / "checkpoints" / name) for name in first.after_next if "step" in name)


def fails_and_goes_on(config: RunConfig, rank: int, dumb: bool) -> Failed:
    return fails_once(config, rank, dumb=dumb)


def hangs(config: RunConfig) -> tuple[list[str], list[str]]:
    """Rank 1's first write never ends in time; the second does, and the first then ends after all."""
    training, released, calls = Training(config, timeout_s=1), threading.Event(), []

    def hang(write: Any, *args: Any) -> Any:
        calls.append(args)
        if training.rank == 1 and len(calls) == 1:
            released.wait(60)
        return write(*args)

    with patched("write_numbers", hang):
        training.steps(1)
        training.save()
        hung = training.checkpointer._writer
        training.steps(1)
        training.save()
        training.wait_until_written()
        released.set()
        assert hung is not None
        hung.join(60)
        training.checkpointer.close()
    return training.left(), training.said.lines


@pytest.mark.fault("F31")
def test_a_write_that_hangs_is_given_up_and_never_counts(small_corpus: Path, tmp_path: Path):
    (left, said), _ = run_world(hangs, 2, run_config(small_corpus, tmp_path, steps=9))
    assert [name for name in left if ".tmp" not in name] == ["latest", "step-00000002"]
    assert "the checkpoint of step 1 was not written" in said[0]
    assert "longer than --train.save-timeout-s" in said[0]
    assert checkpoint_problems(tmp_path / "checkpoints/step-00000002") == []


def folders_apart(config: RunConfig, elsewhere: Path) -> list[str]:
    """Why rank 1 of a run is refused whose node has a disk of its own at the same place."""
    from pmlm_dist.config import ConfigError

    if int(os.environ["RANK"]) == 1:
        config = replace(config, run_dir=elsewhere)
    try:
        Training(config)
    except ConfigError as error:
        return error.problems
    return []


def test_a_folder_that_not_all_ranks_share_is_refused_at_the_start(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path / "here", steps=9)
    first, second = run_world(folders_apart, 2, config, tmp_path / "there")
    assert len(first) == len(second) == 1
    assert "rank 1 does not see in" in first[0]
    assert "that all nodes share" in first[0]


def broken_program(config: RunConfig) -> None:
    training = Training(config)
    training.steps(1)
    with patched("write_numbers", lambda *_: 1 / 0):
        training.save()
        training.checkpointer.close()


@pytest.mark.fault("F31")
def test_a_fault_of_the_program_ends_the_run(small_corpus: Path, tmp_path: Path):
    with pytest.raises(RankFailed, match="ZeroDivisionError"):
        run_world(broken_program, 1, run_config(small_corpus, tmp_path, steps=9, micro_batch=8))


@contextlib.contextmanager
def small_disk(folder: Path, *, kilobytes: int) -> Iterator[None]:
    """A file system of its own at `folder`; skips where none may be mounted."""
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


def onto_a_small_disk(config: RunConfig, disk: Path, trouble: str) -> tuple[list[str], list[str], list[str]]:
    """Three saves; the second meets `trouble`, which is over before the third."""
    training = Training(config)
    training.folder = training.checkpointer._folder = CheckpointFolder(disk / "checkpoints", keep=1)
    training.steps(1)
    training.save()
    training.wait_until_written()
    make(disk, trouble)
    training.steps(1)
    training.save()
    training.wait_until_written()
    left = sorted(path.name for path in (disk / "checkpoints").iterdir())
    make(disk, "none")
    training.steps(1)
    training.save()
    training.checkpointer.close()
    return left, sorted(path.name for path in (disk / "checkpoints").iterdir()), training.said.lines


def make(disk: Path, trouble: str) -> None:
    """Fill the disk, make it read-only, or take that back."""
    mode = "ro" if trouble == "read-only" else "rw"
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
    if trouble == "full":
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
            while filler.write(b"\0" * 4096):
                filler.flush()
    elif trouble == "none":
        (disk / "filler").unlink(missing_ok=True)


def onto_a_read_only_disk(config: RunConfig, disk: Path) -> list[str]:
    from pmlm_dist.config import ConfigError

    make(disk, "read-only")
    with pytest.raises(ConfigError) as caught:
        Training(replace(config, run_dir=disk / "run"))
    return caught.value.problems


def test_a_read_only_disk_is_refused_at_the_start(small_corpus: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=100):
        config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8)
        ((problem,),) = run_world(onto_a_read_only_disk, 1, config, tmp_path / "disk")
    assert problem.startswith("no checkpoint can be written: ")
    assert "Read-only file system" in problem


@pytest.mark.parametrize("trouble", ["full", "read-only"])
@pytest.mark.fault("F28", "F29")
def test_a_real_disk_that_is_full_or_read_only(small_corpus: Path, tmp_path: Path, trouble: str):
    disk = tmp_path / "disk"
    with small_disk(disk, kilobytes=1500):
        config = run_config(small_corpus, tmp_path / "run", steps=9, micro_batch=8)
        ((left, after, said),) = run_world(onto_a_small_disk, 1, config, disk, trouble)
        assert left == ["latest", "step-00000001"]
        assert after == ["latest", "step-00000003"]
        assert checkpoint_problems(disk / "checkpoints/step-00000003") == []
    assert ("No space left" if trouble == "full" else "Read-only file system") in said[1]


# ------------------------------------------------------------------------------------------------------ ends of the run


def pretrained(config: RunConfig) -> str:
    """Pre-train on this rank; what it printed."""
    from pmlm_dist.training.run import pretrain

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(config)
    return printed.getvalue()


def dying(config: RunConfig, rank: int, moment: str) -> None:
    """Pre-train; the process of `rank` is killed at a moment of the save after step 4."""

    def die(function: Any, *args: Any) -> Any:
        here = any("step-00000004" in str(arg) for arg in args)
        if here and int(os.environ["RANK"]) == rank:
            if moment == "write_numbers":  # half of the file is there
                function(*args)
                os.truncate(args[0], args[0].stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    with patched(moment, die):
        pretrained(config)


@pytest.mark.parametrize(
    ("rank", "moment"), [(1, "write_numbers"), (1, "write_json"), (0, "write_json"), (0, "read_json")]
)
@pytest.mark.fault("F20")
def test_a_kill_during_a_save_costs_the_steps_since_the_one_before(
    small_corpus: Path, tmp_path: Path, rank: int, moment: str
):
    """In the middle of a rank's file, before it tells that it is done, before `state.json`, while rank 0 collects."""
    config = with_train(run_config(small_corpus, tmp_path / "run", steps=6), checkpoint_every=2)
    straight = replace(config, run_dir=tmp_path / "straight")
    run_world(pretrained, 2, straight)
    with pytest.raises(RankFailed):
        run_world(dying, 2, config, rank, moment)
    assert sorted(path.name for path in (config.run_dir / "checkpoints").glob("step-*[0-9]")) != []
    assert checkpoint_problems(config.run_dir / "checkpoints/step-00000004") != []
    first, _ = run_world(pretrained, 2, config)
    assert "resuming after step 2" in first
    assert not list((config.run_dir / "checkpoints").glob("*.tmp*"))
    check_equal(straight.run_dir / "checkpoints/step-00000006", config.run_dir / "checkpoints/step-00000006")


def cannot_write_the_last(config: RunConfig) -> str:
    def full(write: Any, path: Path, *args: Any) -> Any:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args)

    with patched("write_numbers", full), pytest.raises(RuntimeError) as caught:
        pretrained(config)
    return str(caught.value)


def test_a_run_whose_last_checkpoint_fails_is_not_complete_and_can_be_started_again(small_corpus: Path, tmp_path: Path):
    config = with_train(run_config(small_corpus, tmp_path, steps=4), checkpoint_every=2)
    said = run_world(cannot_write_the_last, 2, config)
    assert all("the last checkpoint, of step 4, could not be written" in line for line in said)
    assert not (tmp_path / "COMPLETE").exists()
    assert read_metrics(tmp_path)[4]["checkpoint/failed"] == 1
    assert "resuming after step 2" in run_world(pretrained, 2, config)[0]
    assert json.loads((tmp_path / "COMPLETE").read_text())["step"] == 4


def test_a_run_keeps_the_newest_and_every_kth_and_removes_leftovers(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path, steps=7, micro_batch=8)
    config = with_train(config, checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    leftover = tmp_path / "checkpoints/step-00000002.tmp-dead"
    leftover.mkdir(parents=True)
    (printed,) = run_world(pretrained, 1, config)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        *(f"step-{step:08d}" for step in (3, 6, 7)),
    ]
    assert printed.count("checkpoint: ") == 7
    shutil.rmtree(folder / "step-00000007")
    assert "resuming after step 6" in run_world(pretrained, 1, config)[0]
