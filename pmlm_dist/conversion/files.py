"""Files of foreign models: tensors and settings; vocab_files.py reads tokenizers. Code in them is never executed.

model.safetensors | pytorch_model.bin    tensors by name
config.json                              settings
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

WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
CONFIG = "config.json"


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file, or of a file of `torch.save`, without executing code in it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError([f"{path} is not a mapping from names to tensors"])
    return dict(tensors)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if not isinstance(settings, dict):
        raise ConfigError([f"{path} cannot be read: it is not a JSON object"])
    return settings
