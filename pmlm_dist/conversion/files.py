"""The files of other programs' models: tensors, settings, tokenizers; nothing in them is ever run.

model.safetensors | pytorch_model.bin    tensors by name
config.json                              settings
tokenizer.json | vocab.txt               vocabulary, its special tokens renamed to ours
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.tensors import Tensors
from pmlm_dist.vocab import CLS, MASK, PAD, SEP, UNK, Vocabulary

WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
CONFIG, TOKENIZER, WORDS = "config.json", "tokenizer.json", "vocab.txt"
TOKENIZER_CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, or of one that torch saved; code in the latter is never run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError([f"{path} does not hold tensors by name"])
    return dict(found)


def read_json_object(path: Path) -> dict[str, Any]:
    """A file with settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if not isinstance(found, dict):
        raise ConfigError([f"{path} cannot be read: it holds no settings"])
    return found


def read_vocabulary(place: Path) -> Vocabulary:
    """The WordPiece vocabulary of a folder or a list of words, its special tokens under the names that corpora use.

    MPNet's are `<s> </s> <pad> <mask>`, beside the BERT tokens of these names, which it does not use; such tokens that
    have no part to play become `[unusedN]`, for a text cannot contain them.
    """
    file = place / TOKENIZER
    if not file.is_file():
        return _uncased(place if place.is_file() else place / WORDS)
    roles = {**_optional(place / SPECIAL), **_optional(place / TOKENIZER_CONFIG)}
    parts = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    played = {part: _content(roles.get(role)) or part for role, part in parts.items()}
    vocabulary = Vocabulary.load(place)
    return vocabulary.renamed(_renames(vocabulary.tokens, played, _added(file)))


def _uncased(words: Path) -> Vocabulary:
    """The vocabulary in a list of words, which does not say how text is read but by its capitals."""
    vocabulary = Vocabulary.load(words)
    capital = next((token for token in vocabulary.tokens if token.isalpha() and token != token.lower()), None)
    if capital is not None:
        raise ConfigError(
            [f"{words} is cased (it has {capital!r}): save its {TOKENIZER} beside it, which says how to read text"]
        )
    return vocabulary


def _renames(tokens: tuple[str, ...], played: dict[str, str], added: list[str]) -> dict[str, str]:
    """New names: of the tokens that play a part (part -> token), and of the special ones that play none."""
    idle = [token for token in dict.fromkeys([*added, *played]) if token in tokens and token not in played.values()]
    free = (name for number in range(len(tokens)) if (name := f"[unused{number}]") not in tokens)
    renames = {token: part for part, token in played.items() if token != part}
    return renames | {token: next(free) for token in idle}


def _added(file: Path) -> list[str]:
    return [token["content"] for token in read_json_object(file).get("added_tokens") or [] if token.get("special")]


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
