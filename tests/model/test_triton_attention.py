"""Attention backend `triton` against `reference`, in Triton's interpreter: forward, gradients, dropout, block lists.

The kernels are also compiled for two GPUs, without having one: what they need of registers, memory and atomics.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from support.batches import MODEL, PADDED, logits_of, model_of, random_batch
from support.small_runs import run_config, with_model
from support.worlds import run_world
from torch import Tensor

from pmlm_dist.config import ConfigError, MaskingConfig, ModelConfig, RunConfig
from pmlm_dist.data.batch import Batch
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.visibility import visibility_matrix, visible
from pmlm_dist.model import triton_attention, triton_kernels
from pmlm_dist.model.relative_position import RelativeBias, look_up, relative_bucket
from pmlm_dist.model.triton_attention import BlockList, attention_triton, block_group
from pmlm_dist.parallel import groups
from pmlm_dist.relations import problems
from pmlm_dist.training.resolve import resolve

SHAPE = dataclasses.replace(MODEL, num_heads=2, num_layers=2)
"""Heads of 16, the smallest product of matrices in Triton."""
BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 x 16: a small batch has full, mixed and empty ones, and partial ones at its ends."""
    monkeypatch.setattr(triton_attention, "Q_BLOCK", BLOCK)
    monkeypatch.setattr(triton_attention, "K_BLOCK", BLOCK)


def outcome(batch: Batch, objectives: tuple[str, ...] | None = ("ae", "par"), **changes: Any) -> dict[str, Tensor]:
    """Hidden states of the predicted slots (`objectives` None: of all slots), and gradients."""
    model = model_of(SHAPE, dtype=torch.float32, **changes)
    inputs = batch.inputs if objectives else batch.inputs._replace(predicted_BM=None)
    states = model.encode(inputs, objectives=objectives or ("ae", "par"))
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"states": states.detach(), **gradients}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()), msg=name)


@pytest.mark.parametrize("relative_bias", [True, False])
@pytest.mark.parametrize("objectives", [("ae", "par"), ("ae",), ("par",), None], ids=str)
def test_states_and_gradients_equal_reference(objectives, relative_bias):
    batch = random_batch(batch=2, masking=MaskingConfig(rate=0.3))
    assert not batch.valid_BT.all()  # there are padding and unused prediction slots
    actual, expected = (
        outcome(batch, objectives, attention=name, relative_bias=relative_bias) for name in ("triton", "reference")
    )
    assert ("relative_bias.weight" in actual) is relative_bias
    check_equal(actual, expected)


def test_activation_checkpointing_changes_nothing():
    batch = random_batch(batch=2)
    check_equal(
        outcome(batch, attention="triton", activation_checkpointing=True), outcome(batch, attention="reference")
    )


def test_fp16_error_is_comparable_to_reference():
    """Triton's interpreter cannot multiply bf16; tests/gpu has that comparison."""
    case = random_case(0, batch=2, queries=40, slots=40, steps=2)
    exact = case.longhand()
    low = dataclasses.replace(case, q_QBHD=case.q_QBHD.half(), kv_TBH2D=case.kv_TBH2D.half())
    mixed = attention_triton(low.q_QBHD, low.kv_TBH2D, (group_of(low),), dropout=0.0)
    assert mixed.dtype == torch.float16
    assert 0 < float((mixed.double() - exact).abs().max()) < 0.01


def test_distances_beyond_the_table_share_its_end():
    batch = random_batch(batch=2)
    far = dataclasses.replace(batch, positions_BT=batch.positions_BT * 20)
    changes: dict[str, Any] = {"max_positions": 500, "relative_max_distance": 40}
    actual, expected = (outcome(far, attention=name, **changes) for name in ("triton", "reference"))
    check_equal(actual, expected)
    assert (actual["states"] - outcome(batch, attention="triton", **changes)["states"]).abs().max() > 1e-2


@dataclasses.dataclass
class Case:
    """Random queries and keys, and slots of any order and position."""

    q_QBHD: Tensor
    kv_TBH2D: Tensor
    inputs: SlotInputs[Tensor]
    rows_BQ: Tensor
    bias: RelativeBias

    @property
    def mask_BQT(self) -> Tensor:
        order_BT = self.inputs.order_BT
        q_order_BQ = order_BT.gather(1, self.rows_BQ)
        return visible(q_order_BQ[:, :, None], order_BT[:, None, :]) & self.inputs.valid_BT[:, None, :]

    def longhand(self, kept_BHQT: Tensor | None = None) -> Tensor:
        """Attention by its definition in fp64; `kept_BHQT`: factors of dropout."""
        positions_BT = self.inputs.positions_BT
        q_BHQD = self.q_QBHD.double().permute(1, 2, 0, 3)
        k_BHTD, v_BHTD = self.kv_TBH2D.double().permute(3, 1, 2, 0, 4)
        bias_HN = self.bias.by_distance(self.bias.max_distance).double()
        bias_HBQT = look_up(bias_HN, positions_BT.gather(1, self.rows_BQ), positions_BT)
        scores = q_BHQD @ k_BHTD.transpose(2, 3) / q_BHQD.shape[-1] ** 0.5 + bias_HBQT.transpose(0, 1)
        weights = scores.masked_fill(~self.mask_BQT[:, None], float("-inf")).softmax(-1)
        return ((weights if kept_BHQT is None else weights * kept_BHQT) @ v_BHTD).permute(2, 0, 1, 3)

    def gradients(self, mixed: Tensor) -> list[Tensor]:
        tensors = (self.q_QBHD, self.kv_TBH2D, self.bias.weight)
        weights = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
        return [mixed.detach().float(), *torch.autograd.grad((mixed * weights).sum(), tensors)]


def random_case(seed: int, *, batch: int, queries: int, slots: int, steps: int) -> Case:
    groups.init_process_groups()
    torch.manual_seed(seed)
    order_BT = torch.randint(-steps, steps + 1, (batch, slots), dtype=torch.int32)
    valid_BT = torch.rand(batch, slots) < 0.8
    order_BT[:, 0], valid_BT[:, 0] = 0, True  # a key that all queries see
    inputs = SlotInputs(
        tokens_BT=torch.zeros(batch, slots, dtype=torch.long),
        positions_BT=torch.randint(60, (batch, slots)),
        segments_BT=torch.zeros(batch, slots, dtype=torch.long),
        order_BT=order_BT,
        valid_BT=valid_BT,
    )
    return Case(
        torch.randn(queries, batch, 2, 16, requires_grad=True),
        torch.randn(slots, batch, 2, 2, 16, requires_grad=True),
        inputs,
        torch.randint(slots, (batch, queries)),
        RelativeBias(2, buckets=16, max_distance=24, std=1.0),
    )


def group_of(case: Case) -> triton_attention.BlockGroup:
    return block_group(case.inputs, rows_BQ=case.rows_BQ, relative_bias=case.bias)


def test_one_tensor_equals_separate_ones():
    case = random_case(3, batch=2, queries=40, slots=40, steps=2)
    separate = attention_triton(case.q_QBHD, case.kv_TBH2D, (group_of(case),), dropout=0.0)
    joint = torch.cat([case.q_QBHD, case.kv_TBH2D.flatten(2, 3)], dim=2)
    close(case.gradients(attention_triton(joint, None, (group_of(case),), dropout=0.0)), case.gradients(separate))


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 2),
    queries=st.integers(1, 40),
    slots=st.integers(1, 40),
    steps=st.integers(0, 4),
)
def test_any_slots_equal_longhand(seed, batch, queries, slots, steps):
    case = random_case(seed, batch=batch, queries=queries, slots=slots, steps=steps)
    mixed = attention_triton(case.q_QBHD, case.kv_TBH2D, (group_of(case),), dropout=0.0)
    close(case.gradients(mixed), case.gradients(case.longhand()))


@triton.jit
def _factors(out_ptr, seed, num_keys, dropout, BLOCK: tl.constexpr):
    """Factors of dropout of the pairs of a sample's head."""
    rows = tl.arange(0, BLOCK)
    seed += tl.program_id(0)
    kept = triton_kernels._kept(tl.full([BLOCK, BLOCK], 1.0, tl.float32), seed, 0, 0, num_keys, dropout, BLOCK, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK * BLOCK + rows[:, None] * BLOCK + rows[None, :], kept)


def test_dropout_equals_longhand_with_the_same_numbers():
    case, dropout = random_case(0, batch=2, queries=30, slots=29, steps=2), 0.3
    torch.manual_seed(5)
    mixed = attention_triton(case.q_QBHD, case.kv_TBH2D, (group_of(case),), dropout=dropout)
    torch.manual_seed(5)
    seed, factors = int(torch.randint(2**30, ())), torch.empty(4, 32, 32)
    _factors[(4,)](factors, seed, 29, dropout, BLOCK=32)  # pyright: ignore[reportArgumentType]
    kept_BHQT = factors[:, :30, :29].view(2, 2, 30, 29)
    assert 0.2 < float((kept_BHQT == 0).float().mean()) < 0.4
    assert not torch.equal(kept_BHQT[0, 0], kept_BHQT[0, 1])
    close(case.gradients(mixed), case.gradients(case.longhand(kept_BHQT.double())))


@pytest.mark.parametrize("of_keys", [False, True])
def test_block_lists_hold_the_blocks_with_visible_pairs(of_keys):
    batch = random_batch(batch=3, length=40, masking=MaskingConfig(rate=0.4))
    group = block_group(batch.inputs, rows_BQ=None, relative_bias=None)
    seen = visibility_matrix(batch.order_BT, batch.valid_BT)
    pad = -seen.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(seen, (0, pad, 0, pad)).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    counts = blocks.sum(dim=(2, 4)).transpose(1, 2) if of_keys else blocks.sum(dim=(2, 4))
    listed: BlockList = group.of_keys if of_keys else group.of_queries
    kinds = set()
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(counts.shape[1])).tolist():
        full, partial = listed.counts[tuple(index)].tolist()
        row, size = listed.lists[tuple(index)].tolist(), counts.shape[2]
        expected = counts[tuple(index)]
        assert row[:full] == (expected == BLOCK**2).nonzero().flatten().tolist()
        assert row[size - partial :][::-1] == ((expected > 0) & (expected < BLOCK**2)).nonzero().flatten().tolist()
        kinds |= {"full"} if full else set()
        kinds |= {"partial"} if partial else set()
        kinds |= {"empty"} if full + partial < size else set()
    assert kinds == {"full", "partial", "empty"}


@triton.jit
def _rule(q_ptr, k_ptr, out_ptr, SIZE: tl.constexpr):
    pairs = tl.arange(0, SIZE)
    seen = triton_kernels._visible(tl.load(q_ptr + pairs), tl.load(k_ptr + pairs))
    tl.store(out_ptr + pairs, seen.to(tl.int32))


def test_rule_of_the_kernels_is_the_visibility_rule():
    orders = torch.tensor([triton_kernels.INVISIBLE, *range(-7, 8)], dtype=torch.int32)
    q_order, k_order = (t.contiguous() for t in torch.cartesian_prod(orders[1:], orders).t())
    q_order, k_order = (torch.nn.functional.pad(t, (0, 16)) for t in (q_order, k_order))
    seen = torch.empty_like(q_order)
    _rule[(1,)](q_order, k_order, seen, SIZE=256)  # pyright: ignore[reportArgumentType]
    assert torch.equal(seen.bool(), visible(q_order, k_order))


def test_runs_are_the_intervals_of_distances_with_one_bucket():
    runs = triton_attention.distance_runs(32, 128, torch.device("cpu"))
    distances = torch.arange(-128, 129)
    buckets = runs.one_hot_RU.argmax(dim=1)[runs.run_N.long()]
    assert torch.equal(buckets, relative_bucket(distances))
    assert torch.equal(
        distances[[int((runs.run_N == r).nonzero()[0]) for r in range(len(runs.start_R))]].int(), runs.start_R
    )


def logits_per_rank(tp: int) -> Tensor:
    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import seeding

    groups.init_process_groups(tp=tp)
    seeding.seed_initialization(0)
    model = build_model(dataclasses.replace(SHAPE, attention="triton"), padded_vocab_size=PADDED)
    with torch.no_grad():
        return logits_of(model, random_batch(batch=1))


@pytest.mark.distributed
def test_tensor_parallel_logits_equal_single_rank():
    (expected,) = run_world(logits_per_rank, 1, 1)
    torch.testing.assert_close(torch.cat(run_world(logits_per_rank, 2, 2), dim=-1), expected, rtol=0, atol=1e-5)


def test_device_or_head_size_that_does_not_fit_is_reported(small_corpus: Path, tmp_path: Path):
    config = with_model(run_config(small_corpus, tmp_path), attention="triton", num_heads=2)
    with pytest.raises(ConfigError, match=r"attention triton needs a GPU.*: use --model.attention auto"):
        resolve(config, groups.init_process_groups())
    (problem,) = problems(RunConfig(model=ModelConfig(attention="triton", num_heads=8)))  # 768 / 8 = 96
    assert "(96) must be one of (16, 32, 64, 128) with model.attention triton" in problem


@pytest.mark.parametrize(
    ("heads", "accelerator", "expected"), [(12, True, "triton"), (8, True, "fused"), (12, False, "fused")]
)
def test_auto_takes_the_fastest_backend_that_works(heads, accelerator, expected):
    assert ModelConfig(num_heads=heads).attention_on(accelerator=accelerator) == expected
    assert ModelConfig(attention="reference").attention_on(accelerator=accelerator) == "reference"


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels_spill_little_and_have_no_atomics(capability):
    """Compiled for bf16, heads of 64, with bias: what the presets run on an A100 or an H100."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent.parent / "support" / "kernel_resources.py"
    result = subprocess.run(
        [sys.executable, str(script), str(capability)], check=False, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    resources = json.loads(result.stdout)
    is_old = triton.__version__.startswith("3.6.")  # its compiler spills 24 bytes more
    most = {80: 64 if is_old else 40, 90: 16}[capability]
    assert resources.keys() == {"attend", "query_gradients", "key_gradients"}
    for name, of_kernel in resources.items():
        assert of_kernel["spilled_bytes"] <= most, (name, of_kernel)
        assert of_kernel["atomics"] == 0, (name, of_kernel)
        assert of_kernel["shared_bytes"] <= 100 * 1024, (name, of_kernel)  # two blocks of threads fit a multiprocessor
