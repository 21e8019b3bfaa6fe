"""A shard that becomes unreadable is quarantined on every rank alike, also after a resume."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.small_runs import run_config, with_train
from support.worlds import RankFailed, run_world

from pmlm_dist.config import ConfigError, DataConfig, RunConfig
from pmlm_dist.corpus.shards import TRAIN, VALIDATION, Manifest, ShardError
from pmlm_dist.data.order import SampleOrder
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.training.batches import CorruptShard, load_quarantine, save_quarantine

pytestmark = pytest.mark.distributed

STEPS, BATCH, LANES, SEED = 12, 8, 4, 7
FOUND_AT = 7
"""The step that reads the first sample of the lanes' second shards: 12 samples a shard, 2 of each lane a step."""


def pretrained(config: RunConfig) -> None:
    from pmlm_dist.training.run import pretrain

    pretrain(config)


def configured(corpus: Path, run_dir: Path, **engine) -> RunConfig:
    data = DataConfig(lanes=LANES, workers=0, retries=1, retry_wait_s=0.0, quarantine_limit=0.2)
    config = replace(run_config(corpus, run_dir, steps=STEPS, **engine), data=data)
    return with_train(config, validate_every=STEPS)


def losses(run_dir: Path) -> dict[int, float]:
    return {step: scalars["train/total"] for step, scalars in read_metrics(run_dir).items() if "train/total" in scalars}


def failures_of_two_ranks(function: Callable[[RunConfig], None], config: RunConfig) -> tuple[str, str]:
    """What each of two ranks, which must both fail, says of it."""
    with pytest.raises(RankFailed) as caught:
        run_world(function, 2, config)
    of_rank_0, _, of_rank_1 = str(caught.value).partition("rank 1:\n")
    return of_rank_0, of_rank_1


@pytest.fixture(scope="module")
def bad() -> int:
    """A shard that the run comes to at step 7."""
    return SampleOrder((12,) * 8, lanes=LANES, seed=SEED).locate((FOUND_AT - 1) * BATCH + 1).shard


@pytest.fixture
def corpus(small_corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus, tmp_path / "corpus"))


def damage(corpus: Path, number: int) -> None:
    shard = corpus / Manifest.load(corpus).splits[TRAIN].shards[number].name
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)


@pytest.fixture(scope="module")
def whole(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run on the corpus as it was written."""
    config = configured(small_corpus, tmp_path_factory.mktemp("whole"))
    run_world(pretrained, 1, config)
    return losses(config.run_dir)


@pytest.mark.parametrize(("ranks", "engine"), [(2, {}), (2, {"tp": 2})], ids=["dp2", "tp2"])
@pytest.mark.fault("F50", "F54")
def test_corrupt_shard_is_quarantined_by_one_rule_also_after_resume(corpus, tmp_path, bad, whole, *, ranks, engine):
    damage(corpus, bad)
    straight = configured(corpus, tmp_path / "straight", **engine)
    run_world(pretrained, ranks, straight)
    (shard,) = load_quarantine(straight.run_dir)
    expected = Manifest.load(corpus).splits[TRAIN].shards[bad]
    assert (shard.shard, shard.sha256, shard.samples) == (expected.name, expected.sha256, 12)
    assert "sha256" in shard.error
    found = losses(straight.run_dir)
    assert len(found) == STEPS
    before = [step for step in found if step < FOUND_AT]
    assert [found[step] for step in before] == pytest.approx([whole[step] for step in before], rel=1e-4)
    assert found[FOUND_AT] != pytest.approx(whole[FOUND_AT], rel=1e-4)
    scalars = read_metrics(straight.run_dir)
    assert [scalars[step]["data/quarantined_samples"] for step in (FOUND_AT - 1, FOUND_AT, STEPS)] == [0, 12, 12]

    stopped = configured(corpus, tmp_path / "stopped", **engine)
    run_world(pretrained, ranks, with_train(stopped, stop_at=FOUND_AT + 2))
    run_world(pretrained, 1, replace(stopped, parallel=replace(stopped.parallel, tp=1)))
    assert losses(stopped.run_dir) == pytest.approx(found, rel=1e-4)


def test_quarantined_shard_is_never_opened(corpus, tmp_path, bad):
    shard = Manifest.load(corpus).splits[TRAIN].shards[bad]
    config = configured(corpus, tmp_path / "run")
    config.run_dir.mkdir(exist_ok=True)
    record = CorruptShard(str(corpus), shard.name, shard.sha256, shard.samples, None, "said so")
    (config.run_dir / "quarantine.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"quarantine.json cannot be read .*: restore it, or remove it"):
        load_quarantine(config.run_dir)
    save_quarantine(config.run_dir, (record,))
    run_world(pretrained, 1, config)
    assert load_quarantine(config.run_dir) == (record,)
    known = losses(config.run_dir)
    damage(corpus, bad)
    found_on_the_way = configured(corpus, tmp_path / "found")
    run_world(pretrained, 1, found_on_the_way)
    assert losses(found_on_the_way.run_dir) == known


@pytest.mark.fault("F50")
def test_quarantine_limit_exceeded_raises_on_all_ranks(corpus, tmp_path, bad):
    damage(corpus, bad)
    config = configured(corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, quarantine_limit=0.1))
    with pytest.raises(RankFailed) as caught:
        run_world(pretrained, 2, config)
    assert str(caught.value).count("12 of 96 training samples (12.50%) lie in shards that cannot be read") == 2
    assert "data.quarantine_limit (10.00%)" in str(caught.value)


def _with_a_bad_validation_shard(config: RunConfig) -> None:
    """Pre-train; rank 1, as if on another node, cannot read the validation shard."""
    from pmlm_dist.data import stream
    from pmlm_dist.training.run import pretrain

    opened = stream.open_shard

    def open_shard(path, shard):
        if os.environ["RANK"] == "1" and shard.name.startswith(VALIDATION):
            raise ShardError(f"{path} is broken on this node", shard=shard)
        return opened(path, shard)

    stream.open_shard = open_shard
    pretrain(config)


@pytest.mark.parametrize("validated_at", [STEPS - 4, STEPS], ids=["on the way", "last"])
@pytest.mark.fault("F54")
def test_validation_shard_unreadable_on_one_rank_ends_all_ranks(corpus, tmp_path, validated_at):
    """Not by the collectives' time limit: that is longer than the ranks are waited for."""
    config = with_train(
        configured(corpus, tmp_path / "run"),
        validate_every=validated_at,
        validation_samples=8,
        collective_timeout_s=900,
    )
    of_rank_0, of_rank_1 = failures_of_two_ranks(_with_a_bad_validation_shard, config)
    assert "CorpusReadError: rank 1 cannot read its batches: " in of_rank_0
    assert "validation/shard-000000.tar is broken on this node" in of_rank_0
    assert "ShardError: " in of_rank_1
    assert max(losses(config.run_dir)) == validated_at


def _with_a_killer(config: RunConfig) -> None:
    """Pre-train, with the loader worker of rank 1 killed after the first step."""
    from pmlm_dist.training import loop
    from pmlm_dist.training.run import pretrain

    plain = loop.train_step

    def train_step(run, *args, **kwargs):
        if os.environ["RANK"] == "1":
            for server in psutil.Process().children():
                for worker in server.children():
                    worker.send_signal(signal.SIGKILL)
        return plain(run, *args, **kwargs)

    loop.train_step = train_step
    pretrain(config)


@pytest.mark.fault("F56")
def test_killed_loader_worker_ends_the_run_on_every_rank(corpus, tmp_path):
    config = configured(corpus, tmp_path / "run")
    config = replace(config, data=replace(config.data, workers=1))
    of_rank_0, of_rank_1 = failures_of_two_ranks(_with_a_killer, config)
    assert "CorpusReadError: rank 1 cannot read its batches: loader worker 0" in of_rank_0
    assert "WorkerError: loader worker 0" in of_rank_1
    assert "died by signal SIGKILL" in of_rank_1


def test_shard_lost_between_attempts_is_quarantined(corpus, tmp_path, bad):
    config = configured(corpus, tmp_path / "run")
    run_world(pretrained, 1, with_train(config, stop_at=3))
    (corpus / Manifest.load(corpus).splits[TRAIN].shards[bad].name).unlink()
    run_world(pretrained, 1, config)
    (shard,) = load_quarantine(config.run_dir)
    assert "cannot be opened: No such file or directory" in shard.error
    assert max(losses(config.run_dir)) == STEPS


def test_unreadable_quarantine_raises_config_error(tmp_path):
    assert load_quarantine(tmp_path) == ()
    for content in ("{", "[]", json.dumps({"shards": [{"shard": "x"}]})):
        (tmp_path / "quarantine.json").write_text(content)
        with pytest.raises(ConfigError, match=r"quarantine\.json cannot be read"):
            load_quarantine(tmp_path)
