"""Demo classification task: no overlap of held-out texts with training, no package names in texts."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.downstream.demo.package_task import PackageTaskSize, baseline_scores, frequent_words, write_package_task

SPLITS = ("train", "validation", "test")

PACKAGES = ("numpy", "pandas", "scipy")


def write_docstrings(path: Path) -> Path:
    """Forty modules per package, six docstrings each; one is the same in all modules but for two words."""
    draw, rows = random.Random(0), []
    for package in PACKAGES:
        for module in range(40):
            for number in range(6):
                words = [f"{package[0]}{draw.randrange(50)}" for _ in range(30)]
                if number == 0:
                    words = [f"common{n}" for n in range(40)] + [f"x{module}", f"y{module}"]
                text = f"Part of {package.upper()} ({package}core, pd, np): " + " ".join(words)
                rows.append({"text": text, "package": package, "name": f"{package}.m{module}.f{number}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    source, size = write_docstrings(root / "docs.jsonl"), PackageTaskSize(classes=3, train=60, held_out=12)
    assert write_package_task(source, root / "package", size) == {"train": 180, "validation": 36, "test": 36}
    return root / "package"


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in SPLITS}


def test_classes_are_balanced_and_splits_share_no_module(folder: Path):
    splits = read(folder)
    modules = {name: {row["id"].rpartition(".")[0] for row in rows} for name, rows in splits.items()}
    assert not modules["train"] & modules["validation"]
    assert not modules["train"] & modules["test"]
    assert not modules["validation"] & modules["test"]
    for rows in splits.values():
        counts = [sum(row["label"] == package for row in rows) for package in PACKAGES]
        assert len(set(counts)) == 1


def test_fewer_packages_give_fewer_classes(folder: Path, tmp_path: Path):
    source = folder.parent / "docs.jsonl"
    few = PackageTaskSize(classes=10, min_classes=3, train=60, held_out=12)
    assert write_package_task(source, tmp_path / "few", few) == {"train": 180, "validation": 36, "test": 36}
    with pytest.raises(ConfigError, match="3 packages have enough docstrings"):
        write_package_task(source, tmp_path / "none", PackageTaskSize(train=60, held_out=12))


def test_texts_have_no_package_names_and_held_out_texts_are_not_in_training(folder: Path):
    splits = read(folder)
    for rows in splits.values():
        for row in rows:
            assert not re.search(r"numpy|pandas|scipy|\bnp\b|\bpd\b", row["text"], flags=re.IGNORECASE)
    assert any("common7" in row["text"] for row in splits["train"])
    assert not any("common7" in row["text"] for name in SPLITS[1:] for row in splits[name])


def test_baselines_have_expected_scores(folder: Path):
    scores = baseline_scores(folder)
    assert scores["majority class"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["frequent words"]["accuracy"] > 0.9  # every class has its own words
    train = [{"text": "red red cat", "label": "b"}, {"text": "blue dog", "label": "a"}]
    assert frequent_words(train * 60, [{"text": "x"}]) == ["a"]  # no common words: the first class


def test_package_task_with_too_few_docstrings_raises_and_nothing_is_overwritten(folder: Path, tmp_path: Path):
    source = folder.parent / "docs.jsonl"
    with pytest.raises(ConfigError, match="already exists and is not overwritten"):
        write_package_task(source, folder)
    with pytest.raises(ConfigError, match=r"0 packages have enough docstrings \(150 for .*\), 4 are required"):
        write_package_task(source, tmp_path / "new")
    with pytest.raises(ConfigError, match="make it with `pmlm prepare-corpus"):
        write_package_task(tmp_path / "none.jsonl", tmp_path / "new")
    assert not (tmp_path / "new").exists()
