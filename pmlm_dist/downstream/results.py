"""Results of a long computation, kept as they come: a command that is started again computes what is missing.

    batches --one for each data-parallel rank at a time--> results of all ranks --rank 0 appends them--> PATH.part
    PATH.part with all batches --lines in the order of the rows, by rename--> PATH; then PATH.part is removed

The batches do not depend on the number of ranks, nor on what has been computed. So the results are those of an
uninterrupted command on any ranks. The first line of PATH.part identifies the command; results of another are an error.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.files import fsync_folder, json_line, open_atomically
from pmlm_dist.parallel.groups import Topology, run_on_all_ranks
from pmlm_dist.parallel.lease import lease

T = TypeVar("T")

_FSYNC_S = 10.0
_BYTES_PER_ROW = 32
"""Fewest bytes of a line of any result."""


class ResultsFile:
    """Results of numbered batches for the file `path`; one process opens, appends and finishes it.

    `identity`: JSON values of all that determines the results. `option`: the setting that names the file, for messages.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, batches: Sequence[Sequence[int]], option: str):
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.done: dict[int, list[Any]] = {}
        """Results by the number of their batch."""
        self._header, self._batches, self._name = {"results of": identity}, batches, f"{option}: {path}"
        self._synced_at, self.is_finished = time.monotonic(), False
        self._file: Any = None
        self.is_written = False

    def open(self) -> None:
        """Read the results that an interrupted command left, and prove that the file can be written.

        Raises `ConfigError` if the file exists, cannot be written, or has results of another command beside it.
        """
        try:
            length = self._read_part() if self.part.exists() else 0
            # With all batches the file is this command's: it was ended before it removed the part.
            self.is_written = self.path.exists()
            if self.is_written and len(self.done) < len(self._batches):
                raise ConfigError([f"{self._name} exists already, and nothing is overwritten: name another"])
            missing = _BYTES_PER_ROW * sum(map(len, self._batches)) - shutil.disk_usage(self.path.parent).free
            raise_if_any([f"{self._name} cannot be written: {missing:,} bytes more are needed"] if missing > 0 else [])
            self._file = self.part.open("r+b" if length else "wb")
            self._file.truncate(length)
            self._file.seek(length)
            if not length:
                self._file.write(json_line(self._header))
            self._sync()  # a full disk is reported here, not after hours
            fsync_folder(self.path.parent)
        except OSError as error:
            if self._file is not None:
                self.close()
            raise ConfigError([f"{self._name} cannot be written: {error}; name another"]) from error

    def append(self, number: int, results: list[Any]) -> None:
        """Keep the results of a batch: in the file at once, on the disk every few seconds. Raises `ConfigError`."""
        try:
            self._file.write(json_line([number, results]))
            self._file.flush()
            if time.monotonic() - self._synced_at > _FSYNC_S:
                self._sync()
        except OSError as error:
            raise self._not_written(error) from error
        self.done[number] = results

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write `path` from all results; `remove_part` follows. Raises `ConfigError`."""
        try:
            with open_atomically(self.path, replace=self.is_written) as out:
                out.writelines(map(json_line, lines))
        except OSError as error:
            raise self._not_written(error) from error

    def finish(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write `path` and remove the part."""
        self.write(lines)
        self.remove_part()

    def remove_part(self) -> None:
        """Remove the part, once all files of the command have been written."""
        self.part.unlink()
        self.is_finished = True

    def close(self) -> None:
        """Close the part; print what it has if the command has not finished, remove it if it has nothing."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self.is_finished:
            return
        if self.done:
            print_safely(
                f"{self.part} has {self._progress()}: the same command computes the others, on any number of ranks",
                to_stderr=True,
            )
        else:
            self.part.unlink(missing_ok=True)

    def _progress(self) -> str:
        rows = [sum(len(self._batches[number]) for number in numbers) for numbers in (self.done, self._all)]
        return f"{rows[0]:,} of {rows[1]:,} results"

    @property
    def _all(self) -> range:
        return range(len(self._batches))

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def _not_written(self, error: OSError) -> ConfigError:
        return ConfigError([f"{self._name} cannot be written: {error}; {self.part} has {self._progress()}: make room"])

    def _read_part(self) -> int:
        """Read the results of an earlier command; returns the bytes of its complete lines. Raises `ConfigError`."""
        first, *others = self.part.read_bytes().split(b"\n")
        own = json_line(self._header)[:-1]
        if not others and own.startswith(first):  # ended while it wrote the first line
            return 0
        length, results = len(first) + 1, {}
        for line in others[:-1]:  # behind the last line end is nothing, or what a killed command was writing
            entry = _parse(line)
            if not (isinstance(entry, list) and len(entry) == 2 and self._fits(*entry)):
                break
            results[entry[0]], length = entry[1], length + len(line) + 1
        if not _is_header(first):
            raise ConfigError([f"{self.part} was not written by this program: move it, or name another output"])
        if first != own and others[:-1]:  # also results that fit none of this command's batches
            raise ConfigError(self._differences(_parse(first)))
        self.done = results
        return length if first == own else 0

    def _fits(self, number: Any, results: Any) -> bool:
        is_number = type(number) is int and number in self._all
        return is_number and isinstance(results, list) and len(results) == len(self._batches[number])

    def _differences(self, header: Any) -> list[str]:
        now = self._header["results of"]
        before = header.get("results of", {}) if isinstance(header, dict) else {}
        names = [name for name in now if before.get(name) != json.loads(json_line(now[name]))]
        return [
            f"{self.part} has results of another command, which differs in {', '.join(names)}: "
            "start that one again, remove the file, or name another output"
        ]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_header(line: bytes) -> bool:
    header = _parse(line)
    return isinstance(header, dict) and header.keys() == {"results of"}


@contextlib.contextmanager
def open_results(
    topology: Topology, path: Path | None, build: Callable[[], ResultsFile]
) -> Iterator[ResultsFile | None]:
    """Hold the lock of `path`; yield the opened file that `build` returns on rank 0, None on other ranks.

    Without `path` yield None. Every rank must call. Raises `FolderInUse` while another process writes the file.
    """
    if path is None:
        yield None
        return

    def open_file() -> ResultsFile | None:
        if not topology.is_rank_zero:
            return None
        file = build()
        file.open()
        return file

    with lease(path, topology, beside=True):
        file = run_on_all_ranks(topology, open_file)
        if file is None:
            yield None
            return
        try:
            if file.done:
                print_safely(f"resuming: {file._progress()} are in {file.part}", to_stderr=True)
            yield file
        finally:
            file.close()


def compute_batches(
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], list[Any]],
    topology: Topology,
    *,
    file: ResultsFile | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Return the result of every item, in the order of the items, on every rank.

    `batches`: disjoint lists of items 0 .. n - 1. `compute` returns one JSON value for each item of a batch; every rank
    calls it equally often, tensor-parallel peers with the same batch. `file`: rank 0's, which gets what is computed.
    Raises `ConfigError` on all ranks if `compute` raises it on one.
    """
    done, is_kept = topology.broadcast_object((file.done, True) if file else ({}, False))
    remaining = [number for number in range(len(batches)) if number not in done]
    for start in range(0, len(remaining), topology.dp):
        before_batch()
        numbers = remaining[start : start + topology.dp]
        # A rank that has no batch of its own repeats one: `compute` may be collective.
        number = numbers[min(topology.dp_rank, len(numbers) - 1)]
        results, problems = None, []
        try:
            results = compute(batches[number])
        except ConfigError as error:
            problems = error.problems
        per_rank = topology.all_gather_object((number, results, problems))[:: topology.tp]
        raise_if_any(list(dict.fromkeys(problem for _, _, of_rank in per_rank for problem in of_rank)))
        # Reversed: for a repeated batch, the results of the lowest rank count.
        new = {number: results for number, results, _ in reversed(per_rank)}
        if is_kept:
            run_on_all_ranks(topology, lambda new=new: [file.append(n, new[n]) for n in sorted(new)] if file else None)
        done = {**done, **new}
    results = {item: result for n, batch in enumerate(batches) for item, result in zip(batch, done[n], strict=True)}
    return [results[item] for item in range(len(results))]


def digest_of(rows: Iterable[Any]) -> str:
    """Return the sha256 of `rows`."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
