"""Attention backend `flex` against `reference`; blocks without visible pairs are skipped; CPU training is rejected.

FlexAttention has no backward pass on a CPU: torch raises an error there, although the backward pass of its uncompiled
implementation would run. The tests of gradients disable that check, so that masks, bias, activation checkpointing and
the gradient of the table are tested without a GPU. The kernels themselves are tested in tests/gpu.
"""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.attention.flex_attention
from support.batches import MODEL, PADDED, logits_of, model_of, random_batch
from support.small_runs import Trained, run_config, train, with_model
from support.worlds import run_world
from torch import Tensor

from pmlm_dist.config import ConfigError, MaskingConfig, ModelConfig, RunConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.masking.visibility import visibility_matrix
from pmlm_dist.model import flex_attention
from pmlm_dist.model.attention import ATTENTION_BACKENDS, AttentionPlan, Slots
from pmlm_dist.model.flex_attention import BlockGroup
from pmlm_dist.parallel import groups
from pmlm_dist.relations import problems
from pmlm_dist.training.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

BLOCK = 128
OBJECTIVES = [("ae", "par"), ("ae",), ("par",)]


def hidden_states(attention: str, batch: Batch, objectives: tuple[str, ...] | None, **changes: Any) -> Tensor:
    """Hidden states of the predicted slots in fp32; `objectives` None: of all slots."""
    model = model_of(dtype=torch.float32, attention=attention, **changes)
    inputs = batch.inputs if objectives else batch.inputs._replace(predicted_BM=None)
    with torch.no_grad():
        return model.encode(inputs, objectives=objectives or ("ae", "par"))


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("objectives", [*OBJECTIVES, None], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_states_equal_reference(seed, objectives, relative_bias):
    batch = random_batch(batch=4, seed=seed, masking=MaskingConfig(rate=0.3, stop=("exact", "paper")[seed]))
    assert not batch.valid_BT.all()  # there are padding and unused prediction slots
    actual, expected = (
        hidden_states(name, batch, objectives, relative_bias=relative_bias) for name in ("flex", "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_logits_over_several_blocks_equal_reference():
    batch = random_batch(length=200)
    with torch.no_grad():
        actual, expected = (
            logits_of(model_of(dtype=torch.float32, attention=name, max_positions=200), batch)[..., : MODEL.vocab_size]
            for name in ("flex", "reference")
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_distances_beyond_number_of_slots_are_supported():
    batch = random_batch()
    far = dataclasses.replace(batch, positions_BT=batch.positions_BT * 40)  # 24 slots, distances up to 920
    changes = {"max_positions": 1000, "relative_max_distance": 300}
    actual, expected = (hidden_states(name, far, ("ae", "par"), **changes) for name in ("flex", "reference"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - hidden_states("flex", batch, ("ae", "par"), **changes)).abs().max() > 1e-2


def plan_of(batch: Batch, objectives: tuple[str, ...] = ("ae", "par")) -> AttentionPlan:
    slots = Slots(batch.inputs, num_context=batch.num_context, objectives=objectives)
    return ATTENTION_BACKENDS["flex"].plan(slots, None, torch.float32)


def computed_blocks(plan_groups: Any) -> Tensor:
    """True for each block [B, Q / 128, T / 128] that is computed."""
    (group,) = plan_groups
    assert isinstance(group, BlockGroup)
    return group.block_mask.to_dense()[:, 0].bool()


def blocks_with_a_visible_pair(visible_BQT: Tensor) -> Tensor:
    batch, queries, slots = visible_BQT.shape
    padded = visible_BQT.new_zeros(batch, -(-queries // BLOCK) * BLOCK, -(-slots // BLOCK) * BLOCK)
    padded[:, :queries, :slots] = visible_BQT
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).any(dim=4).any(dim=2)


@pytest.mark.parametrize("objectives", OBJECTIVES, ids=str)
def test_only_blocks_with_a_visible_pair_are_computed(objectives):
    batch = random_batch(length=512, batch=4, masking=MaskingConfig(rate=0.4))
    plan = plan_of(batch, objectives)
    visible_BTT = visibility_matrix(batch.order_BT, batch.valid_BT)
    assert torch.equal(computed_blocks(plan.inner), blocks_with_a_visible_pair(visible_BTT))
    pseudo = slice(batch.num_context + batch.num_predictions, None)
    rows = {"ae": visible_BTT[torch.arange(4)[:, None], batch.predicted_BM], "par": visible_BTT[:, pseudo]}
    predicted_BRT = torch.cat([rows[name] for name in objectives], dim=1)
    assert torch.equal(computed_blocks(plan.last), blocks_with_a_visible_pair(predicted_BRT))


def test_context_blocks_skip_appended_slots():
    """Two blocks of context and two of appended slots: context blocks are full, mixed ones are skipped."""
    batch = random_batch(length=256, batch=1, masking=MaskingConfig(rate=0.3))
    assert batch.tokens_BT.shape[1] == 256 + 2 * 77
    plan = plan_of(batch)
    assert computed_blocks(plan.inner)[0, :2].tolist() == [[True, True, False, False]] * 2
    (group,) = plan.inner
    assert isinstance(group, BlockGroup)
    full = group.block_mask.full_kv_num_blocks
    assert full is not None
    assert full[0, 0, :2].tolist() == [2, 2]
    assert group.block_mask.kv_num_blocks[0, 0, :2].tolist() == [0, 0]  # the rule is evaluated for no pair of these


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable torch's check that rejects gradients on a CPU."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)


def outputs_and_gradients(batch: Batch, **changes: Any) -> dict[str, Tensor]:
    model = model_of(**changes)
    logits = logits_of(model, batch)[..., : MODEL.vocab_size]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"logits": logits.detach(), **gradients}


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_reference(checkpointing, relative_bias):
    batch = random_batch()
    actual = outputs_and_gradients(
        batch, attention="flex", relative_bias=relative_bias, activation_checkpointing=checkpointing
    )
    expected = outputs_and_gradients(batch, attention="reference", relative_bias=relative_bias)
    assert ("relative_bias.weight" in actual) is relative_bias
    assert all(gradient.abs().max() > 1e-3 for name, gradient in expected.items() if "key_value.bias" not in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.usefixtures("backward_on_cpu")
def test_bias_stays_fp32_with_bf16_weights():
    """It sums the gradients of all pairs and layers; only the sum is rounded to the table's bf16."""
    model = model_of(dtype=torch.bfloat16, attention="flex", initializer_range=0.02)
    table = model.relative_bias
    assert table is not None
    assert table.by_distance(5).dtype == torch.float32
    logits_of(model, random_batch())[..., : MODEL.vocab_size].float().square().mean().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == torch.bfloat16
    assert table.weight.grad.abs().max() > 0


def logits_per_rank(tp: int) -> Tensor:
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import seeding

    groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
    model = build_model(dataclasses.replace(MODEL, attention="flex"), padded_vocab_size=PADDED)
    with torch.no_grad():
        return logits_of(model, random_batch())


@pytest.mark.distributed
def test_tensor_parallel_logits_equal_single_rank():
    (expected,) = run_world(logits_per_rank, 1, 1)
    torch.testing.assert_close(torch.cat(run_world(logits_per_rank, 2, 2), dim=-1), expected, rtol=0, atol=1e-5)


def train_with_flex(config: RunConfig) -> Trained:
    """`train` with flex on a CPU; it disables checks for the whole process, so it must run in a world of its own."""
    from pmlm_dist.training import resolve

    torch.nn.attention.flex_attention._validate_device = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    resolve._device_problems = lambda *_: []
    return train(with_model(config, attention="flex"))


@pytest.mark.distributed
def test_training_with_engine_equals_fused(small_corpus, tmp_path):
    """ZeRO-3, tensor parallelism and activation checkpointing together, as each can lose a gradient."""
    config = with_model(run_config(small_corpus, tmp_path, tp=2, steps=3, zero=3), activation_checkpointing=True)
    actual, expected = (run_world(function, 2, config)[0] for function in (train_with_flex, train))
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=1e-4, atol=0)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], weight, rtol=0, atol=1e-4, msg=name)


def test_batches_of_same_shape_are_not_recompiled(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where every step has another mask; only the compiler of the kernels is replaced."""
    from torch._dynamo.testing import CompileCounterWithBackend

    compiler = CompileCounterWithBackend("eager")
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compile_function(f, backend=compiler, **settings))
    compiled = flex_attention._compiled.__wrapped__()
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(flex_attention, "_operations", lambda _: compiled)
    torch.compiler.reset()
    counts = []
    for seed in range(3):
        batch = random_batch(seed=seed)
        actual, expected = (hidden_states(name, batch, ("ae", "par")) for name in ("flex", "reference"))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        counts.append(compiler.frame_count)
    assert 0 < counts[0] == counts[1] == counts[2]


def flex_config(**changes: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(attention="flex", **changes))


def test_attention_dropout_with_flex_is_reported():
    (problem,) = problems(flex_config())
    assert "model.attention_dropout (0.1) must be 0 with model.attention flex" in problem
    assert "--model.attention fused" in problem
    assert problems(flex_config(attention_dropout=0.0)) == []


def test_training_with_flex_on_cpu_raises(small_corpus, tmp_path):
    config = with_model(run_config(small_corpus, tmp_path), attention="flex")
    topology = groups.init_process_groups()
    with pytest.raises(ConfigError, match=r"flex cannot train on a CPU.*: use --model.attention fused"):
        resolve(config, topology)
    on_gpu = dataclasses.replace(topology, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"num_heads \(8\) must be at least 16 with model.attention flex on a GPU"):
        resolve(config, on_gpu)
    resolve(with_model(config, num_heads=2), on_gpu)


def test_setting_has_every_attention_backend():
    assert set(get_args(get_type_hints(ModelConfig)["attention"])) == set(ATTENTION_BACKENDS)
