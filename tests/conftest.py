"""Fixtures for all tests: the environment of a rank, a small corpus; which tests are quick, and their order."""

import os
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # `make test-gpu` says cuda
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels of attention run on a CPU

import hypothesis
import pytest
from support.corpora import write_corpus
from support.worlds import warm_fork_server

warm_fork_server()
# Neither profile has a deadline: no test asserts a time.
hypothesis.settings.register_profile("thorough", deadline=None)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "thorough"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a `serial` test in the second half of `make test`: importing all files takes longer."""
    is_second_half = config.option.markexpr.endswith("and serial")
    if is_second_half and collection_path.match("test_*.py") and "mark.serial" not in collection_path.read_text():
        return True
    return None


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make test-quick` leaves out and what this machine cannot run; start the longest files first."""
    mark_further_cases(items)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if gpu_tests else None
    for item in gpu_tests if reason else ():
        item.add_marker(pytest.mark.skip(reason=str(reason)))
    if hasattr(config, "workerinput"):  # of pytest-xdist
        in_file = Counter(item.path for item in items if item.get_closest_marker("distributed"))
        items.sort(key=lambda item: -in_file[item.path])  # a worker that starts the longest file last ends alone


def mark_further_cases(items: list[pytest.Item]) -> None:
    """Mark all cases but the middle one of each test that starts several processes as `full`.

    Lists of cases begin with one rank and end with most: the middle one is small and distributed.
    """
    cases: dict[tuple[Path, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("distributed"):
            cases[item.path, getattr(item, "originalname", item.name)].append(item)
    for of_test in cases.values():
        for item in of_test[: len(of_test) // 2] + of_test[len(of_test) // 2 + 1 :]:
            item.add_marker(pytest.mark.full)


def why_no_gpu() -> str | None:
    """Return why tests that need a GPU cannot run in this session."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if os.environ["DS_ACCELERATOR"] != "cuda":
        return "this session computes on the CPU; `make test-gpu` runs the tests that need a GPU"
    return None


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training samples in 8 shards, 12 validation samples, sequence length 32, 125 tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
