"""The ablation: its comparator, its table, and what it repeats after an interruption."""

import importlib
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import run_world

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "ablation"))
ablation: Any = importlib.import_module("ablation")

TRAIN = shlex.split("""
    --preset tiny --batch.global 4 --batch.micro 2 --data.workers 0 --objective.kind ae --model.no-relative-bias
    --model.hidden-size 32 --model.num-heads 2 --model.ffn-size 64 --model.num-layers 2 --model.hidden-dropout 0.1
    --optim.warmup-steps 1 --optim.peak-lr 1e-2
    --train.steps 40 --train.validate-every 20 --train.checkpoint-every 5
""")


class Interrupted(Exception):
    pass


def trained_bert(arguments: list[str], interrupted_at: int | None) -> dict[str, Any]:
    """Train the comparator, perhaps in two attempts; return its curve, and the losses of the imported model."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "ablation"))
    hf_bert: Any
    losses: Any
    hf_bert, losses = importlib.import_module("hf_bert"), importlib.import_module("losses")
    if interrupted_at is not None:
        original, calls = hf_bert.learning_rate, []

        def interrupting(step: int, **settings: Any) -> float:
            calls.append(step)
            if step == interrupted_at:
                raise Interrupted
            return original(step, **settings)

        hf_bert.learning_rate = interrupting
        with pytest.raises(Interrupted):
            hf_bert.main(arguments)
        hf_bert.learning_rate = original
    hf_bert.main(arguments)
    run = losses.resolve(losses.run_config(arguments), losses.groups.init_process_groups())
    return {**losses.curves(run, run.config.run_dir), "losses": losses.losses(run, run.config.run_dir / "model")}


@pytest.mark.full
@pytest.mark.distributed
def test_comparator_resumes_and_its_imported_model_has_its_loss(small_corpus: Path, tmp_path: Path):
    found = []
    for name, interrupted_at in (("straight", None), ("resumed", 8)):
        arguments = [*TRAIN, "--corpus", str(small_corpus), "--run-dir", str(tmp_path / name)]
        found += run_world(trained_bert, 1, arguments, interrupted_at)
    straight, resumed = found
    assert [step for step, _ in straight["validation"]["AE"]] == [20, 40]
    assert resumed["validation"]["AE"][-1] == straight["validation"]["AE"][-1]
    assert straight["losses"]["AE"] == pytest.approx(straight["validation"]["AE"][-1][1], rel=1e-5)
    assert straight["validation"]["AE"][-1][1] < straight["validation"]["AE"][0][1]
    assert set(straight["losses"]) == {"AE", "PAR", "AR", "left to right"}


def result(row: str, seed: int, *, ae: float, flops: float) -> dict[str, Any]:
    curve = [[step, ae + (10 - step) / 10] for step in (5, 10)]
    return {
        "row": row,
        "seed": seed,
        "curves": {"validation": {"AE": curve}, "steps": 10, "flops_per_step": flops},
        "losses": {"AE": ae},
        "blimp": {"pll": {"accuracy": 0.5 + ae / 100, "terms": {}}},
        "finetune/cola": {"metric": "matthews", "values": [0.1, 0.3]},
    }


def test_table_has_means_and_paired_differences_at_equal_tokens_and_flops():
    results = [
        result("ae-par", 0, ae=4.0, flops=2.0),
        result("ae-par", 1, ae=4.2, flops=2.0),
        result("ae", 0, ae=4.1, flops=1.5),
        result("ae", 1, ae=4.5, flops=1.5),
    ]
    lines = ablation.table(results, {row: row.upper() for row in ablation.ROWS}).splitlines()
    cells = {line.split("|")[1].strip() + ("" if n < 12 else " +"): line for n, line in enumerate(lines) if "|" in line}
    assert cells["loss AE"] == "| loss AE | 4.100 ± 0.141 | 4.300 ± 0.283 |"
    assert cells["loss AE +"] == "| loss AE | +0.200 ± 0.100 |"
    assert cells["cola matthews"] == "| cola matthews | 20.000 ± 0.000 | 20.000 ± 0.000 |"
    # 15 FLOPs are 7.5 of the 10 steps of AE+PAR: half way between 4.5 and 4.0 for the first seed.
    assert cells["AE at equal FLOPs"] == "| AE at equal FLOPs | 4.350 ± 0.141 | 4.300 ± 0.283 |"


def test_finished_pieces_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def piece(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "second" and calls.count("second") == 1:
            raise RuntimeError("second failed")
        return {"of": name}

    run = ablation.Run("ae", 3, {"train": ""}, {}, tmp_path / "work", tmp_path, threads=1)
    run.folder.mkdir(parents=True)
    monkeypatch.setattr(
        ablation, "pieces", lambda _: {name: lambda name=name: piece(name) for name in ("first", "second")}
    )
    with pytest.raises(RuntimeError, match="second failed"):
        ablation.run_all(run)
    assert run.folder.exists()
    ablation.run_all(run)
    ablation.run_all(run)
    assert calls == ["first", "second", "second"]
    assert json.loads((tmp_path / "ae-3.json").read_text())["second"] == {"of": "second"}
    assert not run.folder.exists()


def test_run_stops_at_its_deadline_and_a_failed_command_shows_its_last_lines(tmp_path: Path):
    run = ablation.Run("ae", 3, {"train": ""}, {}, tmp_path / "work", tmp_path, 1, deadline=time.monotonic() + 0.3)
    with pytest.raises(ablation.OutOfTime):
        run.call("sleep", "60")
    run = replace(run, deadline=time.monotonic() + 60)
    with pytest.raises(RuntimeError, match=r"(?s)ae-3: .* ended with 3, see .*log.txt:.*no such row"):
        run.call("sh", "-c", "echo no such row; exit 3")


def test_packed_data_are_those_of_the_folder(tmp_path: Path):
    for name in ("corpus/manifest.json", "tasks/trec/train.jsonl", "BLiMP.zip"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(name)
    ablation.pack(tmp_path / "here", tmp_path / "packed" / "all.tar.xz")
    ablation.unpack(tmp_path / "packed" / "all.tar.xz", tmp_path / "there")
    names = [path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.*")]
    assert sorted(names) == ["BLiMP.zip", "corpus/manifest.json", "tasks/trec/train.jsonl"]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_settings_of_all_rows_are_valid(scale: str):
    from shlex import split

    from pmlm_dist.cli import run_config
    from pmlm_dist.relations import problems

    sizes = json.loads((ablation.RECIPES / f"scale-{scale}.json").read_text())
    for row in ablation.ROWS:
        recipe = json.loads((ablation.RECIPES / f"{row}.json").read_text())
        assert problems(run_config([*split(sizes["train"]), *split(recipe["train"])])) == []
