"""Every benchmark runs and writes a report of the same structure; its values are not checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURES = {
    "checkpoint": {"stall_share", "bytes_per_parameter"},
    "plan": {"memory_error", "time_error", "heap"},
    "scaling": {"dp2_weak", "dp2_strong", "tp2_weak", "tp2_strong", "deepspeed_overhead"},
    "zero": {*(f"zero{stage}_between_steps_vs_theory" for stage in range(4)), "plan_error"},
    "generate": {"vs_hf_generate", "vs_hf_encoder_decoder", "vs_hf_greedy"},
    "step": {
        *(f"vs_{name}" for name in ("hf_bert", "hf_mpnet", "two_passes", "naive", "ae_only")),
        *("one_pass_vs_two", "mfu", "peak_memory_vs_naive"),
    },
    "update": {"vs_plain", "vs_deepspeed"},
    "loader": {"vs_hf_collator", "vs_hf_whole_word", "workers_for_300k_tokens", "data_wait_share"},
    "prepare": {"vs_tokenizer", "two_ranks", "memory_at_twice_the_text"},
    "attention": {
        f"{figure}_{length}"
        for figure in ("fused_vs_reference", "flex_vs_reference_forward", "flex_vs_fused_forward")
        for length in (64, 128)
    },
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_smoke_run_writes_its_figures(name, tmp_path):
    report_path = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), name, "--quick", "--json", str(report_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(report_path.read_text())
    assert set(report) == {"benchmark", "machine", "versions", "shapes", "rows", "figures"}
    assert report["benchmark"] == name
    assert FIGURES[name] <= set(report["figures"])
    # The overhead of DeepSpeed may be negative in a single round of a tiny model.
    assert all(value > 0 or "overhead" in name for name, value in report["figures"].items())
