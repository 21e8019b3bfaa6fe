"""Jobs of supervised ranks with injected faults, and the check that a run has recovered from them.

    Fault(kill, rank=1, step=7)  --run_with_restarts-->  attempt 1, attempt 2, ...  --check_recovered-->  bit-exact

A job is what a launcher starts: the ranks of one attempt, each below its supervisor as in train.py, forked from the
server of support/worlds.py so that a start takes a second. The rule of the batch scripts (supervision/restart.py)
decides on restarts. A fault is injected into one rank's training loop, once, at a step.
"""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmlm_dist.config import RunConfig, WatchdogConfig
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.supervision.attempts import AttemptRecord, read_attempts
from pmlm_dist.supervision.restart import RestartHistory, RestartLimits, decide_restart, newest_step
from support import worlds
from support.small_runs import run_config, with_train

RANKS = 2
STEPS, EVERY = 20, 5
LIMIT_S = 6.0
"""Limit of every phase but start-up: long for a step of milliseconds, also on a busy machine."""
DUPLICATE_S = 0.3
"""Signals this soon after the first repeat the same request."""
IDS = "ids.jsonl"


@dataclass(frozen=True)
class Fault:
    """A function that `rank` calls at the start of `step`, or of the first step after it."""

    inject: Callable[[], Any]
    rank: int = 1
    step: int = 7
    every_attempt: bool = False
    """Inject it in every attempt, not in the first alone."""


def small_run(
    corpus: Path, run_dir: Path, *, steps: int = STEPS, every: int = EVERY, log_every: int = 1, **engine: Any
) -> RunConfig:
    """Return the settings of a run with short limits and a checkpoint every few steps."""
    config = run_config(corpus, run_dir, steps=steps, micro_batch=2, **engine)
    config = with_train(config, checkpoint_every=every, log_every=log_every)
    limits = dict.fromkeys(("data_s", "step_s", "save_s", "validation_s"), LIMIT_S)
    return replace(config, watchdog=WatchdogConfig(startup_s=60, **limits))


# --------------------------------------------------------------------------------------------------------------- ranks


def rank_of_job(config: RunConfig, faults: Sequence[Fault], environ: dict[str, str], log: str) -> None:
    """Run a supervised rank and exit with the supervisor's code. All output goes to `log`."""
    import torch

    from pmlm_dist.supervision.supervisor import SupervisorTimes, run_supervised

    torch.set_num_threads(1)
    os.environ.update(environ)
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # Reports may take long on a busy machine; a hung rank that is resumed before them changes the other stacks.
    times = SupervisorTimes(poll_s=0.1, failure_poll_s=0.3, reports_s=15.0)
    code = run_supervised(lambda heartbeat: _train(config, faults, heartbeat), times=times)
    os._exit(code)


def _train(config: RunConfig, faults: Sequence[Fault], heartbeat: Any) -> None:
    """Train as train.py does, with injected faults and a record of the sample ids of every step."""
    from pmlm_dist.supervision.signals import SignalTimes, StopSignals
    from pmlm_dist.training import loop
    from pmlm_dist.training.run import pretrain

    rank, step = int(os.environ["RANK"]), loop.train_step
    pending = [fault for fault in faults if fault.rank == rank]
    signals = StopSignals(times=SignalTimes(duplicate_s=DUPLICATE_S))
    signals.install()
    _inject_due(config, pending, step=0)

    def step_with_faults(job: Any, engine: Any, micro_batches: Any, state: Any, stopwatch: Any, **begin: Any) -> Any:
        _write_ids(config, rank, state.step + 1, micro_batches)
        _inject_due(config, pending, step=state.step + 1)
        return step(job, engine, micro_batches, state, stopwatch, **begin)

    loop.train_step = step_with_faults
    pretrain(config, signals, heartbeat)


def _inject_due(config: RunConfig, pending: list[Fault], *, step: int) -> None:
    """Inject the faults that are due; a marker file keeps a fault from a second attempt."""
    for fault in [fault for fault in pending if fault.step <= step]:
        pending.remove(fault)
        injected = config.run_dir / f".injected-{fault.rank}-{fault.step}"
        if fault.every_attempt or not injected.exists():
            injected.parent.mkdir(parents=True, exist_ok=True)
            injected.touch()
            fault.inject()


def _write_ids(config: RunConfig, rank: int, step: int, batches: list[Any]) -> None:
    samples = [
        [int(epoch), int(number)]
        for batch in batches
        for epoch, number in zip(batch.epochs_B, batch.sample_ids_B, strict=True)
    ]
    open_files = len(os.listdir("/proc/self/fd"))
    with (config.run_dir / IDS).open("a") as lines:
        facts = {"rank": rank, "step": step, "samples": samples, "pid": os.getpid(), "open_files": open_files}
        lines.write(json.dumps(facts) + "\n")


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """One attempt of a run: the processes of its supervisors."""

    config: RunConfig
    processes: list[Any]
    log: Path

    @property
    def printed(self) -> str:
        """Output of supervisors and ranks so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, *, within_s: float = 60.0) -> list[int]:
        """Return the exit codes of the supervisors, by rank."""
        deadline = time.monotonic() + within_s
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"a rank has not ended: {codes}\n{self.printed}"
        return codes

    def wait_for_print(self, text: str, *, within_s: float = 40.0) -> None:
        """Wait until `text` has been printed."""
        deadline = time.monotonic() + within_s
        while text not in self.printed:
            assert time.monotonic() < deadline, f"{text!r} was not printed:\n{self.printed}"
            time.sleep(0.02)

    def rank_processes(self) -> dict[int, int]:
        """Return the process of each rank, below its supervisor."""
        below = {rank: children_of(process.pid) for rank, process in enumerate(self.processes)}
        return {rank: children[0] for rank, children in below.items() if children}

    def end(self) -> None:
        """Kill the remaining supervisors; their ranks die with them."""
        for process in self.processes:
            process.kill()
            process.join()


def start(config: RunConfig, *faults: Fault, log: Path | None = None, ranks: int = RANKS, **environ: str) -> Job:
    """Start an attempt of the run of `config`."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    log = log or config.run_dir.parent / f"{config.run_dir.name}-{time.monotonic_ns()}.log"
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(worlds.free_port()), **environ}
    processes = [
        worlds.process(rank_of_job, config, faults, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Job(config, processes, log)


@contextlib.contextmanager
def running_job(config: RunConfig, *faults: Fault, **settings: Any) -> Iterator[Job]:
    """A job that is killed at the end of the block."""
    job = start(config, *faults, **settings)
    try:
        yield job
    finally:
        job.end()


@dataclass(frozen=True)
class AttemptResult:
    """An attempt that has ended."""

    codes: list[int]
    printed: str


def run_attempt(config: RunConfig, *faults: Fault, within_s: float = 60.0, **settings: Any) -> AttemptResult:
    """Run one attempt to its end; it must leave no shared memory."""
    before = shared_memory()
    with running_job(config, *faults, **settings) as job:
        codes = job.wait(within_s=within_s)
        result = AttemptResult(codes, job.printed)
    assert shared_memory() <= before
    return result


def run_with_restarts(
    config: RunConfig, *faults: Fault, limits: RestartLimits | None = None, **settings: Any
) -> list[AttemptResult]:
    """Run attempts until the restart rule of the batch scripts stops the run."""
    history, attempts = RestartHistory(), []
    while True:
        attempts.append(run_attempt(config, *faults, **settings))
        code = max(attempts[-1].codes)  # as srun does
        decision = decide_restart(
            history, code=code, step=newest_step(config.run_dir), limits=limits or RestartLimits()
        )
        if decision.reason_to_stop is not None:
            return attempts
        history = decision.history


def children_of(pid: int) -> list[int]:
    """Return the children of process `pid`."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if entry.read_text(errors="replace").rpartition(")")[2].split()[1] == str(pid):
                children.append(int(entry.parent.name))
    return children


def descendants_of(pid: int) -> list[int]:
    """Return the children, their children, and so on."""
    return [below for child in children_of(pid) for below in (child, *descendants_of(child))]


def is_alive(pid: int) -> bool:
    """Return True for a process that exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def shared_memory() -> set[str]:
    """Return the files in /dev/shm of torch and multiprocessing."""
    pattern = re.compile(r"torch_|sem\.mp|nccl|__KMP|psm_")
    return {path.name for path in Path("/dev/shm").iterdir() if pattern.match(path.name)}


# -------------------------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Trajectory:
    """Scalars and samples of a run by step; of a repeated step those of the last time."""

    scalars: dict[int, dict[str, float]]
    samples: dict[tuple[int, int], list[list[int]]]
    """By (rank, step)."""


def trajectory(config: RunConfig) -> Trajectory:
    """Return the trajectory of the run in `config.run_dir`."""
    scalars = {
        step: {name: value for name, value in values.items() if name.startswith(("train/", "validation/"))}
        for step, values in read_metrics(config.run_dir).items()
    }
    samples: dict[tuple[int, int], list[list[int]]] = {}
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        samples[facts["rank"], facts["step"]] = facts["samples"]
    return Trajectory(scalars, samples)


def check_recovered(config: RunConfig, uninterrupted: RunConfig) -> int:
    """Check that a run equals an uninterrupted one, bit for bit; return the number of repeated steps.

    Also: no sample is lost or read twice, no temporary checkpoint and no lock is left, and each attempt repeats at most
    the steps between two checkpoints plus those trained while one was being written.
    """
    assert json.loads((config.run_dir / "COMPLETE").read_text())["step"] == config.train.steps
    assert trajectory(config) == trajectory(uninterrupted)
    repeated = steps_repeated(config)
    assert all(0 <= steps < 2 * config.train.checkpoint_every for steps in repeated), repeated
    left = [path.name for path in config.run_dir.rglob("*") if ".tmp" in path.name or path.name.startswith(".lock")]
    assert not left
    return sum(repeated)


def steps_repeated(config: RunConfig) -> list[int]:
    """Return for each attempt after the first the steps that it repeated after it had resumed."""
    steps: list[int] = []
    attempts: list[AttemptRecord] = read_attempts(config.run_dir)
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        if facts["rank"] == 0 and (not steps or facts["step"] != steps[-1]):
            steps.append(facts["step"])
    restarts = [i for i in range(1, len(steps)) if steps[i] <= steps[i - 1]]
    assert len(restarts) <= len(attempts)
    return [steps[i - 1] - steps[i] for i in restarts]


def report_text(config: RunConfig, rank: int) -> str:
    """Return the report on `rank` of the first attempt that failed."""
    folder = min((config.run_dir / "logs").iterdir(), key=lambda path: path.stat().st_mtime)
    return (folder / f"rank-{rank:05d}.txt").read_text()


def open_files(config: RunConfig) -> dict[int, list[int]]:
    """Return the number of open files of each rank process, by step."""
    counts: dict[int, list[int]] = {}
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        counts.setdefault(facts["pid"], []).append(facts["open_files"])
    return counts


def kill() -> None:
    """End this process, as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stop this process, as by `kill -STOP`."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    """Raise an error of the program."""
    raise LookupError("a fault of the program")


class SlowSteps:
    """Extend every step from now on by `extra_s`; rank 0 appends the duration of each to `path`."""

    def __init__(self, extra_s: float, path: Path | None = None):
        self.extra_s, self.path = extra_s, path

    def __call__(self) -> None:
        from pmlm_dist.metrics.meter import Meter

        start_step, end_step, extra_s, path = Meter.start_step, Meter.end_step, self.extra_s, self.path
        start_time = 0.0

        def start(meter: Meter, step: int) -> None:
            nonlocal start_time
            start_time = time.perf_counter()
            start_step(meter, step)

        def end(meter: Meter, step: int, result: Any) -> Any:
            time.sleep(extra_s)
            interval = end_step(meter, step, result)
            if start_time and path and os.environ["RANK"] == "0":
                with path.open("a") as lines:
                    lines.write(json.dumps([step, time.perf_counter() - start_time]) + "\n")
            return interval

        setattr(Meter, "start_step", start)  # noqa: B010
        setattr(Meter, "end_step", end)  # noqa: B010


def slow_steps(extra_s: float, path: Path | None = None) -> list[Fault]:
    """Steps of at least `extra_s` on both ranks and in every attempt: enough time to write a checkpoint meanwhile."""
    return [Fault(SlowSteps(extra_s, path), rank=rank, step=0, every_attempt=True) for rank in range(2)]


def intercept_next_file(act: Callable[[Callable[[], Any]], Any]) -> None:
    """Replace the next write of a checkpoint file by this rank: call `act` with the original, in the save thread."""
    from pmlm_dist.checkpoint import async_save

    write, done = async_save.write_numbers, threading.Event()

    def instead(path: Path, *args: Any, **kwargs: Any) -> Any:
        if done.is_set():
            return write(path, *args, **kwargs)
        done.set()
        return act(lambda: write(path, *args, **kwargs))

    async_save.write_numbers = instead


def uninterrupted_run(corpus: Path, folder: Path, *, within_s: float = 60.0, **settings: Any) -> RunConfig:
    """Train without any fault."""
    config = small_run(corpus, folder, **settings)
    result = run_attempt(config, within_s=within_s)
    assert result.codes == [0] * RANKS, result.printed
    return config
