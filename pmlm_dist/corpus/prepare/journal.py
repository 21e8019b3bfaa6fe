"""What an unfinished preparation has done already, on disk, so that the next one goes on from there.

    corpus/.unfinished/
      identity.json            the settings and the input that all of this was made from
      scan/000017.json         unit 17 is scanned (beside it its tables); likewise for every unit
      runs/000004.json         these units are packed, with these counts (beside it sorted runs of their samples)
      shards/train-000002.json the shard is written: its entry in the manifest
      vocabulary/              the vocabulary, once it is there

A .json file is written last, under another name, and renamed: what it speaks of is whole. Anything else is not counted
and written anew. All names are those of units, buckets and shards, so any number of ranks can go on.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

FOLDER = ".unfinished"
SCAN, RUNS, SHARDS, DROPPED, PARTS = "scan", "runs", "shards", "dropped", "parts"
_IDENTITY = "identity.json"


class Journal:
    """The folder of a preparation that writes into `output`."""

    def __init__(self, output: Path):
        self.folder = output / FOLDER

    def identity(self) -> Any:
        """Whose work lies here; None if nobody's."""
        return self._read(self.folder / _IDENTITY)

    def begin(self, identity: Any) -> None:
        """Start with nothing done."""
        self.remove()
        for name in (SCAN, RUNS, SHARDS, DROPPED, PARTS):
            (self.folder / name).mkdir(parents=True)
        self._write(self.folder / _IDENTITY, identity)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, kind: str, name: str) -> Path:
        """Where a table of some work lies."""
        return self.folder / kind / name

    def done(self, kind: str) -> dict[str, Any]:
        """All finished work of a kind: what `finish` was told, by name, sorted."""
        return {path.stem: self._read(path) for path in sorted((self.folder / kind).glob("*.json"))}

    def finish(self, kind: str, name: str, record: Any) -> None:
        """Make a piece of work count."""
        self._write(self.folder / kind / f"{name}.json", record)

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, path: Path, record: Any) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(record, out)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
