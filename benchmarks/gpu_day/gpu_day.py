"""`make gpu-day`: half an hour on a machine with one GPU and no network, in pieces of at most ten minutes.

    pack.sh (beforehand, with a network) --> build/gpu-day/: wheels, corpus
    gpu_day.py --minutes 9  (again and again) --> build/gpu-day/results/PIECE.json, .log --> docs/reports/gpu.md

A piece whose result is there is not repeated. A piece that fails is recorded with the last lines of its log, and the
next one runs. `--rehearse` runs small pieces, on the null device for example.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
DAY = ROOT / "build" / "gpu-day"
REPORT = ROOT / "docs" / "reports" / "gpu.md"
UNFINISHED = 75
"""Exit code for a stop by `--minutes`: the same call continues."""


@dataclass(frozen=True)
class Piece:
    """A command, and the most minutes that it may take."""

    name: str
    minutes: float
    command: list[str]
    title: str


def pieces(python: str, *, rehearse: bool) -> list[Piece]:
    """All pieces, the most telling first."""
    small = ["--layers", "2", "--micro-batch", "4", "--steps", "2", "--no-profile"] if rehearse else []

    def timed(setting: str, preset: str = "base", micro_batch: int = 60) -> Piece:
        result = DAY / "results" / f"measure-{preset}-{setting.replace(' ', '-')}.figures"
        command = [python, str(HERE / "measure.py"), "--setting", setting, "--preset", preset]
        command += ["--micro-batch", str(micro_batch), "--json", str(result), *small]
        return Piece(f"measure-{preset}-{setting.replace(' ', '-')}", 3, command, f"{preset}, {setting}")

    train = [
        python,
        str(ROOT / "train.py"),
        "--corpus",
        str(DAY / "corpus"),
        "--preset",
        "tiny" if rehearse else "base",
    ]
    train += ["--train.log-every", "10", "--train.checkpoint-every", "40", "--train.validate-every", "60"]
    train += ["--batch.global", "8" if rehearse else "120", "--batch.micro", "4" if rehearse else "60"]
    train += ["--train.steps", "4" if rehearse else "120", "--optim.warmup-steps", "2" if rehearse else "20"]
    runs, bench = DAY / "runs", [python, str(ROOT / "benchmarks" / "run.py")]
    gpu_tests = [python, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    everything = [
        Piece("versions", 1, [python, "-c", VERSIONS], "versions"),
        Piece("parity", 8, [*gpu_tests, "tests/gpu/test_parity.py"], "tests of the kernels' numbers"),
        timed("default"),
        timed("default", "large", 30),
        timed("dropout"),
        timed("no relative bias"),
        timed("fused"),
        Piece(
            "train", 8, [python, str(HERE / "interrupted.py"), str(runs / "one"), *train], "120 steps, a kill, a resume"
        ),
        Piece("repeat", 8, [*train, "--run-dir", str(runs / "two")], "the same run again"),
        Piece(
            "attention",
            6,
            [*bench, "attention", "--dtype", "bf16", "--num-heads", "12", "--slots", "16384"],
            "attention",
        ),
        Piece(
            "step", 8, [*bench, "step", "--preset", "base", "--dtype", "bf16", "--batch", "60"], "a step and its rivals"
        ),
        Piece("saving", 8, [*gpu_tests, "tests/gpu/test_saving.py"], "tests of checkpoints"),
        Piece("steps", 9, [*gpu_tests, "tests/gpu/test_step.py"], "tests of training"),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        checked = [sanitizer, "--error-exitcode", "9", *gpu_tests, "tests/gpu/test_parity.py", "-k", "triton and fp32"]
        everything.append(Piece("sanitizer", 9, checked, "compute-sanitizer on the kernels"))
    return [p for p in everything if p.name not in NOT_REHEARSED] if rehearse else everything


NOT_REHEARSED = ("parity", "train", "repeat", "attention", "step", "saving", "steps", "sanitizer")
"""Pieces that compare numbers, of which a null device has none."""
VERSIONS = """
import json, platform, torch, triton
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton.__version__, "device": torch.cuda.get_device_name(), "nccl": torch.cuda.nccl.version()}))
"""


def run(piece: Piece, *, seconds: float) -> dict[str, Any]:
    """Run a piece; return its exit code, seconds, last lines and figures."""
    log, start = DAY / "results" / f"{piece.name}.log", time.monotonic()
    environment = {**os.environ, "DS_ACCELERATOR": "cuda", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with log.open("w") as file:
        process = subprocess.Popen(
            piece.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    figures = DAY / "results" / f"{piece.name}.figures"
    return {
        "title": piece.title,
        "command": " ".join(piece.command).replace(f"{ROOT}/", ""),
        "code": code,
        "seconds": time.monotonic() - start,
        "tail": log.read_text(errors="replace").splitlines()[-25:],
        "figures": json.loads(figures.read_text()) if figures.exists() else None,
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """The report: a table of the timed settings, then every piece with its command and last lines."""
    lines = ["# Measured on a GPU", "", "Written by `make gpu-day`; every figure has its command below.", ""]
    lines += [
        "| preset, setting | device | ms of a micro-batch | MFU | text tokens/s | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.values():
        if figures := result["figures"]:
            cells = [result["title"], figures["device"], f"{figures['ms_of_micro_batch']:.1f}", f"{figures['mfu']:.1%}"]
            cells += [f"{figures['tokens_per_s']:,.0f}", f"{figures['peak_gib']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for name, result in results.items():
        state = "done" if result["code"] == 0 else f"ended with {result['code']}"
        lines += ["", f"## {name}: {result['title']}", f"`{result['command']}`: {state}, {result['seconds']:.0f} s"]
        if result["figures"]:
            lines += ["", "| kernel | calls | ms of a micro-batch |", "|---|---|---|"]
            lines += [f"| `{kernel}` | {calls} | {ms:.3f} |" for kernel, calls, ms in result["figures"]["kernels"][:15]]
        lines += ["", "```", *result["tail"], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the pieces that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so many minutes, to be continued")
    parser.add_argument("--rehearse", action="store_true", help="small pieces without checks of numbers")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    (DAY / "results").mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for piece in pieces(sys.executable, rehearse=options.rehearse):
        path = DAY / "results" / f"{piece.name}.json"
        if not path.exists():
            left = deadline - time.monotonic()
            if left < min(60 * piece.minutes, 60 * options.minutes - 5):
                options.report.parent.mkdir(parents=True, exist_ok=True)
                options.report.write_text(report(results))
                print(f"stopped before {piece.name} (up to {piece.minutes:g} minutes): call it again to continue")
                return UNFINISHED
            print(f"{piece.name}: {piece.title}", flush=True)
            path.write_text(json.dumps(run(piece, seconds=min(left, 60 * piece.minutes)), indent=1))
        results[piece.name] = json.loads(path.read_text())
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(report(results))
    failed = [name for name, result in results.items() if result["code"]]
    print(f"complete: {options.report}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
