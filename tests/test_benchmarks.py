"""Every benchmark runs, and writes the same JSON; what it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {
    "checkpoint": {"stall_share", "bytes_per_parameter"},
    "generate": {"vs_hf_generate", "vs_hf_encoder_decoder", "vs_hf_greedy"},
    "step": {"vs_hf_bert", "vs_hf_mpnet", "vs_two_passes", "vs_naive", "vs_ae_only", "mfu", "peak_memory_vs_naive"},
    "loader": {"vs_hf_collator", "vs_hf_whole_word", "workers_for_300k_tokens", "data_wait_share"},
    "attention": {
        f"{figure}_{length}"
        for figure in ("split_vs_dense", "flex_vs_dense_forward", "flex_vs_split_forward")
        for length in (64, 128)
    },
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_smoke_run_writes_its_figures(name, tmp_path):
    report_path = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), name, "--quick", "--json", str(report_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(report_path.read_text())
    assert set(report) == {"benchmark", "machine", "versions", "shapes", "rows", "figures"}
    assert report["benchmark"] == name
    assert FIGURES[name] <= set(report["figures"])
    assert all(value > 0 for value in report["figures"].values())
