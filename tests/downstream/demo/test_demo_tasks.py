"""Demo tasks: splits of the summary task, and the held-out texts of both tasks."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.filters.contamination import read_held_out
from pmlm_dist.downstream.demo import demo_tasks
from pmlm_dist.downstream.demo.demo_tasks import DEMO_TASKS, write_data
from pmlm_dist.downstream.demo.package_task import PackageTaskSize, write_package_task
from pmlm_dist.downstream.demo.summary_task import write_summary_task

SIZES = {"train": 40, "validation": 6, "test": 8}


def write_docstrings(path: Path) -> Path:
    """Sixty packages of twenty modules: a line, a blank line, forty words; one body is the same in all packages."""
    draw, rows = random.Random(0), []
    for package in range(60):
        for module in range(20):
            body = " ".join(f"p{package}w{draw.randrange(40)}" for _ in range(40))
            body = " ".join(f"common{n}" for n in range(40)) if module == 0 else body
            line = " ".join(f"{word}{draw.randrange(1000)}" for word in ("Take", "give", "and", "leave"))
            name = f"pack{package}.m{module}.f"
            rows.append({"text": f"{line}.\n\n{body}", "package": f"pack{package}", "name": name})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_docstrings(tmp_path / "docs.jsonl")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.open()]


def test_summary_splits_share_no_package_and_no_text(source: Path, tmp_path: Path):
    assert write_summary_task(source, tmp_path / "summary", SIZES) == SIZES
    splits = {name: read(tmp_path / "summary" / f"{name}.jsonl") for name in SIZES}
    packages = {name: {row["id"].split(".")[0] for row in rows} for name, rows in splits.items()}
    assert not packages["train"] & (packages["validation"] | packages["test"])
    assert not packages["validation"] & packages["test"]
    for name in ("validation", "test"):
        assert all(row["tgt"].startswith("Take") and len(row["src"].split()) == 40 for row in splits[name])
        assert not any("common1" in row["src"] for row in splits[name])


def test_summary_task_with_too_few_docstrings_raises_and_nothing_is_overwritten(source: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="9999 are required"):
        write_summary_task(source, tmp_path / "summary", {**SIZES, "test": 9999})
    assert not (tmp_path / "summary").exists()
    write_summary_task(source, tmp_path / "summary", SIZES)
    with pytest.raises(ConfigError, match="is not overwritten"):
        write_summary_task(source, tmp_path / "summary", SIZES)
    with pytest.raises(ConfigError, match="there is no"):
        write_summary_task(tmp_path / "none.jsonl", tmp_path / "new", SIZES)


def test_held_out_file_has_full_docstrings_of_both_tasks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def package(source: Path, output: Path) -> dict[str, int]:
        return write_package_task(source, output, PackageTaskSize(3, 3, train=4, held_out=1))

    def summary(source: Path, output: Path) -> dict[str, int]:
        return write_summary_task(source, output, SIZES)

    writes = {"package": package, "summary": summary}
    tasks = {name: dataclasses.replace(DEMO_TASKS[name], write=write) for name, write in writes.items()}
    monkeypatch.setattr(demo_tasks, "DEMO_TASKS", tasks)
    output = tmp_path / "tasks"
    write_data(source, output)
    ids = {
        row["id"]
        for name in tasks
        for split in ("validation", "test")
        for row in read(output / name / f"{split}.jsonl")
    }
    assert len(ids) > 14
    rows = read(source)
    held_out = read_held_out([str(output / "held-out.jsonl")], words=13)
    assert {row["name"] for row in rows if row["name"] in ids} == ids
    assert all(held_out.overlaps(row["text"]) for row in rows if row["name"] in ids)
    assert not all(held_out.overlaps(row["text"]) for row in rows)
    before = {path: path.read_bytes() for path in output.rglob("*.jsonl")}
    write_data(source, output)
    assert {path: path.read_bytes() for path in output.rglob("*.jsonl")} == before
