"""Files of the demo tasks: docstrings in, one file of examples for each split out."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import new_folder
from pmlm_dist.files import json_line

HELD_OUT = ("validation", "test")
"""The splits besides `train`."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of docstrings or examples. Raises `ConfigError` if there is no such file."""
    if not path.is_file():
        raise ConfigError([f"there is no {path}: make it with `pmlm prepare-corpus --source python-docs`"])
    with path.open("rb") as lines:
        return [json.loads(line) for line in lines]


def write_splits(output: Path, make: Callable[[], Mapping[str, Sequence[Any]]]) -> dict[str, int]:
    """Write the splits that `make` returns into the new folder `output`, one file each; returns {split: examples}.

    Raises `ConfigError` if the folder exists.
    """
    with new_folder(output) as folder:
        splits = make()
        for name, examples in splits.items():
            (folder / f"{name}.jsonl").write_bytes(b"".join(map(json_line, examples)))
    return {name: len(examples) for name, examples in splits.items()}


def digest(text: str) -> int:
    """Return a hash of `text` that is stable over installations."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
