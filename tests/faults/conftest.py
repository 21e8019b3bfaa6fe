"""One run for all tests of this folder that nothing happens to."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fault_jobs import straight_run

from pmlm_dist.config import RunConfig


@pytest.fixture(scope="session")
def straight(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on two ranks that nothing happens to."""
    return straight_run(small_corpus, tmp_path_factory.mktemp("straight") / "run")
