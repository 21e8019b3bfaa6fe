"""Small runs of the real training path and their plans, to compare the two."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pmlm_dist.config import DataConfig, MaskingConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from pmlm_dist.engine.deepspeed_config import load_engine_config
from pmlm_dist.masking.blockwise import max_predictions
from pmlm_dist.planning.model_states import Zero
from pmlm_dist.planning.workload import Workload
from support.corpora import write_corpus

WORDS, VOCABULARY = 995, 1000
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
BF16_SUMMED_IN_FP32: dict[str, Any] = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed's section of a ZeRO stage, with buckets small enough to be filled."""
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 500_000, **settings}}


def zero_settings(stage: int, **changes: Any) -> Zero:
    """ZeRO in bf16 with buckets of one element, which the formulas can neglect."""
    common = {"accumulated": 2, "communicated": 2, "offload": False, "overlap": False}
    numbers = {"reduce_bucket": 1, "prefetch_bucket": 1, "max_live": 0, "persistence_threshold": 0}
    return Zero(**{"stage": stage, "precision": "bf16", **common, **numbers, **changes})


def selected_cases(request: pytest.FixtureRequest, cases: dict[str, Case]) -> dict[str, Case]:
    """Return those of `cases` that tests of this session's module ask for as `name`."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {item.callspec.params.get("name") for item in items}  # pyright: ignore[reportAttributeAccessIssue]
    return {name: case for name, case in cases.items() if name in names}


@dataclass(frozen=True)
class Case:
    """A small run, as changes to a model of 4 layers and 1 M parameters on 64 tokens."""

    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=lambda: zero(0))
    dp: int = 1
    tp: int = 1
    micro_batch: int = 4
    accumulation: int = 1
    sequence_length: int = 64
    tolerance: float = 0.05

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def shape(self) -> ModelConfig:
        settings = {
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "ffn_size": 512,
            "max_positions": self.sequence_length,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "vocab_size": VOCABULARY,
        }
        return ModelConfig(**{**settings, **self.model})

    def write(self, folder: Path) -> RunConfig:
        """Write corpus and DeepSpeed's JSON to `folder`; return the settings of the run."""
        raw = {
            "train_batch_size": self.micro_batch * self.accumulation * self.dp,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            **self.engine,
        }
        (folder / "engine.json").write_text(json.dumps(raw))
        return RunConfig(
            corpus=write_corpus(
                folder / "corpus", shards=4, samples=16, words=WORDS, sequence_length=self.sequence_length
            ),
            run_dir=folder / "run",
            ds_config=folder / "engine.json",
            model=self.shape,
            data=DataConfig(workers=0),
            optim=OptimConfig(warmup_steps=1),
            parallel=ParallelConfig(tp=self.tp),
            train=TrainConfig(steps=100, collective_timeout_s=60),
        )

    def planned(self, folder: Path) -> tuple[Workload, Zero]:
        """Micro-batch and engine for the plan; call `write` before."""
        engine = load_engine_config(folder / "engine.json", has_accelerator=False)
        work = Workload(
            model=self.shape,
            context=self.sequence_length,
            predictions=max_predictions(self.sequence_length, MaskingConfig()),
            micro_batch=self.micro_batch,
            tp=self.tp,
            precision=engine.precision,
            on_accelerator=False,
        )
        return work, Zero.from_engine(engine)
