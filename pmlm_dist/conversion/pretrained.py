"""Pre-trained models independent of a run: settings, unsharded weights, vocabulary, and their origin.

checkpoint of any topology  --open_pretrained-->  PretrainedWeights  --save_pretrained-->  DIR/weights/step-00000000
                                                          |                                DIR/tokenizer.json, vocab.txt
                                                  build_pretrained: the module, on one device
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from pmlm_dist.checkpoint.files import read_state, read_weights, write_numbers
from pmlm_dist.checkpoint.folder import IMPORTED, TOKENIZER, CheckpointFolder, newest_valid_at, vocabulary_folder
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.initial_weights import ARCHITECTURE_SETTINGS
from pmlm_dist.checkpoint.manifest import STATE, CorruptCheckpoint, rank_file, write_json
from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.conversion.tensors import Tensors, short_list
from pmlm_dist.files import name_in_errors
from pmlm_dist.folder_lock import FolderLock
from pmlm_dist.model.task_model import TASK_HEAD
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model, context_inputs
from pmlm_dist.parallel import groups, seeding
from pmlm_dist.parallel.layers import is_sharded, sharded_dimension, tp_rank, tp_size
from pmlm_dist.planning.parameters import HEAD_BIAS, TOKENS, parameter_shapes
from pmlm_dist.vocabulary.vocabulary import Vocabulary

_VOCABULARY_TENSORS = (TOKENS, HEAD_BIAS)
"""Tensors with one row per token."""


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class PretrainedWeights:
    """A model with its vocabulary."""

    model: ModelConfig
    weights: Tensors
    """Unsharded fp32 parameters by name, without the rows that pad the vocabulary."""
    vocabulary: Vocabulary
    facts: dict[str, Any] = field(default_factory=dict)
    """Contents of `state.json` and the `folder` of its checkpoint, or the origin of imported weights."""

    def with_vocabulary(self, vocabulary: Vocabulary, *, origin: str) -> Self:
        """Return the model with the token ids of `vocabulary`.

        Raises `ConfigError` if the sets of tokens differ, or normalization and added words.
        """
        ids, tokens = self.vocabulary.ids, vocabulary.tokens
        missing = [token for token in tokens if token not in ids]
        extra = ids.keys() - set(tokens)
        if missing or extra:
            raise ConfigError(
                [
                    f"the vocabulary of {origin} ({len(tokens)} tokens) differs from that of the weights ({len(ids)}): "
                    f"{len(missing)} of its tokens have no weights{_examples(missing)}, "
                    f"{len(extra)} tokens with weights are not in it{_examples(sorted(extra))}"
                ]
            )
        if vocabulary.processing != self.vocabulary.processing:
            raise ConfigError(
                [
                    f"the vocabulary of {origin} ({vocabulary.description}) has the tokens of the weights, but reads "
                    f"text otherwise ({self.vocabulary.description}): prepare the corpus with the vocabulary of the "
                    "weights"
                ]
            )
        rows = torch.tensor([ids[token] for token in tokens])
        weights = self.weights | {name: self.weights[name][rows] for name in _VOCABULARY_TENSORS}
        return replace(self, weights=weights, vocabulary=vocabulary)


def _examples(tokens: list[str]) -> str:
    return f" (such as {', '.join(map(repr, tokens[:3]))})" if tokens else ""


# ------------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint whose weights have not been loaded."""

    folder: Path
    model: ModelConfig
    vocabulary: Vocabulary
    state: dict[str, Any]
    """Contents of its `state.json`."""


def find_pretrained(path: Path | str) -> PretrainedModel:
    """Return the newest valid checkpoint at `path`.

    `path`: a run folder, its checkpoints, one of them, or a folder written by `pmlm import`. In a fine-tuning folder
    the best checkpoint so far is returned instead. Nothing outside the folder is read. Raises `ConfigError` if the
    checkpoint is corrupt, or the vocabulary beside it is missing or not the one that it was trained with.
    """
    path = Path(os.path.abspath(path))  # in `.` or `..` no name is known and no parent
    folder = newest_valid_at(path)
    state = _state_of(folder)
    best = state.get("progress", {}).get("best_step")
    if best and folder.name != path.name:
        folder = newest_valid_at(CheckpointFolder(folder.parent, keep=1).folder(best))
        state = _state_of(folder)
    model = _model_settings(state["configuration"].get("model"), folder)
    place = vocabulary_folder(folder)
    words = Vocabulary.load(place)
    if words.fingerprint != state["identity"].get("vocabulary"):
        raise ConfigError(
            [f"{place / TOKENIZER} is not the vocabulary that {folder} was trained with: copy that of its corpus there"]
        )
    return PretrainedModel(folder, replace(model, vocab_size=words.size), words, state)


def _state_of(folder: Path) -> dict[str, Any]:
    try:
        return read_state(folder)
    except CorruptCheckpoint as error:
        raise ConfigError([f"{folder}: {error}"]) from error


def open_pretrained(path: Path | str) -> PretrainedWeights:
    """Load the checkpoint that `find_pretrained` returns, without the head of a fine-tuning task."""
    checkpoint = find_pretrained(path)
    folder = checkpoint.folder
    try:
        arrays = read_weights(folder)
    except CorruptCheckpoint as error:
        raise ConfigError([f"{folder}: {error}"]) from error
    weights = {name: torch.from_numpy(a) for name, a in arrays.items() if not name.startswith(TASK_HEAD)}
    facts = {**checkpoint.state, "folder": folder}
    pretrained = PretrainedWeights(checkpoint.model, weights, checkpoint.vocabulary, facts)
    raise_if_any(_shape_problems(pretrained, folder))
    return pretrained


def _model_settings(saved: Any, folder: Path) -> ModelConfig:
    names = {item.name for item in fields(ModelConfig)}
    if not isinstance(saved, dict) or not set(ARCHITECTURE_SETTINGS) <= saved.keys() <= names:
        raise ConfigError([f"{folder}: {STATE} has no model settings as this release writes them"])
    return ModelConfig(**saved)


def _shape_problems(pretrained: PretrainedWeights, folder: Path) -> list[str]:
    expected = parameter_shapes(pretrained.model)
    actual = {name: tuple(weight.shape) for name, weight in pretrained.weights.items()}
    different = [
        f"{name}: shape {actual.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    return [f"{folder} holds other tensors than its settings require: {short_list(different)}"] if different else []


# ----------------------------------------------------------------------------------------------------------- inference


def build_untrained(pretrained: PretrainedWeights, *, seed: int) -> PseudoMaskedLM:
    """Return a module of the same shape with initial weights, in evaluation mode, on this rank's device."""
    device = groups.init_process_groups().device
    config = replace(pretrained.model, attention="fused", activation_checkpointing=False)
    seeding.seed_initialization(seed)
    return build_model(config, padded_vocab_size=pretrained.vocabulary.padded_size()).eval().to(device)


def build_pretrained(pretrained: PretrainedWeights) -> PseudoMaskedLM:
    """Return the module in evaluation mode, on the CPU."""
    model = build_untrained(pretrained, seed=0).cpu()
    fill_weights(model, pretrained.weights, origin=pretrained.facts.get("folder"))
    return model


def load_model(pretrained: PretrainedWeights, precision: Precision) -> PseudoMaskedLM:
    """Return the module in evaluation mode, on this rank's device."""
    device = groups.init_process_groups().device
    return build_pretrained(pretrained).to(
        device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )


@torch.no_grad()
def fill_weights(model: PseudoMaskedLM, weights: Tensors, *, origin: Any) -> None:
    """Copy unsharded `weights` into `model`, of which this rank may hold a tensor-parallel slice.

    Raises `ConfigError` if the model has other tensors than `weights`; `origin` names those.
    """
    own = dict(model.named_parameters())
    problems = [f"{origin}: the tensors of the model do not include {name}" for name in weights.keys() - own.keys()]
    problems += [f"{origin} has no tensor {name}" for name in own.keys() - weights.keys()]
    raise_if_any(sorted(problems))
    for name, parameter in own.items():
        whole, dim, weight = list(parameter.shape), sharded_dimension(parameter), weights[name]
        whole[dim] *= tp_size() if is_sharded(parameter) else 1
        raise_if_any(
            [f"{origin}: {name}: shape {tuple(weight.shape)}, expected {tuple(whole)}"]
            if weight.shape[1:] != torch.Size(whole[1:]) or len(weight) > whole[0]
            else []
        )
        padded = parameter.new_zeros(whole)  # zero: the rows that pad the vocabulary
        padded[: len(weight)] = weight
        first = tp_rank() * parameter.shape[dim] if is_sharded(parameter) else 0
        parameter.copy_(padded.narrow(dim, first, parameter.shape[dim]))


@torch.no_grad()
def hidden_states(model: PseudoMaskedLM, ids_BT: Tensor, *, segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the last hidden states [B, T, E] of texts, with every slot as context."""
    states_TBE = model.encode(context_inputs(ids_BT, segments_BT=segments_BT, valid_BT=valid_BT))
    return states_TBE.transpose(0, 1)


@torch.no_grad()
def logits(model: PseudoMaskedLM, states_BTE: Tensor) -> Tensor:
    """Return the logits [B, T, V] of last hidden states, without the padding of the vocabulary."""
    logits_BTV = model.head(states_BTE, model.embeddings.token.weight)
    return logits_BTV[..., : model.config.vocab_size]


# -------------------------------------------------------------------------------------------------------------- saving


def save_pretrained(pretrained: PretrainedWeights, output: Path | str) -> Path:
    """Write a folder for `train.py --init` and `pmlm export`. Raises `ConfigError` if it exists."""
    with new_folder(output) as temporary:
        checkpoints = CheckpointFolder(temporary / IMPORTED, keep=1)
        checkpoint = checkpoints.temporary(0, attempt="import")
        checkpoint.mkdir(parents=True)
        fragments = [Fragment.whole(name, weight.shape) for name, weight in pretrained.weights.items()]
        chunks = (_bytes_of(weight) for weight in pretrained.weights.values())
        files = {
            rank_file(0): write_numbers(checkpoint / rank_file(0), fragments, chunks, kinds=("weight",)),
            STATE: write_json(checkpoint / STATE, _state(pretrained)),
        }
        checkpoints.commit(0, checkpoint, files)
        pretrained.vocabulary.save(temporary)
    return Path(output)


def _bytes_of(weight: Tensor) -> memoryview:
    return np.ascontiguousarray(weight.numpy(), dtype="<f4").reshape(-1).view(np.uint8).data


def _state(pretrained: PretrainedWeights) -> dict[str, Any]:
    facts = pretrained.facts
    origin = {"format": "checkpoint", "from": str(facts["folder"])} if "folder" in facts else {}
    return {
        **dict.fromkeys(("step", "samples_consumed", "tokens_seen"), 0),
        "identity": {"vocabulary": pretrained.vocabulary.fingerprint},
        "configuration": {
            "model": asdict(pretrained.model),
            "corpus_fingerprint": facts.get("configuration", {}).get("corpus_fingerprint"),
            "imported": origin | {name: facts[name] for name in ("format", "from", "notes") if name in facts},
        },
    }


@contextmanager
def new_folder(output: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `output` on success, and removed if the block raises.

    Raises `ConfigError` if `output` exists, `FolderInUse` while another process writes it, and OSError.
    """
    output = Path(output)
    with name_in_errors(output), FolderLock.acquire(output, beside=True) as lock:
        if os.path.lexists(output):  # also a link to nothing
            raise ConfigError([f"--output ({output}) already exists and is not overwritten: choose another"])
        temporary = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            yield temporary
            lock.check()
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
