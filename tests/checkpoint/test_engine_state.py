"""Engine state is saved and restored to the last counter: ZeRO layouts, fp16, offload; other models raise."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import run_config, start_run, take_steps, with_model
from support.worlds import run_world

from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.checkpoint.files import CheckpointReader, read_state
from pmlm_dist.checkpoint.fingerprint import ROUNDING, TOLERANCES, fingerprint_differences
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.resume import RunState, load_checkpoint
from pmlm_dist.config import ConfigError, RunConfig
from pmlm_dist.metrics.run_log import RunLog

pytestmark = pytest.mark.distributed


def built(config: RunConfig) -> tuple[Any, Any, EngineState]:
    """Return run, engine and its state on this rank; fp16 is enabled on a CPU, for tests alone."""
    from deepspeed.accelerator import get_accelerator

    from pmlm_dist.training import resolve as run_module
    from pmlm_dist.training.pretraining import build_engine

    accelerator: Any = get_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        load = run_module.load_engine_config
        patch.setattr(run_module, "load_engine_config", lambda path, **_: load(path, has_accelerator=True))
        patch.setattr(accelerator, "is_fp16_supported", lambda: True)
        run = start_run(config)
        engine: Any = build_engine(run)
    return run, engine, EngineState(engine, run.topology)


def checkpointer_of(run: Any, state: EngineState) -> AsyncCheckpointer:
    log = RunLog(run.config.run_dir, enabled=False, first_step=0)
    metadata = {"identity": run.identity(), "configuration": run.configuration()}
    return AsyncCheckpointer(state, CheckpointFolder(run.checkpoints, keep=9), log, metadata=metadata, timeout_s=60)


def save(run: Any, engine_state: EngineState, state: RunState) -> Path:
    checkpointer = checkpointer_of(run, engine_state)
    checkpointer.save(state)
    checkpointer.close()
    return CheckpointFolder(run.checkpoints, keep=9).folder(state.step)


def tensors_of(engine_state: EngineState) -> dict[str, np.ndarray]:
    return {
        f"{kind}/{owned.fragment.name}/{owned.fragment.start}": tensor.numpy().copy()
        for owned in engine_state.owned_fragments()
        for kind, tensor in owned.tensors.items()
    }


def train_and_resume(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps, a save, two more; then resume in a new engine for two more. Return the result of both."""
    run, engine, engine_state = built(config)
    state, _, _ = take_steps(run, engine, RunState(), steps=2)
    path = save(run, engine_state, state)
    results = [result_of(run, engine, engine_state, state)]
    run, engine, engine_state = built(config)
    state = load_checkpoint(engine_state, path)
    results.append(result_of(run, engine, engine_state, state))
    return results[0], results[1]


def result_of(run: Any, engine: Any, engine_state: EngineState, state: RunState) -> dict[str, Any]:
    state, losses, norms = take_steps(run, engine, state, steps=2)
    result = {"state": asdict(state), "losses": losses, "norms": norms, "counters": engine_state.counters()}
    return {**result, "micro_steps": engine.micro_steps, "tensors": tensors_of(engine_state)}


def check_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    tensors, others = first.pop("tensors"), second.pop("tensors")
    assert first == second
    assert tensors.keys() == others.keys()
    assert all(np.array_equal(value, others[name]) for name, value in tensors.items())


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.fault("F40")
def test_fp16_resume_restores_loss_scale_and_skipped_steps(small_corpus: Path, tmp_path: Path, zero: int):
    """The initial scale of 2^32 overflows; each skipped step halves it, and it doubles again after a window."""
    fp16 = {"enabled": True, "initial_scale_power": 32, "loss_scale_window": 2, "hysteresis": 1}
    config = run_config(small_corpus, tmp_path, steps=4, zero=zero, fp16=fp16)
    for first, second in run_world(train_and_resume, 2, config):
        check_equal(first, second)
        scale = first["counters"]["loss_scale"]
        assert scale["cur_scale"] < 2**32
        assert scale["cur_iter"] == 4
        assert first["counters"]["skipped_steps"] > 0
        assert first["counters"]["adam_step"] + first["counters"]["skipped_steps"] == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"zero": 2, "round_robin": True},
        {"zero": 2, "tp": 2, "micro_batch": 2},
        {"zero": 3, "sub_group": 2000},
        {"zero": 1, "precision": "bf16", "data_types": {}},
    ],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_resume_with_other_zero_layouts_is_bit_exact(small_corpus: Path, tmp_path: Path, settings: dict[str, Any]):
    """Round-robin gradients, sub-groups of stage 3, bf16 without fp32 gradients (another optimizer class)."""
    settings = dict(settings)
    round_robin, sub_group = settings.pop("round_robin", False), settings.pop("sub_group", None)
    config = run_config(small_corpus, tmp_path, steps=4, **settings)
    raw = config.ds_config.read_text()
    if round_robin:
        raw = raw.replace('"stage": 2,', '"stage": 2, "round_robin_gradients": true,')
    if sub_group:
        raw = raw.replace('"stage": 3,', f'"stage": 3, "sub_group_size": {sub_group},')
    if settings.get("data_types") == {}:
        raw = raw.replace('"data_types": {"grad_accum_dtype": "fp32"}', '"data_types": {}')
    config.ds_config.write_text(raw)
    ranks = 4 if settings.get("tp") else 2
    for first, second in run_world(train_and_resume, ranks, config):
        check_equal(first, second)


def fragments_match_parameters(config: RunConfig) -> bool:
    """Whether bf16 weights before the first step equal the rounded masters at the place of each fragment."""
    import deepspeed

    _, engine, engine_state = built(config)
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return all(
            torch.equal(
                owned.tensors["weight"].to(parameters[owned.fragment.name].dtype),
                parameters[owned.fragment.name].detach().view(-1)[owned.fragment.start : owned.fragment.stop],
            )
            for owned in engine_state.owned_fragments()
        )


@pytest.mark.parametrize("round_robin", [False, True])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fragments_match_the_gathered_parameters(small_corpus: Path, tmp_path: Path, zero: int, round_robin: bool):
    config = run_config(small_corpus, tmp_path, steps=4, zero=zero, precision="bf16", micro_batch=2)
    raw = config.ds_config.read_text().replace('"stage": 2,', '"stage": 2, "round_robin_gradients": true,')
    if round_robin:
        config.ds_config.write_text(raw)
    assert run_world(fragments_match_parameters, 4, config) == [True] * 4


def resumes_before_the_first_step(config: RunConfig) -> bool:
    """Whether a run saved and resumed before its first step takes the same steps as one without a resume."""
    run, engine, engine_state = built(config)
    path = save(run, engine_state, RunState())
    _, losses, norms = take_steps(run, engine, RunState(), steps=2)
    first = tensors_of(engine_state)
    run, engine, engine_state = built(config)
    assert load_checkpoint(engine_state, path) == RunState()
    _, *resumed = take_steps(run, engine, RunState(), steps=2)
    second = tensors_of(engine_state)
    return resumed == [losses, norms] and all(np.array_equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_checkpoint_before_the_first_step_resumes(small_corpus: Path, tmp_path: Path, zero: int):
    assert run_world(resumes_before_the_first_step, 2, run_config(small_corpus, tmp_path, steps=4, zero=zero)) == [
        True,
        True,
    ]


@pytest.mark.full  # compiles DeepSpeed's CPU Adam
@pytest.mark.parametrize(("zero", "precision"), [(2, "fp32"), (2, "bf16"), (3, "bf16")])
def test_offloaded_moments_are_saved_and_restored(small_corpus: Path, tmp_path: Path, zero: int, precision: str):
    """CPU Adam multiplies powers of its betas by steps, but computes them after a resume: the last bit may differ."""
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's CPU Adam is compiled with g++, which is not installed")
    config = run_config(small_corpus, tmp_path, steps=4, zero=zero, precision=precision, offload=True)
    # A bias of -5 in bf16 has steps of 0.03, which a last bit can decide.
    config = with_model(config, initial_head_bias="zeros")
    for first, second in run_world(train_and_resume, 2, config, timeout_s=400.0):
        assert first["counters"] == second["counters"]
        assert first["counters"]["adam_step"] == 4
        np.testing.assert_allclose(first["losses"], second["losses"], rtol=1e-5)
        for name, value in first["tensors"].items():
            np.testing.assert_allclose(value, second["tensors"][name], rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- other models


def load_problems(config: RunConfig, path: Path) -> list[str]:
    """Return why a checkpoint does not load into the engine of `config`, without a comparison of identities."""
    _, _, engine_state = built(config)
    try:
        load_checkpoint(engine_state, path)
    except ConfigError as error:
        return error.problems
    return []


def saved_after_a_step(config: RunConfig) -> Path:
    run, engine, engine_state = built(config)
    state, _, _ = take_steps(run, engine, RunState(), steps=1)
    return save(run, engine_state, state)


@pytest.fixture(scope="module")
def saved(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config = run_config(small_corpus, tmp_path_factory.mktemp("saved"), steps=4, micro_batch=8)
    config = with_model(config, initializer="normal", initial_head_bias="zeros")  # every layer changes the logits
    return config, run_world(saved_after_a_step, 1, config)[0]


def test_loading_into_another_model_raises_and_reports_each_tensor(saved: tuple[RunConfig, Path]):
    config, path = saved
    (wider,) = run_world(load_problems, 1, with_model(config, ffn_size=128), path)
    assert "layers.0.ffn_in.weight has shape [64, 32] in the checkpoint and [128, 32] in the model" in wider
    (deeper,) = run_world(load_problems, 1, with_model(config, num_layers=3), path)
    assert "the checkpoint has no layers.2.ffn_out.bias" in deeper
    (shallower,) = run_world(load_problems, 1, with_model(config, num_layers=1), path)
    assert "the checkpoint has layers.1.attention.query.bias, the model has not" in shallower


def test_loading_into_a_model_with_other_logits_raises(saved: tuple[RunConfig, Path]):
    """The same tensors with another activation: only the fingerprint detects it."""
    config, path = saved
    (problems,) = run_world(with_another_activation, 1, config, path)
    assert any("mean of the ae logits was" in problem and "tolerance 1e-05" in problem for problem in problems)
    assert "the model does not compute what it computed" in problems[-1]


def with_another_activation(config: RunConfig, path: Path) -> list[str]:
    from torch.nn import functional

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "gelu", functional.relu)
        return load_problems(config, path)


def fingerprints(config: RunConfig, path: Path, exchanged: tuple[str, str] | None) -> list[dict[str, Any]]:
    """Return the fingerprint of a checkpoint and of the engine loaded from it, with two tensors exchanged or not."""
    from pmlm_dist.checkpoint.resume import progress_metadata

    _, engine, engine_state = built(config)
    with CheckpointReader(path) as reader:
        engine_state.restore(reader, read_state(path)["counters"])
    if exchanged:
        first, second = (dict(engine.module.named_parameters())[name].data for name in exchanged)
        first[:], second[:] = second.clone(), first.clone()
    before, random = engine.training, torch.get_rng_state()
    current = progress_metadata(engine_state, RunState())["fingerprint"]
    assert engine.training == before
    assert torch.equal(torch.get_rng_state(), random)
    return [read_state(path)["fingerprint"], current]


def test_fingerprint_detects_exchanged_layers_within_the_tolerance_of_another_topology(saved: tuple[RunConfig, Path]):
    config, path = saved
    ((was, same),) = run_world(fingerprints, 1, config, path, None)
    assert was == same
    names = ("layers.0.attention.query.weight", "layers.1.attention.query.weight")
    ((_, other),) = run_world(fingerprints, 1, config, path, names)
    for topology in ({}, {"tp": 2}):
        moved = {**other, "computed_on": {**other["computed_on"], **topology}}
        assert fingerprint_differences(was, moved, precision="fp32")


def test_fingerprints_of_other_topologies_agree(saved: tuple[RunConfig, Path]):
    """Sums over tensor-parallel ranks round differently; each row of the vocabulary counts once, padding never."""
    config, path = saved
    for tp in (2, 4):
        there = replace(config, parallel=replace(config.parallel, tp=tp))
        for was, now in run_world(fingerprints, tp, there, path, None):
            assert was["computed_on"] != now["computed_on"]
            assert fingerprint_differences(was, now, precision="fp32") == []


def with_scores_in_fp32(config: RunConfig, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Fingerprints and problems of loading where the backend rounds as FlexAttention, which needs a GPU, does."""
    from pmlm_dist.model import attention

    def attend(q: torch.Tensor, kv: torch.Tensor, groups: Any, *, dropout: float) -> torch.Tensor:
        return attention.attention_reference(q.float(), kv.float(), groups, dropout=dropout).to(q.dtype)

    backend = replace(attention.ATTENTION_BACKENDS["reference"], attend=attend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention.ATTENTION_BACKENDS, "reference", backend)
        return fingerprints(config, path, None), load_problems(config, path)


def test_bf16_checkpoint_loads_with_another_attention_backend(small_corpus: Path, tmp_path: Path):
    config = run_config(small_corpus, tmp_path, precision="bf16", micro_batch=8)
    config = with_model(config, initializer="normal", initial_head_bias="zeros", attention="fused")
    (path,) = run_world(saved_after_a_step, 1, config)
    (((was, now), problems),) = run_world(with_scores_in_fp32, 1, with_model(config, attention="reference"), path)
    assert was["statistics"] != now["statistics"]
    assert problems == []


def test_fingerprint_tolerance_by_precision():
    statistics = {"mean": 0.0, "std": 1.0, "max": 3.0}
    was = {"statistics": {"ae": statistics, "par": statistics}, "computed_on": {"tp": 1}}
    for precision, tolerance in TOLERANCES.items():
        allowed = tolerance + 3.0 * ROUNDING[precision]
        for change, is_reported in ((0.9 * allowed, False), (1.1 * allowed, True), (float("nan"), True)):
            moved = {**statistics, "max": 3.0 + change}
            now = {"statistics": {"ae": statistics, "par": moved}, "computed_on": {"tp": 2}}
            problems = fingerprint_differences(was, now, precision=precision)
            assert bool(problems) == is_reported
            assert all("max of the par logits was 3" in line for line in problems)


def test_state_json_holds_progress_and_configuration(saved: tuple[RunConfig, Path]):
    config, path = saved
    state = read_state(path)
    assert state["step"] == state["counters"]["adam_step"] == 1
    assert state["configuration"]["topology"] == {"world_size": 1, "tp": 1, "dp": 1}
    assert state["configuration"]["train"]["steps"] == config.train.steps
