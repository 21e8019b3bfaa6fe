"""The cache of compiled functions: without a writable home, in a temporary folder that only this user can write to."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba.core import caching, config

from pmlm_dist.masking.machine_code import compiled


def double(number):
    return 2 * number


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of temporary files; neither the folder of the module nor the home can be written to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/none")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    config.reload_config()
    yield tmp_path
    monkeypatch.undo()
    config.reload_config()


def test_cache_without_a_writable_home_is_in_a_temporary_folder(temporary: Path):
    assert compiled(double)(3) == 6
    folder = temporary / f"pmlm_dist-numba-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbi"))
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)  # for the workers


@pytest.mark.parametrize("kind", ["writable by others", "link", "file"])
def test_machine_code_is_not_read_from_a_folder_of_others(temporary: Path, kind: str):
    folder = temporary / f"pmlm_dist-numba-{os.getuid()}"
    if kind == "file":
        folder.touch()
    else:
        (target := temporary / "target" if kind == "link" else folder).mkdir()
        target.chmod(0o777)
        if kind == "link":
            folder.symlink_to(target)
    assert compiled(double)(3) == 6
    assert not list(temporary.rglob("*.nbi"))


def test_machine_code_is_kept_in_memory_without_any_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    assert compiled(double)(4) == 8
