"""Fixtures for all tests: the environment of a rank, a small corpus."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # `make test-gpu` says cuda
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from support.corpora import write_corpus
from support.worlds import warm_fork_server

warm_fork_server()
hypothesis.settings.register_profile("busy machine", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("busy machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where this session computes on the CPU of a machine with one."""
    import torch

    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device here"
    elif os.environ["DS_ACCELERATOR"] != "cuda":
        reason = "this session computes on the CPU; `make test-gpu` runs the tests that need a GPU"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training samples in 8 shards, 12 validation samples, sequence length 32, 125 tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
