"""Small worlds for tests: run a function on several ranks of this machine and return every rank's result.

    test --run_world--> fork server --forks--> rank 0 .. n-1 --results--> test
                        (started by the first world; has imported support/warm_ranks.py)

Each rank is a new process with one thread, so no state passes from one world to the next. A world that does not end in
time is killed, by the ids of its processes.
"""

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# With a GPU ranks are spawned: modules that the server imports may look for devices, and CUDA does not survive a fork.
_ON_GPU = os.environ.get("DS_ACCELERATOR") == "cuda"
_CONTEXT = multiprocessing.get_context("spawn") if _ON_GPU else multiprocessing.get_context("forkserver")
_WARM_MODULE = "support.warm_ranks"
_TESTS = Path(__file__).parents[1]


def warm_fork_server() -> None:
    """Make the fork server of this process import `support.warm_ranks` when it starts. Nothing is started here.

    A process has one fork server, and the list of modules counts only at its start. A loader with workers in this
    process may start it first, with a list of its own: every rank would then import DeepSpeed itself, for seconds.
    """
    if _ON_GPU:
        return
    server: Any = forkserver._forkserver
    start = server.ensure_running

    def start_warm() -> None:
        server.set_forkserver_preload([_WARM_MODULE])
        with _import_paths():
            start()

    server.ensure_running = start_warm


@contextmanager
def _import_paths() -> Iterator[None]:
    """Let a process started here import tests and package: Python 3.11's fork server ignores `sys.path`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_TESTS), str(_TESTS.parent), before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


class RankFailed(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


def run_world(function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `function(*args)` on `ranks` ranks with the variables that a launcher sets; return the results by rank.

    `function` and its results must be picklable. Raises `RankFailed` if any rank raises, `TimeoutError` if the world
    does not end in `timeout_s` seconds.
    """
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, ranks, port, pipes[rank][1], (function, args)))
        for rank in range(ranks)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        answers = _collect([receiver for receiver, _ in pipes], deadline=time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
            process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    if failures:
        raise RankFailed("\n".join(failures))
    return [answer for _, answer in answers]


def process(function: Callable[..., Any], *args: Any) -> Any:
    """Return a process, not started yet, that calls `function` with `args`; forked from the server like a rank."""
    return _CONTEXT.Process(target=function, args=args)


def free_port() -> int:
    """Return a free port of the loopback interface, from a range that no other pytest worker uses.

    The range is below the ephemeral ports: gloo's connections would take one of those before the caller does.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 10_000 + 1_000 * (worker % 10) + random.SystemRandom().randrange(1_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _collect(receivers: list[Connection], *, deadline: float) -> list[tuple[bool, Any]]:
    answers: dict[int, tuple[bool, Any]] = {}
    while len(answers) < len(receivers):
        pending = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in answers}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {len(receivers)} returned nothing in time")
        for receiver in ready:
            rank = pending[receiver]  # pyright: ignore[reportArgumentType]
            try:
                answers[rank] = pickle.loads(receiver.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                answers[rank] = (False, "the process ended without an answer")
        if any(not ok for ok, _ in answers.values()):
            deadline = min(deadline, time.monotonic() + 5.0)
            for rank in set(range(len(receivers))) - set(answers):
                if not receivers[rank].poll(max(0.0, deadline - time.monotonic())):
                    answers[rank] = (True, None)
    return [answers[rank] for rank in range(len(receivers))]


def _rank(rank: int, ranks: int, port: int, sender: Connection, call: tuple[Callable[..., Any], tuple]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    function, args = call
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))  # not send(): it would share tensors with a process that is about to end
    sender.close()
    os._exit(0)  # a finished ZeRO-3 run on gloo can abort in its destructors
