"""The GPU path without a GPU: what it launches, waits for, moves and keeps, against recorded budgets; that it runs.

The null device (`build.sh`) takes the place of CUDA's runtime and driver: memory and copies are real, kernels are
compiled, counted and not run. `make test-null-gpu` installs what is needed and runs this file.
"""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.corpora import write_corpus

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("NULL_GPU_PYTHON", HERE.parent.parent / "build" / "null-gpu" / "bin" / "python"))
BUDGETS = json.loads((HERE / "budgets.json").read_text())
TIMEOUT_S = 300
QUIET = ("PYTEST_", "TRITON_INTERPRET", "DS_ACCELERATOR")

pytestmark = pytest.mark.null_gpu


def environment(**further: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(QUIET)}
    return {**inherited, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", **further}


def run_on_null_gpu(*arguments: str, ranks: int = 1) -> str:
    """Run a script with as many devices as ranks; return rank 0's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NULLCUDA_DEVICES": str(ranks)}
        processes.append(
            subprocess.Popen(
                [str(HERE / "run.sh"), str(PYTHON), *arguments],
                env=environment(**world, **address),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}"
    return outputs[0]


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_step_keeps_its_budget(name: str, tmp_path: Path):
    """Figures are deterministic; 1 % is for another build of torch. `budgets.json` says what each should stay below."""
    report = tmp_path / "figures.json"
    run_on_null_gpu(str(HERE / "roofline.py"), "--json", str(report), *BUDGETS[name]["arguments"])
    figures = json.loads(report.read_text())
    over = {
        figure: (figures[figure], limit)
        for figure, limit in BUDGETS[name]["at_most"].items()
        if figures[figure] > 1.01 * limit
    }
    assert not over


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train_path(corpus: Path, folder: Path, *, ranks: int, **settings: Any) -> Path:
    """Train to step 2, resume, train to step 4; return the run folder."""
    run = folder / "run"
    for stop_at in (2, None):
        asked = {"corpus": str(corpus), "run": str(run), "stop_at": stop_at, **settings}
        output = run_on_null_gpu(str(HERE / "paths.py"), json.dumps(asked), ranks=ranks)
    assert "resuming after step 2" in output
    assert (run / "checkpoints" / "step-00000004").is_dir()
    return run


PATHS = [
    {"ranks": 1, "zero": 0, "precision": "fp32"},
    {"ranks": 1, "zero": 1, "precision": "bf16", "model": {"activation_checkpointing": True}},
    {"ranks": 1, "zero": 1, "precision": "bf16", "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
    {"ranks": 1, "zero": 2, "precision": "fp16"},
    {"ranks": 1, "zero": 3, "precision": "bf16"},
    {"ranks": 2, "zero": 1, "precision": "bf16"},
    {"ranks": 2, "zero": 2, "precision": "fp16"},
    {"ranks": 2, "zero": 3, "precision": "bf16"},
    {"ranks": 2, "tp": 2, "zero": 1, "precision": "bf16"},
]


@pytest.mark.parametrize("settings", PATHS, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items() if k != "model"))
def test_training_saves_and_resumes(settings: dict[str, Any], corpus: Path, tmp_path: Path):
    train_path(corpus, tmp_path, **settings)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_path(corpus, tmp_path_factory.mktemp("trained"), ranks=1, zero=1, precision="bf16")


def pmlm(*arguments: str) -> str:
    return run_on_null_gpu(str(HERE / "paths.py"), json.dumps({"command": arguments}))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_fine_tuning_and_prediction_run(trained: Path, tmp_path: Path):
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "label": "ab"[i % 2]} for i in range(16)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    common = ("--model", str(trained), "--data", str(tmp_path / "data"), "--ds-config", "ds_configs/tiny_bf16.json")
    pmlm("finetune", "--task", "classification", *common, "--output", str(tmp_path / "tuned"), "--recipe.epochs", "1")


def test_sequence_to_sequence_and_generation_run(trained: Path, tmp_path: Path):
    rows = [{"source": f"w{i} w{i + 1} w{i + 2}", "target": f"w{i + 3} w{i + 4}"} for i in range(16)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    common = ("--model", str(trained), "--data", str(tmp_path / "data"), "--ds-config", "ds_configs/tiny_bf16.json")
    lengths = ("--generation.max-source", "8", "--generation.max-target", "6", "--generation.decoding.max-length", "6")
    pmlm(
        "finetune", "--task", "seq2seq", *common, "--output", str(tmp_path / "tuned"), "--recipe.epochs", "1", *lengths
    )


def test_likelihoods_and_vectors_run(trained: Path, tmp_path: Path):
    (tmp_path / "texts.txt").write_text("w1 w2 w3\nw4 w5\n")
    for method in ("par", "pll"):
        pmlm(
            "score",
            str(tmp_path / "texts.txt"),
            "--model",
            str(trained),
            "--method",
            method,
            "--output",
            str(tmp_path / f"{method}.jsonl"),
        )
    pmlm("embed", str(tmp_path / "texts.txt"), "--model", str(trained), "--output", str(tmp_path / "vectors.npy"))
