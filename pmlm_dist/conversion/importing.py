"""`pmlm import`: BERT, MPNet and UniLM checkpoints as weights that `train.py --init` starts from.

config.json, tensors, vocabulary  --read_pretrained: strict about names and shapes-->  Pretrained  -->  folder
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmlm_dist.checkpoint.initial_weights import ARCHITECTURE_SETTINGS, flag_of
from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.files import (
    CONFIG,
    OLD_WEIGHTS,
    TOKENIZER,
    WEIGHTS,
    WORDS,
    read_json_object,
    read_tensors,
    read_vocabulary,
)
from pmlm_dist.conversion.huggingface import from_bert, from_mpnet
from pmlm_dist.conversion.pretrained import PretrainedWeights, save_pretrained
from pmlm_dist.conversion.tensors import Tensors
from pmlm_dist.conversion.unilm import from_unilm, is_unilm
from pmlm_dist.vocab import Vocabulary

Format = Literal["auto", "bert", "mpnet", "unilm"]
_FORMATS: dict[str, Callable[..., PretrainedWeights]] = {"bert": from_bert, "mpnet": from_mpnet, "unilm": from_unilm}


def import_weights(path: Path, /, *, output: Path, vocabulary: Path | None = None, format: Format = "auto") -> None:
    """Read a BERT, MPNet (Hugging Face) or UniLM checkpoint, for `train.py --init` to go on pre-training from.

    Args:
        path: A folder with config.json, model.safetensors or pytorch_model.bin, and tokenizer.json or vocab.txt; or a
            UniLM file NAME.bin beside NAME-config.json and NAME-vocab.txt.
        output: The folder to write, which must not be there yet.
        vocabulary: A corpus whose vocabulary has the same tokens under other ids: the weights take its order.
        format: `auto` looks at the settings and the names of the tensors.
    """
    pretrained = read_pretrained(path, format=format)
    if vocabulary is not None:
        pretrained = pretrained.with_vocabulary(Vocabulary.load(vocabulary), origin=str(vocabulary))
    save_pretrained(pretrained, output)
    for note in pretrained.facts["notes"]:
        print(f"note: {note}")
    print(
        f"written: {output} ({pretrained.facts['format']}, {sum(map(_numel, pretrained.weights.values())):,} numbers)\n"
        f"a corpus for it: pmlm prepare-corpus --vocabulary {shlex.quote(str(output))} ...\n"
        f"to go on: train.py --init {shlex.quote(str(output))} {' '.join(needed_flags(pretrained.model))}"
    )


def _numel(tensor: Any) -> int:
    return tensor.numel()


def needed_flags(model: ModelConfig) -> list[str]:
    """The settings of a run of `model` that differ from the base preset's."""
    default = ModelConfig()
    names = [name for name in ARCHITECTURE_SETTINGS if name != "vocab_size"]
    return [flag_of(name, getattr(model, name)) for name in names if getattr(model, name) != getattr(default, name)]


def read_pretrained(path: Path, *, format: Format = "auto") -> PretrainedWeights:
    """The model at `path`, nothing of it left unread without a word. Raises `ConfigError` with what does not fit."""
    files = _find(path)
    settings, tensors = read_json_object(files.settings), read_tensors(files.tensors)
    name = _recognised(settings, tensors, path) if format == "auto" else format
    return _FORMATS[name](settings, tensors, read_vocabulary(files.vocabulary), origin=str(path))


def _recognised(settings: dict[str, Any], tensors: Tensors, path: Path) -> str:
    kind = settings.get("model_type")
    if kind in (None, "bert", "unilm") and is_unilm(settings, tensors):
        return "unilm"
    if kind == "mpnet" or (kind is None and any(name.startswith("mpnet.") for name in tensors)):
        return "mpnet"
    if kind == "bert" or (kind is None and any("token_type_embeddings" in name for name in tensors)):
        return "bert"
    raise ConfigError([f"{path} holds a {kind or 'nameless'} model; what can be imported: bert, mpnet, unilm"])


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Files:
    settings: Path
    tensors: Path
    vocabulary: Path


def _find(path: Path) -> _Files:
    if path.is_dir():
        tensors = _first([path / WEIGHTS, path / OLD_WEIGHTS], "weights")
        folder, stem = path, None
    elif path.is_file():
        tensors, folder, stem = path, path.parent, path.stem
    else:
        raise ConfigError([f"there is no file or folder {path}"])
    named = [folder / f"{stem}-{CONFIG}"] if stem else []
    words = [folder / f"{stem}-{WORDS}"] if stem else []
    settings = _first([*named, folder / CONFIG], "settings")
    vocabulary = _first([*words, folder / TOKENIZER, folder / WORDS], "vocabulary")
    return _Files(settings, tensors, vocabulary if vocabulary in words else folder)


def _first(candidates: list[Path], what: str) -> Path:
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConfigError([f"no {what} found: there is no {' and no '.join(str(path) for path in candidates)}"])
    return found
