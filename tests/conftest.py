"""Fixtures for all tests: the environment of a rank, a small corpus."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("PMLM_TEST_GPU") else "cuda")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from corpora import write_corpus
from worlds import start_server

start_server()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training samples in 8 shards, 12 validation samples, sequence length 32, 125 tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
