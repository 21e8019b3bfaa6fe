"""Presets of a run: the paper's base model, the large model, and a tiny one for the demo.

Shapes and training settings follow UniLMv2 (Bao et al., 2020). The training settings of `large` are ours, since the
paper reports none. Batch sizes are in `pmlm_dist/ds_configs/<preset>.json`. Standard library only.
"""

from collections.abc import Callable
from pathlib import Path

from pmlm_dist.config import DS_CONFIGS, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def base() -> RunConfig:
    """12 layers, hidden 768: the paper's model, 7,680 sequences a step for 500,000 steps."""
    return RunConfig(run_dir=Path("runs/base"), ds_config=DS_CONFIGS / "base.json")


def large() -> RunConfig:
    """24 layers, hidden 1024."""
    return RunConfig(
        run_dir=Path("runs/large"),
        ds_config=DS_CONFIGS / "large.json",
        model=ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096),
        optim=OptimConfig(peak_lr=4e-4, warmup_steps=30_000),
    )


def tiny() -> RunConfig:
    """4 layers, hidden 256: learns the demo corpus on two CPU cores in minutes.

    Many small steps on short sequences: docs/notebook.md shows what each choice gave.
    """
    return RunConfig(
        corpus=Path("data/demo"),
        run_dir=Path("runs/demo"),
        ds_config=DS_CONFIGS / "tiny.json",
        model=ModelConfig(
            hidden_size=256, num_layers=4, num_heads=4, ffn_size=1024, hidden_dropout=0.0, attention_dropout=0.0
        ),
        data=DataConfig(workers=1),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=100),
        train=TrainConfig(
            steps=4000,
            log_every=50,
            validate_every=400,
            validation_samples=512,
            checkpoint_every=400,
            keep_checkpoints=2,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"base": base, "large": large, "tiny": tiny}
