"""Fixtures for the tests of commands; treat them as read-only."""

from pathlib import Path

import pytest
from support.small_tasks import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    return write_model(tmp_path_factory.mktemp("model") / "weights")
