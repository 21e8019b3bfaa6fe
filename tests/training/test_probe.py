"""`--train.probe`: the accuracy on minimal pairs at every validation, as `pmlm evaluate --suite` gives it."""

from pathlib import Path
from typing import Any

import pytest
from support.small_runs import run_config, with_train
from support.small_tasks import write_jsonl
from support.worlds import RankFailed, run_world

from pmlm_dist.config import RunConfig
from pmlm_dist.likelihood.minimal_pairs import BAD, GOOD
from pmlm_dist.metrics.run_log import read_metrics
from pmlm_dist.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.distributed


def pretrained(config: RunConfig) -> None:
    from pmlm_dist.training.run import pretrain

    pretrain(config)


def suite(model: Path, data: Path) -> dict[str, dict[str, Any]]:
    from pmlm_dist.downstream.suite import SuiteConfig, evaluate_suite

    return evaluate_suite(SuiteConfig(suite="blimp", model=model, data=data))


@pytest.fixture(scope="module")
def pairs(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of three paradigms; sentences of 2 to 9 tokens, of which one is in another order."""
    vocabulary = Vocabulary.load(small_corpus)
    words = [token for token in vocabulary.tokens[5:] if token.startswith("w")]
    rows = []
    for number in range(30):
        sentence = words[number : number + 2 + number % 8]
        pair = {GOOD: " ".join(sentence), BAD: " ".join(reversed(sentence))}
        rows.append({**pair, "UID": f"p{number % 3}", "linguistics_term": f"t{number % 2}"})
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {"zero": 0}), (2, {"zero": 3}), (2, {"zero": 1, "tp": 2})], ids=str
)
def test_probe_equals_the_evaluation_of_the_checkpoint(
    small_corpus: Path, tmp_path: Path, pairs: Path, ranks: int, settings: dict[str, Any]
):
    config = run_config(small_corpus, tmp_path / "run", steps=3, **settings)
    run_world(pretrained, ranks, with_train(config, probe=pairs, probe_pairs=1000, validate_every=1))
    metrics = read_metrics(config.run_dir)
    assert {"probe/par", "probe/pll", "probe/par/t0", "probe/pll/t1"} <= metrics[1].keys()
    (expected, *_) = run_world(suite, 1, config.run_dir, pairs)
    for method, result in expected.items():
        assert metrics[3][f"probe/{method}"] == pytest.approx(result["accuracy"])
        for term, accuracy in result["terms"].items():
            assert metrics[3][f"probe/{method}/{term}"] == pytest.approx(accuracy)


def test_sentence_too_long_for_the_model_ends_the_start(small_corpus: Path, tmp_path: Path):
    long = write_jsonl(tmp_path / "long.jsonl", [{GOOD: "a " * 600, BAD: "b"}])
    config = with_train(run_config(small_corpus, tmp_path / "run"), probe=long)
    with pytest.raises(RankFailed, match=r"train\.probe .*long\.jsonl.*a sentence has .* tokens, the model takes"):
        run_world(pretrained, 2, config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
