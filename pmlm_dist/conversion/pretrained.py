"""A pre-trained model outside of any run: settings, whole weights, vocabulary, and how it came about.

checkpoint of any topology  --open_pretrained-->  Pretrained  --save_pretrained-->  DIR/weights/step-00000000
                                                      |                             DIR/tokenizer.json, vocab.txt
                                                  build_pretrained: the module, on one device
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmlm_dist.checkpoint.files import (
    STATE,
    CorruptCheckpoint,
    rank_file,
    read_state,
    read_weights,
    write_json,
    write_numbers,
)
from pmlm_dist.checkpoint.folder import IMPORTED, CheckpointFolder, newest_valid_at
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.initial_weights import ARCHITECTURE_SETTINGS
from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.conversion.tensors import HEAD_BIAS, TOKENS, Tensors, own_shapes
from pmlm_dist.model.task_model import TASK_HEAD
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.parallel import groups
from pmlm_dist.vocab import Vocabulary

_BY_TOKEN = (TOKENS, HEAD_BIAS)
"""Tensors with a row for each token."""


@dataclass(frozen=True)
class PretrainedWeights:
    """A model with its vocabulary. `weights`: fp32, whole, under the model's own names, no rows that pad."""

    model: ModelConfig
    weights: Tensors
    vocabulary: Vocabulary
    facts: dict[str, Any] = field(default_factory=dict)
    """What `state.json` of its checkpoint says, or where it was imported from."""

    def with_vocabulary(self, vocabulary: Vocabulary, *, origin: str) -> PretrainedWeights:
        """The same model for a vocabulary of the same tokens under other ids. Raises `ConfigError` for other tokens."""
        own = {token: id for id, token in enumerate(self.vocabulary.tokens)}
        wanted = vocabulary.tokens
        lacking = [token for token in wanted if token not in own]
        extra = own.keys() - set(wanted)
        raise_if_any(
            [
                f"the vocabulary of {origin} ({len(wanted)} tokens) is not that of the weights ({len(own)}): "
                f"{len(lacking)} of its tokens have no weights{_examples(lacking)}, "
                f"{len(extra)} tokens with weights are not in it{_examples(sorted(extra))}"
            ]
            if lacking or extra
            else []
        )
        rows = torch.tensor([own[token] for token in wanted])
        weights = self.weights | {name: self.weights[name][rows] for name in _BY_TOKEN}
        return replace(self, weights=weights, vocabulary=vocabulary)


def _examples(tokens: list[str]) -> str:
    return f" (such as {', '.join(map(repr, tokens[:3]))})" if tokens else ""


# ------------------------------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint whose weights have not been read yet."""

    folder: Path
    model: ModelConfig
    vocabulary: Vocabulary
    state: dict[str, Any]
    """Its `state.json`."""


def find_pretrained(path: Path, *, vocabulary: Path | None = None) -> PretrainedModel:
    """The newest whole checkpoint at `path`: a run's folder, its checkpoints, one of them, or what `pmlm import` wrote.

    In the folder of a fine-tuning the best one so far counts instead, which is the only one when it has ended.
    `vocabulary`: where its vocabulary lies; None: in the folder that holds it, if it is of fine-tuning or was imported,
    else in the corpus of the run. Raises `ConfigError` when the checkpoint is damaged or the vocabulary is not the one
    it was trained with.
    """
    folder = newest_valid_at(path)
    state = _state_of(folder)
    best = state.get("progress", {}).get("best_step")
    if best and folder.name != path.name:
        folder = newest_valid_at(CheckpointFolder(folder.parent, keep=1).folder(best))
        state = _state_of(folder)
    model = _model_settings(state["configuration"].get("model"), folder)
    words = Vocabulary.load(vocabulary or _vocabulary_folder(folder, state))
    if words.fingerprint != state["identity"].get("vocabulary"):
        raise ConfigError(
            [f"the vocabulary in {vocabulary or _vocabulary_folder(folder, state)} is not that of {folder}: "
             "name the one it was trained with by --vocabulary"]
        )  # fmt: skip
    return PretrainedModel(folder, replace(model, vocab_size=words.size), words, state)


def _state_of(folder: Path) -> dict[str, Any]:
    try:
        return read_state(folder)
    except CorruptCheckpoint as error:
        raise ConfigError([f"{folder}: {error}"]) from error


def open_pretrained(path: Path, *, vocabulary: Path | None = None) -> PretrainedWeights:
    """The checkpoint that `find_pretrained` finds, its weights read; the head of a task is left behind."""
    found = find_pretrained(path, vocabulary=vocabulary)
    try:
        arrays = read_weights(found.folder)
    except CorruptCheckpoint as error:
        raise ConfigError([f"{found.folder}: {error}"]) from error
    weights = {name: torch.from_numpy(a) for name, a in arrays.items() if not name.startswith(TASK_HEAD)}
    pretrained = PretrainedWeights(
        found.model, weights, found.vocabulary, facts={**found.state, "folder": found.folder}
    )
    raise_if_any(_shape_problems(pretrained, found.folder))
    return pretrained


def _model_settings(saved: Any, folder: Path) -> ModelConfig:
    names = {item.name for item in fields(ModelConfig)}
    if not isinstance(saved, dict) or not set(ARCHITECTURE_SETTINGS) <= saved.keys() <= names:
        raise ConfigError([f"{folder}: {STATE} does not say which model it is of, as this release writes it"])
    return ModelConfig(**saved)


def _vocabulary_folder(folder: Path, state: dict[str, Any]) -> Path:
    above = folder.parent.parent
    if folder.parent.name == IMPORTED or (above / "tokenizer.json").is_file():
        return above
    corpus = state["configuration"].get("corpus")
    if corpus is None or not Path(corpus).exists():
        raise ConfigError([f"the corpus of {folder} ({corpus}) is not here: name its vocabulary by --vocabulary"])
    return Path(corpus)


def _shape_problems(pretrained: PretrainedWeights, folder: Path) -> list[str]:
    shapes, weights = own_shapes(pretrained.model), pretrained.weights
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    return [
        f"{folder}: {name} is {found.get(name, 'missing')}, its settings say {shapes.get(name, 'there is none')}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ]


# ------------------------------------------------------------------------------------------------------------- running


def build_pretrained(pretrained: PretrainedWeights) -> PseudoMaskedLM:
    """The module in evaluation mode, on the CPU."""
    groups.init_process_groups()
    config = replace(pretrained.model, attention="fused", activation_checkpointing=False)
    model = build_model(config, padded_vocab_size=pretrained.vocabulary.padded_size()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = pretrained.weights[name]
            parameter.zero_()[: len(weight)] = weight
    return model


@torch.no_grad()
def hidden_states(model: PseudoMaskedLM, ids_BT: Tensor, *, segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, E] of texts: every slot is context."""
    states_TBE = model.encode(
        ids_BT,
        positions_BT=torch.arange(ids_BT.shape[1]).expand_as(ids_BT),
        segments_BT=segments_BT,
        order_BT=torch.zeros_like(ids_BT),
        valid_BT=valid_BT,
    )
    return states_TBE.transpose(0, 1)


@torch.no_grad()
def logits(model: PseudoMaskedLM, states_BTE: Tensor) -> Tensor:
    """Logits [B, T, V] of last hidden states, without the rows that pad the vocabulary."""
    found = model.head(states_BTE, model.embeddings.token.weight)
    return found[..., : model.config.vocab_size]


# -------------------------------------------------------------------------------------------------------------- saving


def save_pretrained(pretrained: PretrainedWeights, output: Path) -> Path:
    """Write a folder that `train.py --init` starts from and `pmlm export` reads. Refuses one that is there already."""
    with new_folder(output) as temporary:
        checkpoints = CheckpointFolder(temporary / IMPORTED, keep=1)
        unfinished = checkpoints.temporary(0, attempt="import")
        unfinished.mkdir(parents=True)
        wholes = [Fragment.whole(name, weight.shape) for name, weight in pretrained.weights.items()]
        chunks = (_bytes_of(weight) for weight in pretrained.weights.values())
        files = {
            rank_file(0): write_numbers(unfinished / rank_file(0), wholes, chunks, kinds=("weight",)),
            STATE: write_json(unfinished / STATE, _state(pretrained)),
        }
        checkpoints.commit(0, unfinished, files)
        pretrained.vocabulary.save(temporary)
    return output


def _bytes_of(weight: Tensor) -> memoryview:
    return np.ascontiguousarray(weight.numpy(), dtype="<f4").reshape(-1).view(np.uint8).data


def _state(pretrained: PretrainedWeights) -> dict[str, Any]:
    return {
        **dict.fromkeys(("step", "samples_consumed", "tokens_seen"), 0),
        "identity": {"vocabulary": pretrained.vocabulary.fingerprint},
        "configuration": {"model": asdict(pretrained.model), "imported": pretrained.facts},
    }


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and is removed when it does not.

    Raises `ConfigError` when `output` is there already, or cannot be written.
    """
    if output.exists():
        raise ConfigError([f"--output ({output}) is there already, and nothing is overwritten: name another"])
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(output)
    except OSError as error:
        raise ConfigError([f"--output ({output}) cannot be written: {error}; nothing is left there"]) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
