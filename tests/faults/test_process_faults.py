"""Ranks that die, hang, fall behind or disagree: found, named, ended, and started again as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Fault, check_recovered, kill, live_on, small_run, stop, straight_run

from pmlm_dist.config import RunConfig
from pmlm_dist.training.exit_codes import ExitCode


@pytest.fixture(scope="session")
def straight(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that nothing happens to."""
    return straight_run(small_corpus, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.fault("F01")
def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(kill))
    assert first.codes == [137, 137], first.printed
    assert "rank 1 was ended by SIGKILL, in step 7" in first.printed
    assert second.codes == [0, 0]
    assert check_recovered(config, straight) <= 5


@pytest.mark.fault("F03")
def test_a_rank_that_stands_still_is_found_and_named(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    first, second = live_on(config, Fault(stop))
    print(first)
    assert first.codes == [ExitCode.HUNG] * 2
    assert "furthest behind: rank 1" in first.printed
    assert second.codes == [0, 0]
    check_recovered(config, straight)
