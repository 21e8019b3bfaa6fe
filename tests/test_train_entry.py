"""train.py: its command line, its refusals, and one small run through every launcher that it is meant for."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_runs import run_config, write_engine_config
from support.worlds import free_port, run_world

from pmlm_dist import cli
from pmlm_dist.config import BatchConfig, ConfigError, RunConfig
from pmlm_dist.launch_environment import is_rank_zero, threads_per_rank
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.planning.plan import make_plan
from pmlm_dist.planning.settings import PlanConfig
from pmlm_dist.presets import PRESETS, base, tiny
from pmlm_dist.supervision.exit_codes import ExitCode

ROOT = Path(__file__).parent.parent
SECRET = "a-secret-token"
PYTHON = sys.executable
BESIDE_PYTHON = Path(sys.executable).parent

SMALL = [
    *("--model.hidden-size", "32", "--model.num-layers", "2", "--model.num-heads", "4", "--model.ffn-size", "64"),
    *("--model.max-positions", "64", "--model.hidden-dropout", "0", "--model.attention-dropout", "0"),
    *("--optim.warmup-steps", "1", "--train.steps", "2", "--train.log-every", "1", "--train.validation-samples", "8"),
    *("--data.workers", "0"),
]


# ------------------------------------------------------------------------------------------------------- command line


def test_default_preset_is_base():
    assert cli.run_config([]) == base()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_selected_by_name(name: str):
    assert cli.run_config(["--preset", name]) == cli.run_config([f"--preset={name}"]) == PRESETS[name]()


def test_overrides_change_the_named_settings_only():
    arguments = ["--preset", "tiny", "--train.steps", "7", "--model.no-relative-bias", "--data.lanes", "4"]
    expected = replace(
        tiny(),
        train=replace(tiny().train, steps=7),
        model=replace(tiny().model, relative_bias=False),
        data=replace(tiny().data, lanes=4),
    )
    assert cli.run_config(arguments) == expected


def test_batch_and_zero_replace_those_of_the_json():
    config = cli.run_config(["--preset", "tiny", "--batch.global", "64", "--batch.micro", "8", "--zero", "2"])
    assert (config.batch, config.zero) == (BatchConfig(64, 8), 2)


def test_layouts_that_the_plan_advises_are_options_of_plan_and_train(monkeypatch: pytest.MonkeyPatch):
    estimates = make_plan(PlanConfig.of_preset("large")).alternatives
    planned: list[PlanConfig] = []
    monkeypatch.setattr("pmlm_dist.commands.plan.run", planned.append)
    for estimate in (*estimates, replace(estimates[0], layout=replace(estimates[0].layout, recompute=True))):
        layout, options = estimate.layout, estimate.layout.options.split()
        cli.plan(["--preset", "large", *options])
        for config in (cli.run_config(["--preset", "large", *options]), planned.pop()):
            assert (config.parallel.tp, config.zero, config.batch.micro) == (layout.tp, layout.zero, layout.micro_batch)
            assert config.model.activation_checkpointing == layout.recompute


@pytest.mark.parametrize(
    "flags", [["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3", "--preset", "base"]]
)
def test_local_rank_flag_of_deepspeed_is_ignored(flags: list[str]):
    assert cli.run_config(flags) == base()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--train.stepz", "3"], "--train.steps"),
        (["--model.hiden-size", "3"], "--model.hidden-size"),
        (["--trian.seed", "3"], "--train.seed"),
        (["--train.steps", "many"], "--train.steps"),
        (["--train.steps", "1.5"], "--train.steps"),
        (["--model.attention", "flash"], "'auto', 'fused'"),
        (["--masking.rate"], "--masking.rate"),
    ],
)
def test_unknown_setting_exits_2_and_suggests_the_closest(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        cli.run_config(arguments)
    assert caught.value.code == ExitCode.BAD_CONFIGURATION
    printed = capsys.readouterr()
    assert hint in printed.out + printed.err
    assert arguments[-1] in printed.out + printed.err


def test_unknown_preset_raises_with_known_ones():
    with pytest.raises(ConfigError, match=r"--preset \(bas\) .* base, large, tiny"):
        cli.run_config(["--preset", "bas"])


def test_ranks_other_than_zero_print_nothing_about_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.run_config(["--train.stepz", "3"])
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


LAUNCHERS: dict[str, list[dict[str, str]]] = {
    "torchrun": [{"RANK": str(r), "LOCAL_WORLD_SIZE": "2"} for r in range(2)],
    "deepspeed": [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_SIZE": "2"} for r in range(2)],
    "Open MPI": [{"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"} for r in range(2)],
    "MPICH": [{"PMI_RANK": str(r), "MPI_LOCALRANKID": str(r), "MPI_LOCALNRANKS": "2"} for r in range(2)],
    "srun": [{"SLURM_PROCID": str(r), "SLURM_STEP_TASKS_PER_NODE": "2(x3)"} for r in range(2)],
    "Open MPI in the shell of an srun": [
        {"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"} for r in range(2)
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_rank_prints_and_cores_are_shared(launcher: str):
    ranks = LAUNCHERS[launcher]
    assert [is_rank_zero(environ) for environ in ranks] == [True, False]
    assert [threads_per_rank(environ, cores=12) for environ in ranks] == [6, 6]


def test_single_process_prints_and_uses_all_cores():
    assert is_rank_zero({})
    assert threads_per_rank({}, cores=12) == 12
    assert threads_per_rank({"LOCAL_WORLD_SIZE": "64"}, cores=12) == 1


# ---------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def started(command: Sequence[str | Path], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process with `environ` on top of a user's shell's; in the end it and all that it started are ended."""
    of_launchers = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "TORCHELASTIC_", "CROSS_")
    shell = {name: value for name, value in os.environ.items() if not name.startswith(of_launchers)}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**shell, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_TOKEN": SECRET, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything printed."""
    printed, _ = process.communicate(timeout=150)
    return process.returncode, printed


def srun(rank: int, *, port: int) -> dict[str, str]:
    """What srun sets for task `rank` of 2."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "node1",
        "MASTER_PORT": str(port),
    }


def launch(launcher: str, arguments: list[str]) -> None:
    """Run train.py on two ranks (`python`: one) to its end."""
    port = str(free_port())
    script = [ROOT / "train.py", *arguments]
    commands: dict[str, list[str | Path]] = {
        "deepspeed": [BESIDE_PYTHON / "deepspeed", "--num_gpus", "2", "--master_port", port, *script],
        "torchrun": [BESIDE_PYTHON / "torchrun", "--nproc_per_node", "2", "--master_port", port, *script],
        "mpirun": [BESIDE_PYTHON / "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", PYTHON, *script],
        "srun": [PYTHON, *script],
        "python": [PYTHON, *script],
    }
    environments: dict[str, list[dict[str, str]]] = {
        "mpirun": [{"MASTER_PORT": port}],
        "srun": [srun(rank, port=int(port)) for rank in range(2)],
    }
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(commands[launcher], environ)) for environ in environments.get(launcher, [{}])
        ]
        for process in processes:
            code, printed = finish(process)
            assert code == 0, printed
            assert SECRET not in printed


def learned(run_dir: Path) -> dict[int, dict[str, float]]:
    """Losses and norms of a run's steps and its held-out losses, after a check that it is complete."""
    assert json.loads((run_dir / "COMPLETE").read_text())["step"] == 2
    metrics = read_metrics(run_dir)
    return {
        step: {n: v for n, v in m.items() if n.startswith(("train/", "validation/"))} for step, m in metrics.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


def launched(launcher: str, corpus: Path, folder: Path) -> dict[int, dict[str, float]]:
    """What a small run learns when `launcher` starts it."""
    run_dir = folder / launcher
    engine = write_engine_config(folder / "ds.json", micro_batch=2)
    launch(launcher, ["--corpus", str(corpus), "--run-dir", str(run_dir), "--ds-config", str(engine), *SMALL])
    topology = json.loads((run_dir / "config.json").read_text())["topology"]
    assert topology["world_size"] == (1 if launcher == "python" else 2)
    assert not [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    return learned(run_dir)


@pytest.fixture(scope="module")
def by_torchrun(small_corpus: Path, folder: Path) -> dict[int, dict[str, float]]:
    return launched("torchrun", small_corpus, folder)


def test_torchrun_trains(by_torchrun: dict[int, dict[str, float]]):
    assert list(by_torchrun) == [1, 2]
    assert {"train/total", "train/gradient_norm"} <= by_torchrun[1].keys()
    assert "validation/total" in by_torchrun[2]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun", "srun"])
def test_every_launcher_starts_the_same_run(launcher: str, small_corpus: Path, folder: Path, by_torchrun: dict):
    assert launched(launcher, small_corpus, folder) == by_torchrun


@pytest.mark.full
@pytest.mark.distributed
def test_python_without_launcher_gives_the_same_losses(small_corpus: Path, folder: Path, by_torchrun: dict):
    alone = launched("python", small_corpus, folder)
    assert alone.keys() == by_torchrun.keys()
    for step, expected in by_torchrun.items():
        assert alone[step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
@pytest.mark.distributed
def test_missing_corpus_ends_all_ranks_with_one_message(tmp_path: Path):
    port = free_port()
    command = [PYTHON, ROOT / "train.py", "--corpus", tmp_path / "nowhere", "--run-dir", tmp_path / "run"]
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(started(command, srun(rank, port=port))) for rank in range(2))
        (first_code, first_printed), (second_code, second_printed) = finish(first), finish(second)
    assert (first_code, second_code) == (ExitCode.BAD_CONFIGURATION, ExitCode.BAD_CONFIGURATION)
    assert first_printed.count("train.py:\n") == 1
    (problem,) = (line for line in first_printed.splitlines() if line.startswith("- "))
    assert problem.startswith(f"- no corpus in {tmp_path / 'nowhere'}")
    assert f"run `pmlm prepare-corpus --source 'texts/*.jsonl' --output {tmp_path / 'nowhere'}" in problem
    assert "Traceback" not in first_printed + second_printed
    assert "nowhere" not in second_printed
    assert not (tmp_path / "run").exists()


def error_on(config: RunConfig, missing: Path) -> str:
    """Return the error of a run whose corpus is missing on rank 1 alone."""
    from pmlm_dist.training.run import pretrain

    with pytest.raises(ConfigError) as caught:
        pretrain(replace(config, corpus=missing) if os.environ["RANK"] == "1" else config)
    return str(caught.value)


@pytest.mark.distributed
def test_problem_on_another_node_is_printed_by_rank_zero(small_corpus: Path, tmp_path: Path):
    first, second = run_world(error_on, 2, run_config(small_corpus, tmp_path / "run"), tmp_path / "nowhere")
    assert second.startswith(f"- no corpus in {tmp_path / 'nowhere'}")
    assert first == f"- on rank 1: {second.removeprefix('- ')}"
