"""`train.py --init`: step 0 has the given weights on every topology; weights that do not fit raise before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.random_models import WORDS, random_pretrained, save_random_model
from support.saving_runs import printed_by_pretrain
from support.small_runs import MODEL, run_config, start_run, take_steps, whole_weights, with_model, with_train
from support.worlds import run_world

from pmlm_dist.checkpoint.initial_weights import initial_weights_problems
from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.conversion.pretrained import PretrainedWeights, save_pretrained
from pmlm_dist.planning.parameters import parameter_shapes
from pmlm_dist.vocabulary.vocabulary import Vocabulary

ROW_PARALLEL = ("attention.output.weight", "ffn_out.weight")
REPLICATED = ("norm.weight", "norm.bias", "output.bias", "ffn_out.bias", "position.weight", "segment.weight")


def save_initial(corpus: Path, folder: Path, **changes: Any) -> PretrainedWeights:
    """Save random weights for runs on `corpus` in `folder`."""
    words = Vocabulary.load(corpus)
    model, generator = replace(MODEL, vocab_size=words.size, **changes), torch.Generator().manual_seed(5)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}
    pretrained = PretrainedWeights(model, weights, words, {"format": "bert", "from": "a test", "notes": []})
    save_pretrained(pretrained, folder)
    return pretrained


def start(config: RunConfig) -> dict[str, Any]:
    """Return this rank's weights before the first step, and the losses of the first two steps."""
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.initial_weights import load_initial_weights
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    engine = build_engine(run)
    assert config.init is not None
    state = EngineState(engine, run.topology)
    load_initial_weights(state, config.init)
    before = whole_weights(engine.module)
    masters = {
        f"{owned.fragment.name}@{owned.fragment.start}": owned.tensors["weight"].clone()
        for owned in state.owned_fragments()
    }
    moments = max(
        float(owned.tensors[kind].abs().max())
        for owned in state.owned_fragments()
        for kind in ("exp_avg", "exp_avg_sq")
    )
    _, losses, _ = take_steps(run, engine, RunState(), steps=2)
    return {
        "weights": {name: weight.numpy() for name, weight in before.items()},
        "masters": {name: weight.numpy() for name, weight in masters.items()},
        "moments": moments,
        "losses": losses,
        "tp_rank": run.topology.tp_rank,
    }


def slice_of(whole: np.ndarray, name: str, *, part: np.ndarray, rank: int) -> np.ndarray:
    """The slice of `whole` that tensor-parallel `rank` holds, of the size of `part`, without padding."""
    dim = 1 if name.endswith(ROW_PARALLEL) else 0
    first = rank * part.shape[dim] if whole.shape != part.shape else 0
    return np.take(whole, range(first, min(first + part.shape[dim], whole.shape[dim])), axis=dim)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "ranks", "engine"),
    [(1, 1, {"zero": 0}), (1, 2, {"zero": 2}), (2, 2, {"zero": 1, "precision": "bf16"}), (2, 4, {"zero": 3})],
    ids=str,
)
def test_every_topology_starts_from_the_initial_weights(
    small_corpus, tmp_path, tp: int, ranks: int, engine: dict[str, Any]
):
    given = save_initial(small_corpus, tmp_path / "initial")
    config = replace(run_config(small_corpus, tmp_path / "run", tp=tp, **engine), init=tmp_path / "initial")
    config = replace(config, data=replace(config.data, lanes=8))
    single_rank = run_world(start, 1, replace(config, parallel=replace(config.parallel, tp=1)))[0]["losses"]
    is_bf16 = engine.get("precision") == "bf16"
    for answer in run_world(start, ranks, config):
        assert answer["moments"] == 0.0
        assert answer["weights"].keys() == given.weights.keys()
        for name, weight in answer["weights"].items():
            whole = given.weights[name]
            expected = slice_of(
                (whole.bfloat16().float() if is_bf16 else whole).numpy(), name, part=weight, rank=answer["tp_rank"]
            )
            assert np.array_equal(weight[: len(expected)], expected), name
        np.testing.assert_allclose(answer["losses"], single_rank, rtol=1e-3 if is_bf16 else 5e-6)


def error_at_start(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        start_run(config)
    return str(caught.value)


def test_init_from_another_architecture_reports_every_setting_and_its_flag(small_corpus, tmp_path):
    save_initial(small_corpus, tmp_path / "initial", relative_bias=False)
    config = with_model(run_config(small_corpus, tmp_path / "run"), hidden_size=48, num_layers=3, hidden_dropout=0.1)
    message = error_at_start(replace(config, init=tmp_path / "initial"))
    assert "model.hidden_size (48) is 32" in message
    assert "use --model.hidden-size 32" in message
    assert "use --model.num-layers 2" in message
    assert "use --model.no-relative-bias" in message
    assert "hidden_dropout" not in message


def test_init_with_another_vocabulary_raises(small_corpus, tmp_path):
    save_random_model(tmp_path / "initial", max_positions=64)
    config = replace(run_config(small_corpus, tmp_path / "run"), init=tmp_path / "initial")
    assert "its vocabulary is not the corpus'" in error_at_start(config)


def test_init_with_the_same_tokens_read_otherwise_raises(tmp_path):
    model = random_pretrained().model
    save_random_model(tmp_path / "weights")
    assert initial_weights_problems(tmp_path / "weights", model, Vocabulary.from_tokens(WORDS)) == []
    (problem,) = initial_weights_problems(tmp_path / "weights", model, Vocabulary.from_tokens(WORDS, lowercase=False))
    assert "its vocabulary is not the corpus' (tokens, their ids, casing, accents, added words)" in problem


def test_init_from_corrupt_or_missing_weights_raises(small_corpus, tmp_path):
    config = replace(run_config(small_corpus, tmp_path / "run"), init=tmp_path / "initial")
    assert "there is no checkpoint in" in error_at_start(config)
    save_initial(small_corpus, tmp_path / "initial")
    file = tmp_path / "initial" / "weights" / "step-00000000" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "bytes, expected" in error_at_start(config)


@pytest.mark.distributed
def test_run_starts_from_the_checkpoint_of_another_run_and_then_resumes_from_its_own(small_corpus, tmp_path):
    first = run_config(small_corpus, tmp_path / "first", tp=2, steps=3)
    run_world(printed_by_pretrain, 2, first)
    second = replace(run_config(small_corpus, tmp_path / "second", steps=4), init=tmp_path / "first")
    (printed,) = run_world(printed_by_pretrain, 1, with_train(second, stop_at=2))
    assert f"weights: from {tmp_path / 'first' / 'checkpoints' / 'step-00000003'}" in printed
    (printed,) = run_world(printed_by_pretrain, 1, second)
    assert "weights: from" not in printed
    assert "after step 2;" in printed


@pytest.mark.distributed
def test_resume_from_weights_without_moments_raises(small_corpus, tmp_path):
    save_initial(small_corpus, tmp_path / "initial")
    config = run_config(small_corpus, tmp_path / "run")
    run_world(restore_without_moments, 1, config, tmp_path / "initial" / "weights" / "step-00000000")


def restore_without_moments(config: RunConfig, folder: Path) -> None:
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.files import CheckpointReader
    from pmlm_dist.training.pretraining import build_engine

    run = start_run(config)
    state = EngineState(build_engine(run), run.topology)
    with CheckpointReader(folder) as reader, pytest.raises(ConfigError, match="weights alone"):
        state.restore(reader, {})
