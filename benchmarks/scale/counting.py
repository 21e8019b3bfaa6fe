"""Counts of file operations and collectives of the functions that a run calls."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmlm_dist.checkpoint import files

_AUDITED = {
    "open": "opens",
    "os.listdir": "lists",
    "os.scandir": "lists",
    **dict.fromkeys(("os.rename", "os.remove", "os.mkdir", "os.rmdir"), "changes"),
}


class FileOperations:
    """Operations below `folder` by kind, of one thread or of all; Python audits all of them but `stat`."""

    def __init__(self, folder: Path):
        self._folder, self._counts = str(folder), Counter[tuple[int, str]]()
        self._is_active, self._started, self.seconds = False, 0.0, 0.0
        sys.addaudithook(self._audit)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count within the block."""
        stat, lstat, safe_open = os.stat, os.lstat, files.safe_open

        def recorded(operation: Any, kind: str) -> Any:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                self._record(kind, path)
                return operation(path, *args, **kwargs)

            return call

        with (
            mock.patch.object(os, "stat", recorded(stat, "stats")),
            mock.patch.object(os, "lstat", recorded(lstat, "stats")),
            mock.patch.object(files, "safe_open", recorded(safe_open, "opens")),
        ):
            self._is_active, self._started = True, time.perf_counter()
            yield
        self._is_active, self.seconds = False, time.perf_counter() - self._started

    def row(self, thread: int | None = None) -> dict[str, float]:
        """Counts by kind, of `thread` alone or of all."""
        kinds = dict.fromkeys(("stats", *_AUDITED.values()), 0.0)
        for (ident, kind), count in self._counts.items():
            if thread in (None, ident):
                kinds[kind] += count
        return kinds

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._is_active and event in _AUDITED:
            self._record(_AUDITED[event], args[0])

    def _record(self, kind: str, path: Any) -> None:
        # Descriptors and names relative to them are those of `rmtree`; imports have absolute paths elsewhere.
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if self._is_active and (not os.path.isabs(name) or name.startswith(self._folder)):
            self._counts[threading.get_ident(), kind] += 1


class Collectives(TorchDispatchMode):
    """Collectives and their bytes by step. Those of integers are decisions on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.count, self.host, self.bytes = Counter[int](), Counter[int](), Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.count[self.step] += 1
            self.bytes[self.step] += max((t.numel() * t.element_size() for t in tensors), default=0)
            self.host[self.step] += all(not tensor.is_floating_point() for tensor in tensors)
        return func(*args, **(kwargs or {}))
