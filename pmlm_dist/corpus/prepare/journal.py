"""Journal of a preparation: its finished work on disk, from which an interrupted preparation resumes.

    corpus/.journal/
      identity.json            the settings and the input of the work in this folder
      scan/000017.json         unit 17 is scanned (its tables are beside the file); likewise for every unit
      runs/000004.json         some units are packed, with their counts (sorted runs of their samples beside it)
      shards/train-000002.json a shard is written: its entry in the manifest
      vocabulary/              the vocabulary, once trained

A .json file is written atomically, after the data it describes. Data without such a file is incomplete and written
again. The names are those of units, runs and shards, so any number of ranks can resume.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pmlm_dist.files import write_atomically

FOLDER = ".journal"
SCAN, RUNS, SHARDS, DUPLICATES, PARTITIONS = "scan", "runs", "shards", "duplicates", "partitions"
_IDENTITY = "identity.json"


class Journal:
    """Journal of the preparation that writes into `output`."""

    def __init__(self, output: Path):
        self.folder = output / FOLDER

    def identity(self) -> Any:
        """Return the settings and input of the recorded work; None without a journal."""
        return self._read(self.folder / _IDENTITY)

    def begin(self, identity: Any) -> None:
        """Start an empty journal."""
        self.remove()
        for name in (SCAN, RUNS, SHARDS, DUPLICATES, PARTITIONS):
            (self.folder / name).mkdir(parents=True)
        self._write(self.folder / _IDENTITY, identity)

    def remove(self) -> None:
        """Delete the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, kind: str, name: str) -> Path:
        """Return the path of a data file of some work."""
        return self.folder / kind / name

    def committed(self, kind: str) -> dict[str, Any]:
        """Return all finished work of a kind: name -> record of `commit`, sorted by name."""
        return {path.stem: self._read(path) for path in sorted((self.folder / kind).glob("*.json"))}

    def commit(self, kind: str, name: str, record: Any) -> None:
        """Record some work as finished."""
        self._write(self.folder / kind / f"{name}.json", record)

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, path: Path, record: Any) -> None:
        write_atomically(path, json.dumps(record))
