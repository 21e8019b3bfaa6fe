"""Every benchmark's quick run writes the same JSON; the values that it measures are not judged.

The runs are forked from the fork server, so the imports of torch and DeepSpeed are paid once for all of them.
"""

import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from support.worlds import run_world

ROOT = Path(__file__).parent.parent
FIGURES = {
    "checkpoint": {"stall_share", "bytes_per_parameter"},
    "plan": {"memory_error", "time_error", "heap"},
    "scale": {
        "agreements_exposed_per_step",
        "stats_per_second_at_64",
        "opens_per_rank_at_resume",
        "sockets_per_rank",
        "failure_opens_per_second",
    },
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
    "attention": {f"fused_vs_reference_{length}" for length in (64, 128)},
}


def run_quickly(name: str, report: Path) -> None:
    """What `python benchmarks/run.py NAME --quick --json REPORT` does, without its ten seconds of imports."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable)  # no launcher started it
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # worlds would start fork servers that import all again
    sys.argv = ["benchmarks/run.py", name, "--quick", "--json", str(report)]
    importlib.import_module("run").main()


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_benchmark_quick_run_writes_its_figures(name, tmp_path):
    run_world(run_quickly, 1, name, tmp_path / "report.json", timeout_s=600)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"benchmark", "machine", "versions", "shapes", "rows", "figures"}
    assert report["benchmark"] == name
    assert FIGURES[name] <= set(report["figures"])
    # The overhead of DeepSpeed may be negative in a single round of a tiny model; exposed agreements are counted.
    assert all(value > 0 or "overhead" in name or "exposed" in name for name, value in report["figures"].items())
