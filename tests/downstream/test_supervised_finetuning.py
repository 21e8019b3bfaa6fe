"""`pmlm finetune` below its supervisors: a rank that dies or stands still ends all, with the cause and nothing left."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import worlds
from support.small_runs import write_engine_config
from support.small_tasks import write_model, write_text_task

from pmlm_dist import cli
from pmlm_dist.supervision.exit_codes import ExitCode

pytestmark = pytest.mark.distributed

LIMIT_S = 5
SECRET = "a-secret-token"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A fine-tuning that would take minutes, but for its --output."""
    folder = tmp_path_factory.mktemp("task")
    model, data = write_model(folder / "weights"), write_text_task(folder / "data")
    engine = write_engine_config(folder / "ds.json", micro_batch=4)
    settings = {"task": "classification", "model": model, "data": data, "ds-config": engine, "inputs.max-tokens": 16}
    settings |= {"recipe.batch": 8, "recipe.epochs": 3000, "log-every": 1, "evaluate-every": 100_000}
    settings |= dict.fromkeys((f"watchdog.{phase}-s" for phase in ("data", "step", "save", "validation")), LIMIT_S)
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["finetune", *options]


def pmlm(arguments: list[str], environ: dict[str, str], log: Path) -> None:
    """The `pmlm` command as a launcher starts it on one rank."""
    os.environ.update(environ)
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["pmlm", *arguments]
    os._exit(cli.main())


class Ranks:
    """Two ranks, each the child of its supervisor."""

    def __init__(self, command: list[str], output: Path):
        self.log = output.with_suffix(".log")
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(worlds.free_port())}
        self.supervisors = [
            worlds.process(
                pmlm,
                [*command, "--output", str(output)],
                {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET},
                self.log,
            )
            for rank in range(2)
        ]
        for supervisor in self.supervisors:
            supervisor.start()

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def process_of(self, rank: int) -> int:
        """The rank itself, once all are at work."""
        deadline = time.monotonic() + 90
        while "step 3/" not in self.printed:
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)
        pid = self.supervisors[rank].pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def codes(self) -> list[int]:
        for supervisor in self.supervisors:
            supervisor.join(60)
        return [supervisor.exitcode for supervisor in self.supervisors]


@contextlib.contextmanager
def ranks(command: list[str], output: Path) -> Iterator[Ranks]:
    """Two ranks that are ended in any case, with their supervisors."""
    started = Ranks(command, output)
    try:
        yield started
    finally:
        for supervisor in started.supervisors:
            supervisor.kill()
            supervisor.join()


@pytest.mark.fault("F01")
def test_killed_rank_ends_finetune_with_its_code(command: list[str], tmp_path: Path):
    with ranks(command, tmp_path / "out") as started:
        own = [started.process_of(rank) for rank in range(2)]
        os.kill(own[1], signal.SIGKILL)
        assert started.codes() == [137, 137], started.printed
    assert "supervisor: rank 1 was ended by SIGKILL, in step " in started.printed
    assert not [pid for pid in own if Path(f"/proc/{pid}").exists()]


@pytest.mark.fault("F03")
def test_hung_finetune_rank_is_named_with_all_stacks(command: list[str], tmp_path: Path):
    with ranks(command, tmp_path / "out") as started:
        own = [started.process_of(rank) for rank in range(2)]
        os.kill(own[1], signal.SIGSTOP)
        assert started.codes() == [ExitCode.HUNG] * 2, started.printed
    assert f"made no progress for {LIMIT_S} s" in started.printed
    assert "furthest behind: rank 1\n" in started.printed
    stacks = {path.name: path.read_text() for path in (tmp_path / "out" / "logs").rglob("rank-*.txt")}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    assert all(" in train\n" in text for text in stacks.values())
    written = [path for path in (started.log, *(tmp_path / "out").rglob("*")) if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert not [pid for pid in own if Path(f"/proc/{pid}").exists()]
