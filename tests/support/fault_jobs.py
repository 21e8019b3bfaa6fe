"""Jobs of supervised ranks that faults happen to, and what must hold of a run that they were part of.

A job is what a launcher starts: the ranks of one life, each below its supervisor as in train.py, forked from the
server of support/worlds.py so that a start takes a second. What follows its end is decided by the rule that the batch
scripts use (supervision/restart.py). A fault is planted in one rank's training loop and strikes once, at a step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pmlm_dist.config import RunConfig, WatchdogConfig
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.supervision.attempts import AttemptRecord, read_attempts
from pmlm_dist.supervision.restart import Decision, History, Limits, decide_restart, newest_step
from support import worlds
from support.small_runs import run_config, with_train

RANKS = 2
STEPS, EVERY = 20, 5
LIMIT_S = 6.0
"""How long a rank may be silent here: long for a step of milliseconds, also on a busy machine."""
IDS = "ids.jsonl"


@dataclass(frozen=True)
class Fault:
    """Something that happens to `rank` when it begins `step`, or the first one after it."""

    strike: Callable[[], Any]
    rank: int = 1
    step: int = 7
    again: bool = False
    """Strike in every life, not in the first alone."""


def small_run(
    corpus: Path, run_dir: Path, *, steps: int = STEPS, every: int = EVERY, log_every: int = 1, **engine: Any
) -> RunConfig:
    """A run with short limits and a checkpoint every few steps."""
    config = run_config(corpus, run_dir, steps=steps, micro_batch=2, **engine)
    config = with_train(config, checkpoint_every=every, log_every=log_every)
    limits = dict.fromkeys(("data_s", "step_s", "save_s", "validation_s"), LIMIT_S)
    return replace(config, watchdog=WatchdogConfig(startup_s=60, **limits))


# --------------------------------------------------------------------------------------------------------------- ranks


def rank_of_job(config: RunConfig, faults: Sequence[Fault], environ: dict[str, str], log: str) -> None:
    """A supervised rank; ends its process with the supervisor's code. Everything it prints goes to `log`."""
    import torch

    from pmlm_dist.supervision.supervisor import run_supervised

    torch.set_num_threads(1)
    os.environ.update(environ)
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    code = run_supervised(lambda heartbeat: _train(config, faults, heartbeat))
    os._exit(code)


def _train(config: RunConfig, faults: Sequence[Fault], heartbeat: Any) -> int:
    """As train.py's `main`, with the faults planted and the ids of every step's samples written down."""
    from pmlm_dist.config import ConfigError
    from pmlm_dist.supervision.run_lock import FolderInUse
    from pmlm_dist.supervision.signals import Stopped, StopSignals
    from pmlm_dist.training import loop
    from pmlm_dist.training.run import pretrain

    rank, step = int(os.environ["RANK"]), loop.train_step
    waiting = [fault for fault in faults if fault.rank == rank]
    signals = StopSignals()
    signals.install()
    _strike(config, waiting, step=0)

    def watched(job: Any, engine: Any, micro_batches: Any, state: Any, stopwatch: Any) -> Any:
        _write_ids(config, rank, state.step + 1, micro_batches)
        _strike(config, waiting, step=state.step + 1)
        return step(job, engine, micro_batches, state, stopwatch)

    loop.train_step = watched
    try:
        pretrain(config, signals, heartbeat)
    except Stopped as stopped:
        return stopped.exit_code
    except (ConfigError, FolderInUse) as error:
        print(error, flush=True)
        return 2 if isinstance(error, ConfigError) else error.exit_code
    return 0


def _strike(config: RunConfig, waiting: list[Fault], *, step: int) -> None:
    """Let strike what is due; of what strikes in one life alone a file is left."""
    for fault in [fault for fault in waiting if fault.step <= step]:
        waiting.remove(fault)
        struck = config.run_dir / f".struck-{fault.rank}-{fault.step}"
        if fault.again or not struck.exists():
            struck.parent.mkdir(parents=True, exist_ok=True)
            struck.touch()
            fault.strike()


def _write_ids(config: RunConfig, rank: int, step: int, batches: list[Any]) -> None:
    samples = [
        [int(epoch), int(number)]
        for batch in batches
        for epoch, number in zip(batch.epochs_B, batch.sample_ids_B, strict=True)
    ]
    open_files = len(os.listdir("/proc/self/fd"))
    with (config.run_dir / IDS).open("a") as lines:
        told = {"rank": rank, "step": step, "samples": samples, "pid": os.getpid(), "open_files": open_files}
        lines.write(json.dumps(told) + "\n")


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """One life of a run: its supervisors' processes."""

    config: RunConfig
    processes: list[Any]
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def printed(self) -> str:
        """What supervisors and ranks have printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, *, within_s: float = 60.0) -> list[int]:
        """The codes of the supervisors, by rank."""
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
        """The process of each rank, below its supervisor."""
        below = {rank: children_of(process.pid) for rank, process in enumerate(self.processes)}
        return {rank: children[0] for rank, children in below.items() if children}

    def end(self) -> None:
        """Kill what is left; the ranks go with their supervisors."""
        for process in self.processes:
            process.kill()
            process.join()


def start(config: RunConfig, *faults: Fault, log: Path | None = None, ranks: int = RANKS, **environ: str) -> Job:
    """Start a life of the run that `config` describes."""
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
def started(config: RunConfig, *faults: Fault, **settings: Any) -> Iterator[Job]:
    """A job that is ended in any case."""
    job = start(config, *faults, **settings)
    try:
        yield job
    finally:
        job.end()


@dataclass(frozen=True)
class Ended:
    """A life that is over."""

    codes: list[int]
    seconds: float
    printed: str


def live(config: RunConfig, *faults: Fault, within_s: float = 60.0, **settings: Any) -> Ended:
    """One life, from its start to its end, with nothing left of it."""
    before = shared_memory()
    with started(config, *faults, **settings) as job:
        codes = job.wait(within_s=within_s)
        ended = Ended(codes, time.monotonic() - job.began, job.printed)
    assert shared_memory() <= before
    return ended


def live_on(config: RunConfig, *faults: Fault, limits: Limits | None = None, **settings: Any) -> list[Ended]:
    """Life after life, as long as the rule of the batch scripts says so."""
    history, attempts = History(), []
    while True:
        attempts.append(live(config, *faults, **settings))
        decision = follows(config, history, attempts[-1], limits=limits)
        if decision.reason_to_stop is not None:
            return attempts
        history = decision.history


def follows(config: RunConfig, history: History, ended: Ended, *, limits: Limits | None = None) -> Decision:
    """What the batch scripts would do; srun gives them the largest code of the ranks."""
    step = newest_step(config.run_dir)
    return decide_restart(history, code=max(ended.codes), step=step, limits=limits or Limits())


def children_of(pid: int) -> list[int]:
    """Processes that `pid` is the parent of."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if entry.read_text(errors="replace").rpartition(")")[2].split()[1] == str(pid):
                found.append(int(entry.parent.name))
    return found


def descendants_of(pid: int) -> list[int]:
    """Children, their children, and so on."""
    return [found for child in children_of(pid) for found in (child, *descendants_of(child))]


def is_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody has asked about is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def shared_memory() -> set[str]:
    """What lies in /dev/shm that torch or multiprocessing of this user made."""
    pattern = re.compile(r"torch_|sem\.mp|nccl|__KMP|psm_")
    return {path.name for path in Path("/dev/shm").iterdir() if pattern.match(path.name)}


# ---------------------------------------------------------------------------------------------------------- what holds


@dataclass(frozen=True)
class Learned:
    """What a run did, step by step; where a step was done again the last time counts."""

    scalars: dict[int, dict[str, float]]
    samples: dict[tuple[int, int], list[list[int]]]
    """By (rank, step)."""


def learned(config: RunConfig) -> Learned:
    """What the run in `config.run_dir` did."""
    scalars = {
        step: {name: value for name, value in found.items() if name.startswith(("train/", "validation/"))}
        for step, found in read_metrics(config.run_dir).items()
    }
    samples: dict[tuple[int, int], list[list[int]]] = {}
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        samples[facts["rank"], facts["step"]] = facts["samples"]
    return Learned(scalars, samples)


def check_recovered(config: RunConfig, straight: RunConfig) -> int:
    """That a run ended as one that nothing happened to, bit for bit; how many steps were done twice.

    Also that no sample was lost or read twice, that no half-written checkpoint and no lock is left, and that each life
    did no more steps again than lie between two checkpoints, with those that were trained while one was being written.
    """
    assert json.loads((config.run_dir / "COMPLETE").read_text())["step"] == config.train.steps
    assert learned(config) == learned(straight)
    redone = steps_redone(config)
    assert all(0 <= steps < 2 * config.train.checkpoint_every for steps in redone), redone
    left = [path.name for path in config.run_dir.rglob("*") if ".tmp" in path.name or path.name.startswith(".lock")]
    assert not left
    return sum(redone)


def steps_redone(config: RunConfig) -> list[int]:
    """Steps that each life after the first did again: those the one before had done, less what it goes on from."""
    begun: list[int] = []
    attempts: list[AttemptRecord] = read_attempts(config.run_dir)
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        if facts["rank"] == 0 and (not begun or facts["step"] != begun[-1]):
            begun.append(facts["step"])
    restarts = [place for place in range(1, len(begun)) if begun[place] <= begun[place - 1]]
    assert len(restarts) <= len(attempts)
    return [begun[place - 1] - begun[place] for place in restarts]


def open_files(config: RunConfig) -> dict[int, list[int]]:
    """How many files each process that was a rank held open, step by step."""
    found: dict[int, list[int]] = {}
    for line in (config.run_dir / IDS).read_text().splitlines():
        facts = json.loads(line)
        found.setdefault(facts["pid"], []).append(facts["open_files"])
    return found


def kill() -> None:
    """The process is gone, as by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """The process stands still, as by `kill -STOP`."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    """The process meets a fault of the program."""
    raise LookupError("a fault of the program")


class Paced:
    """From now on each step takes some time more; where there is a path, rank 0 writes down how long it took."""

    def __init__(self, more_s: float, path: Path | None = None):
        self.more_s, self.path = more_s, path

    def __call__(self) -> None:
        from pmlm_dist.metrics.meter import Meter

        start_step, end_step, more_s, path = Meter.start_step, Meter.end_step, self.more_s, self.path
        begun: list[float] = []

        def start(meter: Meter, step: int) -> None:
            begun[:] = [time.perf_counter()]
            start_step(meter, step)

        def end(meter: Meter, step: int, result: Any) -> Any:
            time.sleep(more_s)
            interval = end_step(meter, step, result)
            if begun and path and os.environ["RANK"] == "0":
                with path.open("a") as lines:
                    lines.write(json.dumps([step, time.perf_counter() - begun[0]]) + "\n")
            return interval

        setattr(Meter, "start_step", start)  # noqa: B010
        setattr(Meter, "end_step", end)  # noqa: B010


def paced(more_s: float, path: Path | None = None) -> list[Fault]:
    """Steps of at least `more_s` on both ranks, in every life: long for the checkpoint that is written meanwhile."""
    return [Fault(Paced(more_s, path), rank=rank, step=0, again=True) for rank in range(2)]


def with_the_next_file(act: Callable[[Callable[[], Any]], Any]) -> None:
    """Call `act`, in the writer's thread, with what writes this rank's next file of a checkpoint."""
    from pmlm_dist.checkpoint import async_save

    write, done = async_save.write_numbers, threading.Event()

    def instead(path: Path, *args: Any, **kwargs: Any) -> Any:
        if done.is_set():
            return write(path, *args, **kwargs)
        done.set()
        return act(lambda: write(path, *args, **kwargs))

    async_save.write_numbers = instead


def straight_run(corpus: Path, folder: Path, *, within_s: float = 60.0, **settings: Any) -> RunConfig:
    """A run that nothing happens to."""
    config = small_run(corpus, folder, **settings)
    ended = live(config, within_s=within_s)
    assert ended.codes == [0] * RANKS, ended.printed
    return config
