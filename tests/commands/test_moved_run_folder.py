"""Run folders are self-contained: copied elsewhere, without the corpus, every command that reads a model works."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import run_config, with_train
from support.small_tasks import config as finetune_config
from support.small_tasks import write_text_task
from support.worlds import RankFailed, run_world

from pmlm_dist.checkpoint.files import read_state, read_weights
from pmlm_dist.cli import main
from pmlm_dist.config import RunConfig
from pmlm_dist.conversion.export import export
from pmlm_dist.conversion.pretrained import find_pretrained, open_pretrained, save_pretrained

pytestmark = pytest.mark.distributed


def train(config: RunConfig) -> None:
    from pmlm_dist.training.run import pretrain

    pretrain(config)


def learn(config: Any) -> None:
    from pmlm_dist.downstream.finetune import finetune

    finetune(config)


@pytest.fixture(scope="module")
def moved(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, RunConfig]:
    """A run of three steps and its corpus, both at other places than in its settings."""
    root = tmp_path_factory.mktemp("runs")
    config = run_config(shutil.copytree(small_corpus, root / "corpus"), root / "run", steps=3)
    run_world(train, 1, config)
    (root / "elsewhere").mkdir()
    run = config.run_dir.rename(root / "elsewhere" / "run")
    return run, config.corpus.rename(root / "elsewhere" / "corpus"), config


def identity(checkpoint: Path) -> str | None:
    return read_state(checkpoint)["configuration"]["corpus_fingerprint"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("..", "run"), (".", "."), ("checkpoints", "."), ("checkpoints", ".."), ("checkpoints/step-00000003", ".")],
)
def test_moved_run_fills_masks(moved, folder: str, name: str, monkeypatch, capsys):
    monkeypatch.chdir(moved[0] / folder)
    assert main(["fill", "w1 [MASK]", "--model", name]) == 0
    assert "mask 1, step 1" in capsys.readouterr().out


def test_moved_run_is_exported_without_invented_facts(moved, tmp_path):
    export(str(moved[0]), format="mpnet", output=str(tmp_path / "out"))  # pyright: ignore[reportArgumentType]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "language:" not in card
    assert f"| corpus (sha256) | {identity(moved[0] / 'checkpoints' / 'step-00000003')} |" in card
    allowed = tmp_path / "plain"
    allowed.touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {allowed.stat().st_mode}, modes


def test_moved_run_is_fine_tuned_and_extended_and_keeps_the_corpus_identity(moved, tmp_path, capsys):
    run, _, _ = moved
    data = write_text_task(tmp_path / "data")
    run_world(learn, 1, finetune_config(run, data, tmp_path / "tuned"))
    tuned = (tmp_path / "tuned").rename(tmp_path / "elsewhere")
    assert main(["extend-positions", str(tuned), "--positions", "70", "--output", str(tmp_path / "long")]) == 0
    assert main(["fill", "w1 [MASK]", "--model", str(tmp_path / "long")]) == 0
    expected = identity(run / "checkpoints" / "step-00000003")
    assert [identity(find_pretrained(place).folder) for place in (run, tuned, tmp_path / "long")] == [expected] * 3
    saved = find_pretrained(tuned).state["configuration"]
    assert saved["task"]["data"] == str(data)
    export(tuned, format="mpnet", output=tmp_path / "out")
    assert "| fine-tuned for | classification |" in (tmp_path / "out" / "README.md").read_text()
    export(tmp_path / "long", format="unilm", output=tmp_path / "unilm")
    assert "UniLMv2" not in (tmp_path / "unilm" / "README.md").read_text()


def test_moved_run_is_resumed_where_its_corpus_is_found(moved, tmp_path):
    run, corpus, config = moved
    config = replace(config, run_dir=shutil.copytree(run, tmp_path / "run"), ds_config=run / "ds.json")
    resumed = with_train(config, steps=4)
    with pytest.raises(RankFailed, match=rf"which was {config.corpus}: name its place by --corpus"):
        run_world(train, 1, resumed)
    run_world(train, 1, replace(resumed, corpus=corpus))
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_missing_or_other_vocabulary_names_the_way_out(moved, tmp_path, capsys):
    run = shutil.copytree(moved[0], tmp_path / "run")
    (run / "tokenizer.json").unlink()
    assert main(["fill", "w1 [MASK]", "--model", str(run)]) == 2
    assert f"{run} has no tokenizer.json" in capsys.readouterr().err
    checkpoint = (run / "checkpoints" / "step-00000003").rename(tmp_path / "step-00000003")
    text = (moved[0] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    assert main(["fill", "w1 [MASK]", "--model", str(checkpoint)]) == 0
    settings = json.loads(text)
    ids = settings["model"]["vocab"]
    ids["w1"], ids["w2"] = ids["w2"], ids["w1"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert main(["fill", "w1 [MASK]", "--model", str(checkpoint)]) == 2
    assert "tokenizer.json is not the vocabulary that" in capsys.readouterr().err


def test_reshaped_checkpoint_has_the_vocabulary(moved, tmp_path):
    assert main(["checkpoint", "reshape", str(moved[0]), "--output", str(tmp_path / "full")]) == 0
    assert main(["fill", "w1 [MASK]", "--model", str(tmp_path / "full")]) == 0


def test_paths_may_be_strings(moved, tmp_path):
    pretrained = open_pretrained(str(moved[0]))
    assert read_weights(str(pretrained.facts["folder"])).keys() == pretrained.weights.keys()
    assert save_pretrained(pretrained, str(tmp_path / "saved")) == tmp_path / "saved"
