"""Journal of a preparation: its finished work on disk, from which an interrupted preparation resumes.

    corpus/.journal/
      outputs.json             the files of the corpus that this preparation writes; nothing else is ever removed
      identity.json            the settings and the input of the work in this folder
      scan/000017.json         unit 17 is scanned (its tables are beside the file); likewise for every unit
      runs/000004.json         some units are packed, with their counts (sorted runs of their samples beside it)
      shards/train-000002.json a shard is written: its entry in the manifest
      vocabulary/              the vocabulary, once trained

A .json file is written atomically, after the data it describes. Data without such a file is incomplete and written
again. The names are those of units, runs and shards, so any number of ranks can resume.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pmlm_dist.config import raise_if_any
from pmlm_dist.files import write_atomically
from pmlm_dist.folder_lock import LOCK
from pmlm_dist.json_input import read_json

FOLDER = ".journal"
SCAN, RUNS, SHARDS, DUPLICATES, PARTITIONS = "scan", "runs", "shards", "duplicates", "partitions"
_IDENTITY, _OUTPUTS = "identity.json", "outputs.json"
_MAX_NAMED = 3


class Journal:
    """Journal of the preparation that writes into `output`."""

    def __init__(self, output: Path):
        self.output, self.folder = output, output / FOLDER

    def identity(self) -> Any:
        """Return the settings and input of the recorded work; None without a journal."""
        return self._read(self.folder / _IDENTITY) if self._is_own() else None

    def outputs(self) -> set[str]:
        """Return the files of the corpus that the journal lists, relative to its folder."""
        return set(self._read(self.folder / _OUTPUTS) or ())

    def add_outputs(self, names: Iterable[str]) -> None:
        """List files before they are written. Raises ConfigError if one that is not listed exists."""
        listed = self.outputs()
        new = set(names) - listed
        self._raise_if_foreign([name for name in sorted(new) if (self.output / name).exists()])
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / _OUTPUTS, sorted(listed | new))

    def raise_if_not_alone(self) -> None:
        """Raise ConfigError if the folder of the corpus holds anything but what the journal lists."""
        own = {Path(name).parts[0] for name in self.outputs()} | ({FOLDER} if self._is_own() else set())
        names = sorted(path.name for path in self.output.iterdir() if path.name.partition(".tmp-")[0] not in own)
        self._raise_if_foreign([name for name in names if not name.startswith(LOCK)])

    def _raise_if_foreign(self, names: list[str]) -> None:
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        problem = f"{self.output} holds {', '.join(names[:_MAX_NAMED])}{more}, which no preparation has written"
        raise_if_any([f"{problem}: give another --output, or move them"] if names else [])

    def begin(self, identity: Any) -> None:
        """Start a journal without work."""
        for name in (SCAN, RUNS, SHARDS, DUPLICATES, PARTITIONS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.add_outputs(())
        self._write(self.folder / _IDENTITY, identity)

    def remove(self) -> None:
        """Delete the journal. The list of the outputs, by which it is recognized, goes last."""
        if not self._is_own():
            return
        (self.folder / _IDENTITY).unlink(missing_ok=True)
        for path in self.folder.glob("*/"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Delete the journal and all files that it lists."""
        for name in self.outputs():
            (self.output / name).unlink(missing_ok=True)
        self.remove()

    def remove_temporary_files(self) -> None:
        """Remove the temporary files of a killed attempt beside the files that the journal lists."""
        outputs = {self.output / name for name in self.outputs()}
        for folder in {path.parent for path in outputs}:
            for path in folder.glob("*.tmp-*"):
                if path.with_name(path.name.rpartition(".tmp-")[0]) in outputs:
                    path.unlink()

    def _is_own(self) -> bool:
        """Return True unless another program has written files into a folder of this name."""
        return (self.folder / _OUTPUTS).is_file() or not any(path.is_file() for path in self.folder.rglob("*"))

    def path(self, kind: str, name: str) -> Path:
        return self.folder / kind / name

    def committed(self, kind: str) -> dict[str, Any]:
        """Return all finished work of a kind: name -> record of `commit`, sorted by name."""
        return {path.stem: self._read(path) for path in sorted((self.folder / kind).glob("*.json"))}

    def commit(self, kind: str, name: str, record: Any) -> None:
        self._write(self.folder / kind / f"{name}.json", record)

    def _read(self, path: Path) -> Any:
        return read_json(path) if path.is_file() else None

    def _write(self, path: Path, record: Any) -> None:
        write_atomically(path, json.dumps(record))
