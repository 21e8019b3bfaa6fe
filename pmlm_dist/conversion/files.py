"""Files of foreign models: tensors, settings, tokenizers. Code in them is never executed.

model.safetensors | pytorch_model.bin    tensors by name, in one file or in those that an index lists
config.json                              settings
tokenizer.json | vocab.txt               vocabulary, special tokens renamed to ours
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.tensors import Tensors, short_list
from pmlm_dist.json_input import read_json_object
from pmlm_dist.vocab import CLS, MASK, PAD, SEP, UNK, Vocabulary

WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_DAMAGED = (
    *(OSError, EOFError, SafetensorError, UnpicklingError, struct.error, RuntimeError, ValueError),
    *(TypeError, AttributeError, LookupError, AssertionError),
)
"""What the readers raise for damaged files; the unpickler runs on whatever it finds there."""
CONFIG, TOKENIZER, WORD_LIST = "config.json", "tokenizer.json", "vocab.txt"
TOKENIZER_CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def write_settings(path: Path | str, settings: dict[str, Any]) -> None:
    """Write a JSON file."""
    Path(path).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: Path | str) -> Tensors:
    """Return the tensors of a safetensors file or of a file of `torch.save`, without executing code in it.

    `path` may also be an index of such files. Raises `ConfigError`.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [""])[0]  # torch appends paragraphs of advice
        raise ConfigError([f"{path} cannot be read: {reason or repr(error)}"]) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError([f"{path} is not a mapping from names to tensors"])
    return dict(tensors)


def _read_shards(index: Path) -> Tensors:
    """Return the tensors of the files that `weight_map` lists, beside the index."""
    files = read_json_object(index).get("weight_map")
    # A name such as ../other would read outside the folder.
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise ConfigError([f"{index} cannot be read: its weight_map must list a file beside it for each tensor"])
    tensors = {}
    for file in sorted(set(files.values())):
        tensors |= read_tensors(index.with_name(file))
    missing = sorted(files.keys() - tensors.keys())
    if missing:
        raise ConfigError([f"{index} lists tensors that its files lack, copy all files again: {short_list(missing)}"])
    return tensors


def read_vocabulary(path: Path | str) -> Vocabulary:
    """Return the WordPiece vocabulary of a folder or a word list, special tokens renamed to those of corpora.

    MPNet's special tokens are `<s> </s> <pad> <mask>`; its vocabulary also has BERT's names for them, unused. Unused
    special tokens become `[unusedN]`, so that two tokens never have the same name.
    """
    path = Path(path)
    file = path / TOKENIZER
    if not file.is_file():
        return _read_word_list(path if path.is_file() else path / WORD_LIST)
    settings = {**_optional(path / SPECIAL), **_optional(path / TOKENIZER_CONFIG)}
    roles = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    their_names = {ours: _content(settings.get(role)) or ours for role, ours in roles.items()}
    vocabulary = Vocabulary.load(path)
    return vocabulary.renamed(_renames(vocabulary.tokens, their_names, _added(file)))


def _read_word_list(words: Path) -> Vocabulary:
    """Return the vocabulary of an uncased word list. A word list has no settings: capitals show that it is cased."""
    vocabulary = Vocabulary.load(words)
    capital = next((token for token in vocabulary.tokens if token.isalpha() and token != token.lower()), None)
    if capital is not None:
        raise ConfigError(
            [f"{words} is cased (it has {capital!r}): save its {TOKENIZER} beside it, which defines the tokenization"]
        )
    return vocabulary


def _renames(tokens: tuple[str, ...], their_names: dict[str, str], added: list[str]) -> dict[str, str]:
    """Return new names of the special tokens in use (`their_names`: ours -> theirs) and of the unused ones."""
    used = their_names.values()
    unused = [token for token in dict.fromkeys([*added, *their_names]) if token in tokens and token not in used]
    free_names = (name for number in range(len(tokens)) if (name := f"[unused{number}]") not in tokens)
    renames = {theirs: ours for ours, theirs in their_names.items() if theirs != ours}
    return renames | {token: next(free_names) for token in unused}


def _added(file: Path) -> list[str]:
    return [token["content"] for token in read_json_object(file).get("added_tokens") or [] if token.get("special")]


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
