"""Initial weights from a checkpoint instead of random ones: `train.py --init DIR`.

    DIR (written by `pmlm import` or another run)  --same architecture, same vocabulary-->  weights of step 0

Only weights are loaded: moments, counters, schedule and corpus position start at zero. A run with a checkpoint of its
own resumes from that and ignores `--init`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmlm_dist.checkpoint.files import CheckpointReader, read_state
from pmlm_dist.checkpoint.folder import newest_valid_at
from pmlm_dist.checkpoint.manifest import CorruptCheckpoint
from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pmlm_dist.checkpoint.engine_state import EngineState

ARCHITECTURE_SETTINGS = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_positions", "segment_types"),
    *("relative_bias", "relative_buckets", "relative_max_distance", "layer_norm_eps"),
)
"""Model settings that, with the weights, determine the logits; all others may differ."""
_RELATIVE_BIAS_SETTINGS = ("relative_buckets", "relative_max_distance")


def initial_weights_problems(path: Path, model: ModelConfig, vocabulary: Vocabulary) -> list[str]:
    """Return why a run of `model` with `vocabulary` cannot start from the weights at `path`; reads every byte."""
    try:
        folder = newest_valid_at(path)
        state = read_state(folder)
    except ConfigError as error:
        return [f"--init ({path}): {problem}" for problem in error.problems]
    except CorruptCheckpoint as error:
        return [f"--init ({path}): {error}"]
    problems = _architecture_problems(folder, state["configuration"].get("model"), model)
    if state["identity"].get("vocabulary") != vocabulary.fingerprint:
        problems.append(
            f"--init ({path}): its vocabulary is not the corpus' (tokens, their ids, casing, accents, added words): "
            "prepare the corpus with `--vocabulary` of these weights, or, when only the ids of the same tokens differ, "
            "import them with `--vocabulary` of the corpus"
        )
    return problems


def _architecture_problems(folder: Path, saved: Any, model: ModelConfig) -> list[str]:
    names = {field.name for field in fields(ModelConfig)}
    if not isinstance(saved, dict) or not set(ARCHITECTURE_SETTINGS) <= saved.keys() <= names:
        return [f"--init ({folder}) lacks the model settings of its weights: import it again with this release"]
    both_without = not (saved["relative_bias"] or model.relative_bias)
    compared = [name for name in ARCHITECTURE_SETTINGS if not (both_without and name in _RELATIVE_BIAS_SETTINGS)]
    return [
        f"model.{name} ({getattr(model, name)}) is {saved[name]} for the weights of --init ({folder}): "
        f"use {flag_of(name, saved[name])}"
        for name in compared
        if saved[name] != getattr(model, name) and name != "vocab_size"  # reported by the vocabulary check
    ]


def flag_of(name: str, value: Any) -> str:
    """Return the argument of `train.py` that sets the model's `name` to `value`."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{'' if value else 'no-'}{dashed}"
    return f"--model.{dashed} {value}"


def load_initial_weights(engine: EngineState, path: Path) -> Path:
    """Fill the weights of `engine` from those at `path`, whatever topology wrote them; every rank must call.

    Returns the checkpoint that was read. `initial_weights_problems` must have returned none.
    """
    folder = engine.topology.broadcast_object(newest_valid_at(path) if engine.topology.is_rank_zero else None)
    with CheckpointReader(folder) as reader:
        engine.load_weights(reader)
    return folder
