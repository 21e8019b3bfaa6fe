"""Training on a GPU: the base preset in bf16, offload of the optimizer, tensor parallelism over NCCL.

Runs of the small model are compared with the same run on the CPU.
"""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.corpora import write_corpus
from support.small_runs import Trained, run_config, train, with_model, with_train, write_engine_config
from support.worlds import run_world

from pmlm_dist.config import DataConfig, OptimConfig, RunConfig
from pmlm_dist.presets import base

pytestmark = pytest.mark.gpu

STEPS = 30
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def train_on_cpu(config: RunConfig) -> Trained:
    """`train` in a world without a GPU."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    return train(config)


def pretrain_and_read(config: RunConfig) -> dict[int, dict[str, float]]:
    """Pretrain and return the logged scalars by step."""
    from pmlm_dist.metrics.run_log import read_metrics
    from pmlm_dist.parallel import groups
    from pmlm_dist.training.run import pretrain

    pretrain(config)
    assert groups.init_process_groups().device.type == "cuda"
    return read_metrics(config.run_dir)


@pytest.fixture(scope="module")
def long_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training samples of 512 tokens, one global batch: every step is an epoch of its own, with other masks."""
    return write_corpus(tmp_path_factory.mktemp("long"), shards=8, samples=8, sequence_length=512)


def base_run(corpus: Path, run_dir: Path, *, steps: int, **model: Any) -> RunConfig:
    """The base preset with the engine of ds_configs/base.json, a smaller batch and few steps."""
    engine = write_engine_config(
        run_dir / "ds.json",
        precision="bf16",
        global_batch=64,
        micro_batch=16,
        zero_optimization={
            "stage": 1,
            "overlap_comm": True,
            "reduce_bucket_size": 14_000_000,
            "allgather_bucket_size": 200_000_000,
        },
    )
    config = replace(
        base(),
        corpus=corpus,
        run_dir=run_dir,
        ds_config=engine,
        data=DataConfig(workers=1),
        optim=OptimConfig(peak_lr=3e-4, warmup_steps=3),
    )
    config = with_train(config, steps=steps, log_every=1, validation_samples=8, peak_tflops=1000.0)
    return with_model(config, **model)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation_checkpointing": True},
        {"attention_dropout": 0.1},
        {"attention": "fused", "attention_dropout": 0.1, "activation_checkpointing": True},
    ],
    ids=lambda model: "-".join(map(str, model.values())) or "triton",
)
def test_base_preset_in_bf16_reduces_loss(long_samples, tmp_path, model):
    """The first steps learn the frequencies of tokens: on a CPU the loss of two layers falls from 9.94 to 9.50."""
    config = base_run(long_samples, tmp_path, steps=STEPS, **model)
    (scalars,) = run_world(pretrain_and_read, 1, config, timeout_s=900)
    shutil.rmtree(config.run_dir / "checkpoints")  # 1.5 GB
    losses = [scalars[step]["train/total"] for step in range(1, STEPS + 1)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2
    assert math.isfinite(scalars[STEPS]["validation/total"])
    assert all(0.0 < scalars[step]["speed/mfu"] < 1.0 for step in range(1, STEPS + 1))
    assert 0.0 < scalars[STEPS]["memory/peak_gib"] < 80.0


def test_resumed_run_has_losses_of_uninterrupted_run(small_corpus, tmp_path):
    """Not bit-exact: the order of sums on a GPU may change."""
    uninterrupted = with_train(run_config(small_corpus, tmp_path / "uninterrupted", steps=6), validate_every=3)
    interrupted = replace(uninterrupted, run_dir=tmp_path / "interrupted")
    (expected,) = run_world(pretrain_and_read, 1, uninterrupted, timeout_s=300)
    run_world(pretrain_and_read, 1, with_train(interrupted, stop_at=3), timeout_s=300)
    (actual,) = run_world(pretrain_and_read, 1, interrupted, timeout_s=300)
    for step in range(1, 7):
        assert actual[step]["train/total"] == pytest.approx(expected[step]["train/total"], rel=1e-5)


def check_near(actual: Trained, expected: Trained) -> None:
    """Compare five steps in fp32 that differ in the order of sums only."""
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def cpu_run(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The small run in one process without a GPU, without ZeRO."""
    config = run_config(small_corpus, tmp_path_factory.mktemp("cpu"), zero=0, micro_batch=8)
    return run_world(train_on_cpu, 1, config, timeout_s=300)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gpu_training_equals_cpu(small_corpus, tmp_path, cpu_run, zero):
    config = run_config(small_corpus, tmp_path, zero=zero)
    check_near(run_world(train, 1, config, timeout_s=300)[0], cpu_run)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_optimizer_equals_cpu(small_corpus, tmp_path, cpu_run, zero):
    """DeepSpeed compiles DeepSpeedCPUAdam at its first use, which takes minutes."""
    from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]

    if not CPUAdamBuilder().is_compatible():
        pytest.skip("DeepSpeed cannot compile its CPU Adam here")
    zero_optimization: dict[str, Any] = {"stage": zero, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    if zero == 3:
        zero_optimization["stage3_param_persistence_threshold"] = 100
    config = run_config(small_corpus, tmp_path, zero_optimization=zero_optimization)
    check_near(run_world(train, 1, config, timeout_s=900)[0], cpu_run)


@needs_two_gpus
@pytest.mark.parametrize(("tp", "zero"), [(2, 0), (2, 1), (1, 1), (1, 3)])
def test_two_gpus_equal_cpu(small_corpus, tmp_path, cpu_run, tp, zero):
    config = run_config(small_corpus, tmp_path, tp=tp, zero=zero)
    results = run_world(train, 2, config, timeout_s=300)
    assert results[0].losses == results[1].losses
    check_near(results[0], cpu_run)


@needs_two_gpus
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_averaged_during_the_backward_pass_equal_those_averaged_after_it(small_corpus, tmp_path, precision):
    """NCCL averages bf16 sums on a stream of its own, as a copy in bf16 or in place in fp32."""
    runs = []
    for overlap in (True, False):
        zero = {"stage": 1, "overlap_comm": overlap, "reduce_bucket_size": 2000, "allgather_bucket_size": 50_000}
        settings: dict[str, Any] = {"communication_data_type": precision, "zero_optimization": zero}
        config = run_config(small_corpus, tmp_path / str(overlap), precision="bf16", micro_batch=2, **settings)
        runs.append(run_world(train, 2, config, timeout_s=300)[0])
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(runs[0].norms, runs[1].norms, rtol=1e-2, atol=0)


@needs_two_gpus
def test_triton_with_tensor_parallelism_equals_fused(small_corpus, tmp_path):
    """bf16, head size 16; the losses differ by rounding only."""
    runs = {}
    for attention in ("fused", "triton"):
        config = run_config(small_corpus, tmp_path / attention, tp=2, precision="bf16")
        config = with_model(config, hidden_size=64, attention=attention)
        runs[attention] = run_world(train, 2, config, timeout_s=600)[0]
    torch.testing.assert_close(runs["triton"].losses, runs["fused"].losses, rtol=1e-3, atol=0)
