"""The restart rule: is a run restarted after it has ended? With a restart loop for machines without a batch system.

    python -m pmlm_dist.supervision.restart run RUN_DIR -- deepspeed --num_gpus 8 train.py --run-dir RUN_DIR ...
    python -m pmlm_dist.supervision.restart decide RUN_DIR --key JOB --code 1        used by slurm/common.sh

`decide_restart` is the rule; `exit_codes.py` has the policy of each exit code. RUN_DIR/.restarts-KEY holds the history
of the job, which outlives its processes. Without torch.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pmlm_dist.checkpoint.folder import CheckpointFolder, step_of
from pmlm_dist.console import prepare_streams, print_safely
from pmlm_dist.files import write_atomically
from pmlm_dist.supervision import attempts
from pmlm_dist.supervision.exit_codes import SIGNALLED, ExitCode, RestartPolicy, describe, restart_policy
from pmlm_dist.supervision.failure_reports import LOGS, read_failure

_RESTART, _STOP = 0, 1


@dataclass(frozen=True)
class RestartLimits:
    """How often a run is restarted."""

    failures: int = 10
    preemptions_without_progress: int = 3
    """Preemptions in a row without a new checkpoint."""


@dataclass(frozen=True)
class RestartHistory:
    """Ends of a job's attempts so far."""

    failures: int = 0
    step: int = -1
    """Newest checkpoint at the end of the last attempt."""
    without_progress: int = 0
    """Attempts in a row without a new checkpoint."""
    code: int = 0
    """Exit code of the last attempt."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the history from `path`; an empty one without that file."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class Decision:
    """The decision after the end of an attempt."""

    history: RestartHistory
    reason_to_stop: str | None
    """None if the run is restarted."""


def decide_restart(history: RestartHistory, *, code: int, step: int, limits: RestartLimits) -> Decision:
    """Decide after an attempt that ended with `code`, when the newest checkpoint was that of `step`."""
    policy = restart_policy(code)
    if policy is RestartPolicy.NEVER:
        return Decision(history, describe(code))
    without_progress = 0 if step > history.step else history.without_progress + 1
    failures = history.failures + (policy is not RestartPolicy.ALWAYS)
    new = RestartHistory(failures=failures, step=step, without_progress=without_progress, code=code)
    return Decision(new, _reason_to_stop(new, policy=policy, last_code=history.code, limits=limits))


def _reason_to_stop(
    history: RestartHistory, *, policy: RestartPolicy, last_code: int, limits: RestartLimits
) -> str | None:
    if policy is RestartPolicy.ALWAYS:
        reached = history.without_progress >= limits.preemptions_without_progress
        return f"{history.without_progress} preemptions in a row without progress" if reached else None
    if history.failures > limits.failures:
        return f"this was failure {history.failures}, the limit is {limits.failures}"
    if history.without_progress:
        return "no progress since the last restart"
    if policy is RestartPolicy.ONCE and history.code == last_code:
        return f"twice in a row: {describe(last_code)}; change the settings"
    return None


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint of a run; 0 without one."""
    return max((step_of(path) for path in CheckpointFolder(run_dir / "checkpoints", keep=1).steps()), default=0)


def exit_code_of_last_attempt(run_dir: Path, *, since: float, default: int) -> int:
    """Return the exit code of the last attempt, if it started after `since`: launchers lose their ranks' codes."""
    records = attempts.read_attempts(run_dir)
    if not records or records[-1].start_time < since:
        return default
    failure = read_failure(run_dir / LOGS / records[-1].name)
    if failure is not None:
        return failure.code
    return default if records[-1].code is None else records[-1].code


def decide(run_dir: Path, *, key: str, code: int, limits: RestartLimits) -> int:
    """Apply the rule, save the history, print the decision. Returns 0 to restart, 1 to stop."""
    path = run_dir / f".restarts-{key}"
    step = newest_step(run_dir)
    decision = decide_restart(RestartHistory.load(path), code=code, step=step, limits=limits)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if decision.history != RestartHistory():
        decision.history.save(path)
    if decision.reason_to_stop is None:
        print_safely(f"{now} exit code {code} at step {step}: restarting")
        return _RESTART
    if code != ExitCode.DONE:
        print_safely(f"{now} exit code {code}: not restarted, {decision.reason_to_stop}", to_stderr=True)
    return _STOP


def run(run_dir: Path, command: Sequence[str], *, limits: RestartLimits) -> int:
    """Run `command`, a launcher with train.py, until the rule stops it; return the last exit code.

    SIGTERM, SIGUSR1 and Ctrl-C are forwarded; after one of them the command is not restarted.
    """
    received: list[int] = []
    key = f"local-{os.getpid()}"
    while True:
        start_time = time.time()
        process = subprocess.Popen(command)

        def forward(number: int, _frame: object, process: subprocess.Popen[bytes] = process) -> None:
            received.append(number)
            process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, forward)
        code = process.wait()
        code = code if code >= 0 else SIGNALLED - code
        code = exit_code_of_last_attempt(run_dir, since=start_time, default=code)
        if received or decide(run_dir, key=key, code=code, limits=limits) == _STOP:
            (run_dir / f".restarts-{key}").unlink(missing_ok=True)
            return code


def main(arguments: Sequence[str]) -> int:
    """Parse the command line of the module's docstring and run it."""
    prepare_streams()
    default = RestartLimits()
    parser = argparse.ArgumentParser(prog="python -m pmlm_dist.supervision.restart", description=__doc__)
    parser.add_argument("action", choices=["run", "decide"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--key", default="job", help="name of the job, for the history of its restarts")
    parser.add_argument("--code", type=int, default=0, help="exit code of the attempt that has ended")
    parser.add_argument("--max-failures", type=int, default=default.failures)
    parser.add_argument("--max-preemptions-without-progress", type=int, default=default.preemptions_without_progress)
    parser.add_argument("command", nargs="*", help="after --: the command of `run`")
    known = parser.parse_args(arguments)
    limits = RestartLimits(known.max_failures, known.max_preemptions_without_progress)
    if known.action == "run":
        if not known.command:
            parser.error("`run` needs a command after --")
        return run(known.run_dir, known.command, limits=limits)
    return decide(known.run_dir, key=known.key, code=known.code, limits=limits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
