"""What the batch scripts do with exit codes and signals, with Slurm's commands replaced by recorders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
BATCH = [path for path in SCRIPTS if path.name != "common.sh"]

RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\n'
SCONTROL = RECORDER + '[ "$2" = hostnames ] && echo localhost\nexit 0\n'
SRUN = """#!/bin/bash
echo "srun $* MASTER_ADDR=$MASTER_ADDR" >> "$CALLS"
[ -z "$GAINED" ] || mkdir -p "$RUN_DIR/checkpoints/step-$GAINED"
[ -z "$WAITS" ] || { trap 'echo "srun got USR1" >> "$CALLS"; exit $CODE' USR1; trap 'exit $CODE' TERM
                     touch "$RUN_DIR/waiting"; for i in {1..300}; do sleep 0.1; done; }
exit $CODE
"""


@dataclass(frozen=True)
class Life:
    """One life of a job: its exit code, the commands it gave, what it said."""

    code: int
    calls: list[str]
    printed: str

    @property
    def requeued(self) -> bool:
        return any(call.startswith("scontrol requeue 77") for call in self.calls)

    @property
    def ended_its_chain(self) -> bool:
        return "scancel --quiet --state=PENDING 70" in self.calls


class Batch:
    """The batch script in a folder of its own."""

    def __init__(self, folder: Path):
        self.run_dir, self._calls, self.bin = folder / "run", folder / "calls", folder / "bin"
        self.run_dir.mkdir()
        self.bin.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": RECORDER}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, code: int, *, script: str = "pretrain_base.sh", **settings: str) -> subprocess.Popen[str]:
        self._calls.write_text("")
        environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "CODE": str(code),
            "RUN_DIR": str(self.run_dir),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "localhost",
            **settings,
        }
        command = ["bash", str(ROOT / "slurm" / script), "--train.seed", "3"]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self, process: subprocess.Popen[str]) -> Life:
        printed, _ = process.communicate(timeout=30)
        return Life(process.returncode, self._calls.read_text().splitlines(), printed)

    def live(self, code: int, *, gained: int | None = None, **settings: str) -> Life:
        """A life whose ranks end with `code`, after a checkpoint of step `gained`."""
        saved = {} if gained is None else {"GAINED": f"{gained:08d}"}
        return self.end(self.start(code, **saved, **settings))

    def signalled(self, code: int, number: signal.Signals, **settings: str) -> Life:
        """A life whose shell gets a signal while its ranks, which end with `code` then, are at work."""
        process = self.start(code, WAITS="yes", **settings)
        deadline = time.monotonic() + 20
        while not (self.run_dir / "waiting").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        if number == signal.SIGTERM:  # Slurm tells the ranks itself
            subprocess.run(["pkill", "-TERM", "-P", str(process.pid), "srun"], check=True)
        return self.end(process)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


IN_ARRAY: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}


def test_the_ranks_get_the_settings_and_the_arguments_of_sbatch(batch: Batch):
    (call, *_) = [call for call in batch.live(0, TP="2", GRACE_S="60").calls if call.startswith("srun")]
    assert "/.venv/bin/python train.py --preset base --corpus data/corpus" in call
    assert f"--run-dir {batch.run_dir} --ds-config ds_configs/base.json" in call
    assert "--parallel.tp 2 --train.grace-s 60 --train.seed 3" in call
    assert call.endswith("MASTER_ADDR=localhost")


def test_fine_tuning_gets_the_arguments_of_sbatch_and_is_restarted_by_the_same_rule(batch: Batch):
    attempt = batch.end(batch.start(137, script="finetune.sh", GAINED="00000003"))
    (call, *_) = [call for call in attempt.calls if call.startswith("srun")]
    assert "/.venv/bin/python -m pmlm_dist.cli finetune --train.seed 3 MASTER_ADDR=localhost" in call
    assert attempt.requeued
    assert not batch.end(batch.start(137, script="finetune.sh")).requeued


@pytest.mark.parametrize("script", ["pretrain_base.sh", "finetune.sh"])
def test_a_run_folder_with_spaces_and_signs_of_the_shell_is_only_a_name(tmp_path: Path, script: str):
    folder = tmp_path / "a run; $(touch PWNED) `touch PWNED` 'x' \"y\" *"
    folder.mkdir()
    batch = Batch(folder)
    for _ in range(2):
        attempt = batch.end(batch.start(75, script=script, GAINED="00000003"))
    assert attempt.requeued, attempt.printed
    assert (folder / "run" / ".restarts-77").exists()
    if script == "pretrain_base.sh":
        assert f"--run-dir {folder / 'run'} --ds-config ds_configs/base.json" in attempt.calls[1]
    assert not [path for path in (*ROOT.glob("*"), *tmp_path.rglob("*")) if path.name == "PWNED"]


def test_a_shell_that_has_outlived_its_life_leaves_the_job_alone(batch: Batch):
    """The job has other nodes by now: its daemon had died, so nobody has ended this shell."""
    (batch.bin / "scontrol").write_text(SCONTROL.replace("exit 0", '[ "$2" = job ] && echo "  Restarts=1 X=2"; exit 0'))
    attempt = batch.live(137)
    assert not attempt.requeued
    assert "Slurm has started this job again, life 1: nothing is left to do for life 0" in attempt.printed
    assert not list(batch.run_dir.glob(".restarts-*"))
    assert batch.live(137, SLURM_RESTART_COUNT="1").requeued


def test_a_container_image_replaces_the_environment(batch: Batch):
    calls = batch.live(0, CONTAINER="pmlm.sif").calls
    assert any(f"apptainer exec --nv --bind {ROOT} pmlm.sif python train.py" in call for call in calls)
    calls = batch.live(0, CONTAINER="pmlm.sif", CONTAINER_RUN="enter --gpu").calls
    assert any("enter --gpu pmlm.sif python train.py" in call for call in calls)


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_set_wrongly_ends_the_job_and_its_chain(batch: Batch, code: int):
    attempt = batch.live(code, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.ended_its_chain) == (code, False, True)
    attempt = batch.live(code)
    assert (attempt.code, attempt.requeued, attempt.ended_its_chain) == (code, False, False)


def test_a_job_that_was_told_to_stop_is_requeued_as_long_as_it_gains_steps(batch: Batch):
    for step in range(1, 8):
        attempt = batch.live(75, gained=step, MAX_FAILURES="2")
        assert attempt.requeued
        assert attempt.code == 75
    idle = [batch.live(75).requeued for _ in range(3)]
    assert idle == [True, True, False]


def test_in_a_chain_the_next_job_goes_on_instead(batch: Batch):
    attempt = batch.live(75, gained=3, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.ended_its_chain) == (0, False, False)
    attempt = batch.live(75, gained=4, ON_STOP="next")
    assert (attempt.code, attempt.requeued) == (0, False)


def test_a_failure_is_restarted_only_after_steps_were_gained(batch: Batch):
    assert batch.live(1).requeued, "the first failure has no restart before it"
    attempt = batch.live(1)
    assert not attempt.requeued
    assert attempt.code == 1
    assert "no step was gained since the last restart" in attempt.printed


def test_failures_are_bounded_even_if_steps_are_gained(batch: Batch):
    attempts = [batch.live(137, gained=step, MAX_FAILURES="3") for step in range(8, 13)]
    assert [attempt.requeued for attempt in attempts[:4]] == [True, True, True, False]
    assert attempts[3].code == 137
    assert "failure 4" in attempts[3].printed


def test_giving_up_ends_the_chain_too(batch: Batch):
    batch.live(1, **IN_ARRAY)
    attempt = batch.live(1, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.ended_its_chain) == (1, False, True)


def test_the_signal_before_the_limit_is_passed_on_to_the_ranks(batch: Batch):
    attempt = batch.signalled(75, signal.SIGUSR1, GAINED="00000005")
    assert "srun got USR1" in attempt.calls
    assert attempt.requeued


@pytest.mark.parametrize("code", [1, 138])
def test_ranks_that_fail_because_the_time_is_over_have_not_failed(batch: Batch, code: int):
    """A rank that dies of the signal before it listens, for example."""
    assert batch.signalled(code, signal.SIGUSR1, MAX_FAILURES="0").requeued


def test_a_run_that_completes_after_the_signal_is_complete(batch: Batch):
    attempt = batch.signalled(0, signal.SIGUSR1)
    assert (attempt.code, attempt.requeued) == (0, False)


def test_a_cancelled_job_waits_for_its_ranks_and_leaves_the_rest_to_slurm(batch: Batch):
    attempt = batch.signalled(75, signal.SIGTERM)
    assert (attempt.code, attempt.requeued) == (75, False)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_batch_scripts_hold_their_settings_first_and_no_path_of_a_site(script: Path):
    text = script.read_text()
    lines = text.splitlines()
    assert "set -euo pipefail" in lines
    assert text.index("# ------") > text.index("#SBATCH")
    for option in ("--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in text
    absolute = re.findall(r"^[^#\n]*[=\s\"'](/\w[^\s\"'}]*)", text, flags=re.MULTILINE)
    assert not absolute
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
