"""Object stores for tests: fsspec's memory file system under the protocol of another."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

from fsspec.implementations.memory import MemoryFileSystem


@contextmanager
def object_store(scheme: str) -> Iterator[Any]:
    """An empty store that fsspec finds at SCHEME:// while inside, in place of the one that would need a package."""

    class Store(MemoryFileSystem):
        protocol = scheme
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{scheme}://"))

        def unstrip_protocol(self, name):
            return f"{scheme}://{name.lstrip('/')}"

    known = importlib.import_module("fsspec.registry")  # the package has a mapping of that name
    with patch.dict(known._registry, {scheme: Store}):
        yield Store()
