"""Pre-training on a mixture, part of it behind a web server: logs, changes on resume, errors."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import write_corpus
from support.faulty_server import serving
from support.small_runs import run_config, start_run, with_train
from support.worlds import RankFailed, run_world

from pmlm_dist.config import ConfigError, DataConfig, ParallelConfig, RunConfig
from pmlm_dist.corpus.shards import Manifest
from pmlm_dist.data.mixture import Mixture
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.distributed


def pretrained(config: RunConfig) -> None:
    from pmlm_dist.training.run import pretrain

    pretrain(config)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 shards of 6 samples with the vocabulary of the small corpus."""
    return write_corpus(tmp_path_factory.mktemp("other"), shards=5, samples=6, seed=1)


def configured(corpus: Path, run_dir: Path, sources: dict[str, float], **data) -> RunConfig:
    config = run_config(corpus, run_dir, steps=6)
    settings = DataConfig(**{"lanes": 4, "workers": 0, "sources": sources, "retry_wait_s": 0.01, **data})
    return replace(config, data=settings)


def losses(config: RunConfig) -> dict[int, float]:
    return {step: scalars["train/total"] for step, scalars in read_metrics(config.run_dir).items()}


def test_mixture_of_disk_and_server_resumes_on_another_number_of_ranks(small_corpus, other, tmp_path):
    with serving(other) as server:
        here = {str(small_corpus): 0.75, str(other): 0.25}
        straight = configured(small_corpus, tmp_path / "straight", here)
        run_world(pretrained, 1, straight)
        there = {str(small_corpus): 3.0, server.address: 1.0}  # the same corpora and shares
        moved = configured(small_corpus, tmp_path / "moved", there, cache=str(tmp_path / "cache"))
        run_world(pretrained, 2, with_train(moved, stop_at=3))
        server.faults = ["500", "cut", "flip"]
        run_world(pretrained, 1, moved)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-4)
    last = read_metrics(straight.run_dir)[6]
    expected = Mixture([0.75, 0.25], lanes=4).counts(48)
    for source, count, size in zip((small_corpus, other), expected, (96, 30), strict=True):
        assert last[f"data/samples/{source}"] == count
        assert last[f"data/epochs/{source}"] == pytest.approx(count / size)
    with pytest.raises(RankFailed, match=r"data\.sources was .*750.* is now .*500"):
        run_world(
            pretrained,
            1,
            replace(with_train(straight, steps=9), data=replace(straight.data, sources=dict.fromkeys(here, 0.5))),
        )


def initial_head_bias(config: RunConfig) -> list[float]:
    from pmlm_dist.parallel import groups
    from pmlm_dist.training.pretraining import build_engine
    from pmlm_dist.training.resolve import resolve

    run = resolve(config, groups.init_process_groups(tp=config.parallel.tp))
    engine: Any = build_engine(run)
    return engine.module.head.bias.tolist()


def test_initial_head_bias_is_the_log_frequency_by_weight(small_corpus, tmp_path):
    """Words 0 and 1 are 1 and 3 of 4 tokens in one corpus, 3 and 1 in the other, of three times the weight."""
    size = Vocabulary.load(small_corpus).size
    corpora = {}
    for name, words in (("first", (99, 299)), ("second", (299, 99))):
        corpora[name] = shutil.copytree(small_corpus, tmp_path / name)
        counts = [10_000, *words, *[0] * (size - 3)]
        replace(Manifest.load(corpora[name]), token_counts=" ".join(map(str, counts))).save(corpora[name])
    sources = {str(corpora["first"]): 1.0, str(corpora["second"]): 3.0}
    config = configured(corpora["first"], tmp_path / "run", sources)
    halves = run_world(initial_head_bias, 2, replace(config, parallel=ParallelConfig(tp=2)))
    total = 10_000 + 398 + size
    expected = np.log(np.array([10_001, 0.25 * 100 + 0.75 * 300, 0.25 * 300 + 0.75 * 100, *[1] * (size - 3)]) / total)
    bias = [*halves[0], *halves[1]]
    assert bias[:size] == pytest.approx(expected)
    assert set(bias[size:]) == {0.0}
    zeros = replace(config, model=replace(config.model, initial_head_bias="zeros"))
    assert set(run_world(initial_head_bias, 1, zeros)[0]) == {0.0}


def refusals(configs: list[RunConfig]) -> list[str]:
    found = []
    for config in configs:
        try:
            start_run(config)
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found


def test_incompatible_sources_raise_before_the_first_step(small_corpus, other, tmp_path):
    words = write_corpus(tmp_path / "words", words=60)
    longer = write_corpus(tmp_path / "longer", sequence_length=48)
    with serving(other) as server:
        address = server.address
        configs = [
            configured(small_corpus, tmp_path / "run", {str(other): 1.0, str(words): 1.0, str(longer): 1.0}),
            configured(small_corpus, tmp_path / "run", {str(other): 1.0}, lanes=8),
            configured(small_corpus, tmp_path / "run", {address: 1.0}),
            configured(small_corpus, tmp_path / "run", {address: 1.0}, cache=str(tmp_path / "c"), cache_gib=1e-5),
            configured(small_corpus, tmp_path / "run", {"pipe:touch x": 1.0}, cache=str(tmp_path / "c")),
            configured(small_corpus, tmp_path / "run", {str(tmp_path / "nowhere"): 1.0}),
        ]
        found = run_world(refusals, 1, configs)[0]
    assert "written with another vocabulary than --corpus" in found[0]
    assert "has sequences of 48 tokens, --corpus of 32" in found[0]
    assert "data.lanes (8) must not exceed the number of training shards (5)" in found[1]
    assert "name a folder for its shards with --data.cache" in found[2]
    assert "data.cache_gib (1e-05) must be at least" in found[3]
    assert "commands are never run" in found[4]
    assert "no corpus in" in found[5]
