"""Weights that a run starts from instead of drawing them: `train.py --init DIR`.

    DIR (`pmlm import` wrote it, or another run did)  --same model? same vocabulary?-->  weights of step 0

Weights alone: moments, counters, schedule and place in the corpus begin anew. A run that has a checkpoint of its own
goes on from that and does not look here.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmlm_dist.checkpoint.files import CheckpointReader, CorruptCheckpoint, read_state
from pmlm_dist.checkpoint.folder import newest_valid_at
from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.vocab import Vocabulary

if TYPE_CHECKING:
    from pmlm_dist.checkpoint.engine_state import EngineState

COMPUTED = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size", "max_positions", "segment_types"),
    *("relative_bias", "relative_buckets", "relative_max_distance", "layer_norm_eps"),
)
"""The settings of the model that, with its weights, say what it computes; the others may be chosen anew."""
_OF_RELATIVE_BIAS = ("relative_buckets", "relative_max_distance")


def initial_weights_problems(path: Path, model: ModelConfig, vocabulary: Vocabulary) -> list[str]:
    """Why a run of `model` on a corpus with `vocabulary` cannot start from the weights at `path`; reads every byte."""
    try:
        folder = newest_valid_at(path)
        state = read_state(folder)
    except ConfigError as error:
        return [f"--init ({path}): {problem}" for problem in error.problems]
    except CorruptCheckpoint as error:
        return [f"--init ({path}): {error}"]
    found = _other_settings(folder, state["configuration"].get("model"), model)
    if state["identity"].get("vocabulary") != vocabulary.fingerprint:
        found.append(
            f"--init ({path}): its vocabulary is not the corpus': prepare the corpus with `--vocabulary` of these "
            "weights, or, when only the ids of the same tokens differ, import them with `--vocabulary` of the corpus"
        )
    return found


def _other_settings(folder: Path, saved: Any, model: ModelConfig) -> list[str]:
    names = {field.name for field in fields(ModelConfig)}
    if not isinstance(saved, dict) or not set(COMPUTED) <= saved.keys() <= names:
        return [f"--init ({folder}) does not say which model its weights are of: import it again with this release"]
    both_without = not (saved["relative_bias"] or model.relative_bias)
    compared = [name for name in COMPUTED if not (both_without and name in _OF_RELATIVE_BIAS)]
    return [
        f"model.{name} ({getattr(model, name)}) is {saved[name]} for the weights of --init ({folder}): "
        f"use {flag_of(name, saved[name])}"
        for name in compared
        if saved[name] != getattr(model, name) and name != "vocab_size"  # a matter of the vocabulary
    ]


def flag_of(name: str, value: Any) -> str:
    """How `train.py` is told the setting `name` of the model."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{'' if value else 'no-'}{dashed}"
    return f"--model.{dashed} {value}"


def load_initial_weights(engine: EngineState, path: Path) -> Path:
    """Fill the weights of `engine` from those at `path`, whatever topology wrote them; every rank must call.

    `initial_weights_problems` has found nothing. Returns the folder that was read.
    """
    folder = engine.topology.broadcast_object(newest_valid_at(path) if engine.topology.is_rank_zero else None)
    with CheckpointReader(folder) as reader:
        engine.load_weights(reader)
    return folder
