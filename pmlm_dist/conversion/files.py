"""Files of foreign models: tensors and settings; vocabulary/files.py reads tokenizers. Code in them is never executed.

model.safetensors | pytorch_model.bin    tensors by name, in one file or in those that an index lists
config.json                              settings
"""

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

WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_DAMAGED = (
    *(OSError, EOFError, SafetensorError, UnpicklingError, struct.error, RuntimeError, ValueError),
    *(TypeError, AttributeError, LookupError, AssertionError),
)
"""What the readers raise for damaged files; the unpickler runs on whatever it finds there."""
CONFIG = "config.json"


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
        raise ConfigError([f"{path} is not a mapping from names to tensors: save the state_dict of the model alone"])
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
