"""Whether a run is started again after it has ended, and a loop that does so where no batch system does.

    python -m pmlm_dist.supervision.restart run RUN_DIR -- deepspeed --num_gpus 8 train.py --run-dir RUN_DIR ...
    python -m pmlm_dist.supervision.restart decide RUN_DIR --key JOB --code 1        what slurm/common.sh asks

The rule is `next_life`; what an exit code means for it stands in `exit_codes.py`. What happened so far is kept in
RUN_DIR/.restarts-KEY, so that it outlives the job. Without torch.
"""

from __future__ import annotations

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

from pmlm_dist.checkpoint.folder import CheckpointFolder, step_of
from pmlm_dist.supervision import attempts
from pmlm_dist.supervision.exit_codes import SIGNALLED, ExitCode, RestartPolicy, describe, restart_policy
from pmlm_dist.supervision.failure_reports import LOGS, read_failure

_RESTART, _GIVE_UP = 0, 1


@dataclass(frozen=True)
class Limits:
    """How often a run is started again."""

    failures: int = 10
    idle_preemptions: int = 3
    """Lives in a row that were told to stop before they had gained a step."""


@dataclass(frozen=True)
class History:
    """What has become of the lives so far."""

    failures: int = 0
    step: int = -1
    """Of the newest checkpoint after the last life."""
    idle: int = 0
    """Lives in a row that gained no step."""
    code: int = 0
    """Of the last life."""

    @classmethod
    def load(cls, path: Path) -> History:
        """What `path` says; nothing yet when it is not there."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        part.replace(path)


@dataclass(frozen=True)
class Decision:
    """What follows the end of a life."""

    history: History
    reason_to_stop: str | None
    """Why the run is not started again; None when it is."""


def decide_restart(history: History, *, code: int, step: int, limits: Limits) -> Decision:
    """What follows a life that ended with `code`, `step` being that of the newest checkpoint then."""
    again = restart_policy(code)
    if again is RestartPolicy.NEVER:
        return Decision(history, describe(code))
    idle = 0 if step > history.step else history.idle + 1
    failures = history.failures + (again is not RestartPolicy.ALWAYS)
    new = History(failures=failures, step=step, idle=idle, code=code)
    if again is RestartPolicy.ALWAYS:
        return Decision(new, f"{idle} lives in a row gained no step" if idle >= limits.idle_preemptions else None)
    if failures > limits.failures:
        return Decision(new, f"this was failure {failures}")
    if idle:
        return Decision(new, "no step was gained since the last restart")
    if again is RestartPolicy.ONCE and history.code == code:
        return Decision(new, f"twice in a row: {describe(code)}; change the settings")
    return Decision(new, None)


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint in a run's folder, 0 without one."""
    return max((step_of(path) for path in CheckpointFolder(run_dir / "checkpoints", keep=1).steps()), default=0)


def exit_code_of_last_attempt(run_dir: Path, *, since: float, otherwise: int) -> int:
    """What the last life, if it began after `since`, ended with: launchers lose the codes of their ranks."""
    known = attempts.read_attempts(run_dir)
    if not known or known[-1].began < since:
        return otherwise
    cause = read_failure(run_dir / LOGS / known[-1].name)
    if cause is not None:
        return cause.code
    return otherwise if known[-1].code is None else known[-1].code


def decide(run_dir: Path, *, key: str, code: int, limits: Limits) -> int:
    """Apply the rule, keep the history, say what follows; 0 to go on, 1 to give up."""
    path = run_dir / f".restarts-{key}"
    step = newest_step(run_dir)
    decision = decide_restart(History.load(path), code=code, step=step, limits=limits)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    if decision.history != History():
        decision.history.save(path)
    if decision.reason_to_stop is None:
        print(f"{now} exit code {code} at step {step}: going on", flush=True)
        return _RESTART
    if code != ExitCode.DONE:
        print(f"{now} exit code {code}: not started again, {decision.reason_to_stop}", file=sys.stderr, flush=True)
    return _GIVE_UP


def run(run_dir: Path, command: Sequence[str], *, limits: Limits) -> int:
    """Run `command`, a launcher with train.py, until the rule says that it is over; its last code.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on, and then nothing is started again.
    """
    told: list[int] = []
    key = f"local-{os.getpid()}"
    while True:
        began = time.time()
        process = subprocess.Popen(command)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(
                number, lambda heard, _frame, process=process: (told.append(heard), process.send_signal(heard))
            )
        code = process.wait()
        code = exit_code_of_last_attempt(run_dir, since=began, otherwise=code if code >= 0 else SIGNALLED - code)
        if told or decide(run_dir, key=key, code=code, limits=limits) == _GIVE_UP:
            (run_dir / f".restarts-{key}").unlink(missing_ok=True)
            return code


def main(arguments: Sequence[str]) -> int:
    """The command line above."""
    default = Limits()
    parser = argparse.ArgumentParser(prog="python -m pmlm_dist.supervision.restart", description=__doc__)
    parser.add_argument("what", choices=["run", "decide"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--key", default="job", help="name of the job whose lives are counted")
    parser.add_argument("--code", type=int, default=0, help="exit code of the life that has ended")
    parser.add_argument("--max-failures", type=int, default=default.failures)
    parser.add_argument("--max-idle-preemptions", type=int, default=default.idle_preemptions)
    parser.add_argument("command", nargs="*", help="after --: what `run` runs")
    known = parser.parse_args(arguments)
    limits = Limits(failures=known.max_failures, idle_preemptions=known.max_idle_preemptions)
    if known.what == "run":
        if not known.command:
            parser.error("`run` needs a command after --")
        return run(known.run_dir, known.command, limits=limits)
    return decide(known.run_dir, key=known.key, code=known.code, limits=limits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
