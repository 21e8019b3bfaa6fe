"""An uninterrupted run, the reference of all tests of this folder."""

from pathlib import Path

import pytest
from support.fault_jobs import uninterrupted_run

from pmlm_dist.config import RunConfig


@pytest.fixture(scope="session")
def uninterrupted(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on two ranks without any fault."""
    return uninterrupted_run(small_corpus, tmp_path_factory.mktemp("uninterrupted") / "run")
