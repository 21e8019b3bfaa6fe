"""A small model with random weights, small data sets, and fine-tuning settings for them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pmlm_dist.config import ParallelConfig
from pmlm_dist.conversion.pretrained import PretrainedWeights, save_pretrained
from pmlm_dist.downstream.settings import FinetuneConfig, InputConfig, Recipe
from pmlm_dist.planning.parameters import parameter_shapes
from pmlm_dist.vocabulary.vocabulary import Vocabulary
from support.small_runs import MODEL, write_engine_config

COLORS, KINDS = ("red", "green", "blue"), ("fish", "bird", "tree")
WORDS = (*COLORS, *KINDS, "swims", "flies", "stands", "the", "a", "?", ".", "who", "what")


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model with random weights in the format of `pmlm import`."""
    vocabulary = Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    model = replace(MODEL, vocab_size=vocabulary.size, max_positions=64)
    random = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.1 * torch.randn(shape, generator=random) + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, shape in parameter_shapes(model).items()
    }
    return save_pretrained(PretrainedWeights(model, weights, vocabulary), folder)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Texts of different lengths; the color is the class."""
    rows = []
    for number in range(first, first + count):
        color, kind = COLORS[number % 3], KINDS[(number // 3) % 3]
        text = " ".join(["the", color, kind, *["stands"] * (number % 5), "."])
        rows.append({"id": f"q{number}", "text": text, "label": color})
    return rows


def write_text_task(folder: Path, *, train: int = 21, validation: int = 9) -> Path:
    write_jsonl(folder / "train.jsonl", text_rows(train))
    write_jsonl(folder / "validation.jsonl", text_rows(validation, first=100))
    write_jsonl(folder / "test.jsonl", text_rows(5, first=200))
    return folder


def config(model: Path, data: Path | None, output: Path, **changes: Any) -> FinetuneConfig:
    """Settings of a run of a few steps; the 21 examples are no multiple of the batch of 8."""
    engine = {name: changes.pop(name) for name in ("zero", "micro_batch", "precision") if name in changes}
    settings: dict[str, Any] = {
        "task": "classification",
        "recipe": Recipe(lr=3e-3, batch=8, epochs=2, dropout=0.0),
        "inputs": InputConfig(max_tokens=16),
        "parallel": ParallelConfig(tp=changes.pop("tp", 1)),
        "log_every": 1,
        "collective_timeout_s": 60,
        "ds_config": write_engine_config(output.parent / f"{output.name}-ds.json", **{"micro_batch": 4, **engine}),
    }
    return FinetuneConfig(
        **{**settings, "model": model, "data": str(data) if data else None, "output": output, **changes}
    )
