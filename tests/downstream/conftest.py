"""Fixtures for the tests of fine-tuning; treat them as read-only."""

from pathlib import Path

import pytest
from support.small_tasks import write_model, write_text_task


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "weights")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_task(tmp_path_factory.mktemp("data"))
