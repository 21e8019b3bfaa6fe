"""Object stores for tests: the memory file system of fsspec under another protocol."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

from fsspec.implementations.memory import MemoryFileSystem


@contextmanager
def object_store(scheme: str) -> Iterator[Any]:
    """An empty store at SCHEME:// inside the block, in place of the file system that needs another package."""

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

    registry = importlib.import_module("fsspec.registry")  # the package has a mapping of that name
    with patch.dict(registry._registry, {scheme: Store}):
        yield Store()
