"""The manifest of a checkpoint: size, checksum and contents of every file, as JSON.

    {"version": 4,
     "tensors": [[NAME, SHAPE, USED_ROWS, DIM], ...]
     "files": {"state.json": {"bytes": ..., "sha256": ...},
               "rank-00000.safetensors": {"bytes": ..., "sha256": ..., "kinds": [KIND, ...],
                   "fragments": [[NUMBER OF THE TENSOR, FIRST_ROW, LAST_ROW, START, STOP], ...]}}}

The fragments are the index of the checkpoint: with it a rank opens only the files that hold what it loads. Format 3 has
no index; its readers open every file. The report of a rank that has written its file has the same form. No torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.files import write_atomically

VERSION, WITHOUT_INDEX = 4, 3
MANIFEST, STATE = "manifest.json", "state.json"


class CorruptCheckpoint(ValueError):
    """A checkpoint that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of a file; of a rank file also its contents."""

    bytes: int
    sha256: str
    kinds: tuple[str, ...] = ()
    fragments: tuple[Fragment, ...] | None = None
    """None for `state.json`, and without an index."""


def rank_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def is_rank_file(name: str) -> bool:
    """Return True for a name that `rank_file` returns."""
    digits = name.removeprefix("rank-").removesuffix(".safetensors")
    return digits.isdecimal() and name == rank_file(int(digits))


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True, indent: int | None = 2) -> FileDigest:
    """Write `value` atomically; `durable` as for `write_atomically`."""
    data = (json.dumps(value, indent=indent) + "\n").encode()
    write_atomically(path, data, durable=durable)
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CorruptCheckpoint` for any other content."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets nested a million deep
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error!r})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path.name} cannot be read (it holds no object)")
    return value


def write_manifest(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Write the manifest of `folder`, which lists `files` by name."""
    write_json(folder / MANIFEST, as_document(files), indent=None)


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Return the files of a checkpoint by name. Raises `CorruptCheckpoint` for a manifest of another form."""
    files = from_document(read_json(folder / MANIFEST))
    if STATE not in files or rank_file(0) not in files:
        raise CorruptCheckpoint(f"{MANIFEST} does not list {STATE} and {rank_file(0)}")
    unexpected = [name for name in files if name != STATE and not is_rank_file(name)]
    if unexpected:  # a name such as ../latest would make the checks read outside the folder
        raise CorruptCheckpoint(f"{MANIFEST} lists {unexpected[0]!r}, which is no file of a checkpoint")
    return files


def as_document(files: Mapping[str, FileDigest]) -> dict[str, Any]:
    """Return `files` as JSON values that `from_document` reads."""
    numbers: dict[tuple[Any, ...], int] = {}
    entries: dict[str, Any] = {}
    for name, digest in sorted(files.items()):
        entries[name] = {"bytes": digest.bytes, "sha256": digest.sha256}
        if digest.fragments is not None:
            rows = [
                [numbers.setdefault((f.name, f.shape, f.used_rows, f.dim), len(numbers)), *_place(f)]
                for f in digest.fragments
            ]
            entries[name] |= {"kinds": digest.kinds, "fragments": rows}
    return {"version": VERSION, "tensors": list(numbers), "files": entries}


def from_document(document: dict[str, Any]) -> dict[str, FileDigest]:
    """Return the files that `as_document` was given. Raises `CorruptCheckpoint` for anything else."""
    version = document.get("version")
    if version not in (VERSION, WITHOUT_INDEX):
        raise CorruptCheckpoint(
            f"{MANIFEST} is of format {version!r}, this program reads {WITHOUT_INDEX} and {VERSION}: use the one that "
            "wrote it"
        )
    try:
        tensors = document["tensors"] if version == VERSION else []
        return {
            name: _digest(entry, tensors, has_index=version == VERSION and name != STATE)
            for name, entry in document["files"].items()
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # JSON of any other structure
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read ({error!r})") from error


def _place(fragment: Fragment) -> tuple[int, int, int, int]:
    return fragment.first_row, fragment.last_row, fragment.start, fragment.stop


def _digest(entry: dict[str, Any], tensors: list[Any], *, has_index: bool) -> FileDigest:
    if not has_index:
        return FileDigest(**entry)
    fragments = []
    for number, first_row, last_row, start, stop in entry["fragments"]:
        name, shape, used_rows, dim = tensors[number]
        value = {"name": name, "shape": shape, "used_rows": used_rows, "dim": dim, "first_row": first_row}
        fragments.append(Fragment.from_json(value | {"last_row": last_row, "start": start, "stop": stop}))
    return FileDigest(entry["bytes"], entry["sha256"], tuple(entry["kinds"]), tuple(fragments))
