"""Batch scripts: restarts by exit code and signal. SLURM's commands are replaced by recorders."""

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
BATCH = [path for path in SCRIPTS if not path.name.endswith("common.sh")]

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
class Attempt:
    """One attempt of a job: its exit code, the SLURM commands it ran, its output."""

    code: int
    calls: list[str]
    printed: str

    @property
    def requeued(self) -> bool:
        return any(call.startswith("scontrol requeue 77") for call in self.calls)

    @property
    def cancelled_its_chain(self) -> bool:
        return "scancel --quiet --state=PENDING 70" in self.calls


class Batch:
    """A batch script with a run folder and fake SLURM commands."""

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

    def end(self, process: subprocess.Popen[str]) -> Attempt:
        printed, _ = process.communicate(timeout=30)
        return Attempt(process.returncode, self._calls.read_text().splitlines(), printed)

    def run(self, code: int, *, gained: int | None = None, **settings: str) -> Attempt:
        """An attempt whose ranks end with `code`, after a checkpoint of step `gained`."""
        saved = {} if gained is None else {"GAINED": f"{gained:08d}"}
        return self.end(self.start(code, **saved, **settings))

    def signalled(self, code: int, number: signal.Signals, **settings: str) -> Attempt:
        """An attempt whose shell receives a signal while its ranks run; they end with `code` then."""
        process = self.start(code, WAITS="yes", **settings)
        deadline = time.monotonic() + 20
        while not (self.run_dir / "waiting").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        if number == signal.SIGTERM:  # SLURM sends it to the ranks as well
            subprocess.run(["pkill", "-TERM", "-P", str(process.pid), "srun"], check=True)
        return self.end(process)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


IN_ARRAY: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}


def test_ranks_get_settings_and_arguments_of_sbatch(batch: Batch):
    (call, *_) = [call for call in batch.run(0, TP="2", GRACE_S="60").calls if call.startswith("srun")]
    assert "/.venv/bin/python train.py --preset base --corpus data/corpus" in call
    assert f"--run-dir {batch.run_dir} --ds-config ds_configs/base.json" in call
    assert "--parallel.tp 2 --train.grace-s 60 --train.seed 3" in call
    assert call.endswith("MASTER_ADDR=localhost")


def test_finetune_script_gets_arguments_and_restarts_by_the_same_rule(batch: Batch):
    attempt = batch.end(batch.start(137, script="finetune.sh", GAINED="00000003"))
    (call, *_) = [call for call in attempt.calls if call.startswith("srun")]
    assert "/.venv/bin/python -m pmlm_dist.cli finetune --train.seed 3 MASTER_ADDR=localhost" in call
    assert attempt.requeued
    assert not batch.end(batch.start(137, script="finetune.sh")).requeued


@pytest.mark.parametrize("script", ["pretrain_base.sh", "finetune.sh"])
def test_shell_characters_in_run_folder_are_not_evaluated(tmp_path: Path, script: str):
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


def test_shell_of_an_older_attempt_does_not_requeue(batch: Batch):
    """SLURM has restarted the job on other nodes after the death of a daemon, which could not end this shell."""
    (batch.bin / "scontrol").write_text(SCONTROL.replace("exit 0", '[ "$2" = job ] && echo "  Restarts=1 X=2"; exit 0'))
    attempt = batch.run(137)
    assert not attempt.requeued
    assert "SLURM has restarted this job, attempt 1: nothing left to do for attempt 0" in attempt.printed
    assert not list(batch.run_dir.glob(".restarts-*"))
    assert batch.run(137, SLURM_RESTART_COUNT="1").requeued


def test_container_image_replaces_virtual_environment(batch: Batch):
    calls = batch.run(0, CONTAINER="pmlm.sif").calls
    assert any(f"apptainer exec --nv --bind {ROOT} pmlm.sif python train.py" in call for call in calls)
    calls = batch.run(0, CONTAINER="pmlm.sif", CONTAINER_RUN="enter --gpu").calls
    assert any("enter --gpu pmlm.sif python train.py" in call for call in calls)


@pytest.mark.parametrize("code", [0, 2])
def test_complete_or_misconfigured_run_ends_job_and_chain(batch: Batch, code: int):
    attempt = batch.run(code, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.cancelled_its_chain) == (code, False, True)
    attempt = batch.run(code)
    assert (attempt.code, attempt.requeued, attempt.cancelled_its_chain) == (code, False, False)


def test_preempted_job_is_requeued_while_it_makes_progress(batch: Batch):
    for step in range(1, 5):
        attempt = batch.run(75, gained=step, MAX_FAILURES="2")
        assert attempt.requeued
        assert attempt.code == 75
    without_progress = [batch.run(75).requeued for _ in range(3)]
    assert without_progress == [True, True, False]


def test_job_of_a_chain_leaves_the_run_to_the_next_job(batch: Batch):
    attempt = batch.run(75, gained=3, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.cancelled_its_chain) == (0, False, False)
    attempt = batch.run(75, gained=4, ON_STOP="next")
    assert (attempt.code, attempt.requeued) == (0, False)


def test_failed_job_is_requeued_only_after_progress(batch: Batch):
    assert batch.run(1).requeued, "the first failure has no restart before it"
    attempt = batch.run(1)
    assert not attempt.requeued
    assert attempt.code == 1
    assert "no progress since the last restart" in attempt.printed


def test_failures_are_limited_despite_progress(batch: Batch):
    attempts = [batch.run(137, gained=step, MAX_FAILURES="3") for step in range(8, 13)]
    assert [attempt.requeued for attempt in attempts[:4]] == [True, True, True, False]
    assert attempts[3].code == 137
    assert "failure 4" in attempts[3].printed


def test_failed_job_without_progress_cancels_its_chain(batch: Batch):
    batch.run(1, **IN_ARRAY)
    attempt = batch.run(1, **IN_ARRAY)
    assert (attempt.code, attempt.requeued, attempt.cancelled_its_chain) == (1, False, True)


def test_signal_before_time_limit_is_forwarded_to_ranks(batch: Batch):
    attempt = batch.signalled(75, signal.SIGUSR1, GAINED="00000005")
    assert "srun got USR1" in attempt.calls
    assert attempt.requeued


@pytest.mark.parametrize("code", [1, 138])
def test_failure_after_signal_counts_as_preemption(batch: Batch, code: int):
    """For example of a rank that received the signal before it installed its handler."""
    assert batch.signalled(code, signal.SIGUSR1, MAX_FAILURES="0").requeued


def test_run_complete_after_signal_is_not_requeued(batch: Batch):
    attempt = batch.signalled(0, signal.SIGUSR1)
    assert (attempt.code, attempt.requeued) == (0, False)


def test_cancelled_job_waits_for_its_ranks_and_is_not_requeued(batch: Batch):
    attempt = batch.signalled(75, signal.SIGTERM)
    assert (attempt.code, attempt.requeued) == (75, False)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_batch_script_has_sbatch_lines_first_and_no_absolute_path(script: Path):
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
def test_script_is_valid_bash(script: Path):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
