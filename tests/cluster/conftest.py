"""A SLURM cluster for all tests of this folder, and an uninterrupted run on it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm_cluster import Cluster, missing_programs, running
from support.small_runs import write_engine_config
from support.submissions import Submission


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder as `cluster` tests; skip them where SLURM is not installed."""
    missing = missing_programs()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if missing:
                reason = f"{', '.join(missing)} not found: `make test-cluster` installs SLURM"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes and a spare one, in a folder that munge's user can access."""
    folder = Path(tempfile.mkdtemp(prefix="pmlm-slurm-"))
    folder.chmod(0o755)
    try:
        with running(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def end_jobs(cluster: Cluster) -> Iterator[None]:
    """End the jobs of a failed test before the next one."""
    yield
    cluster.end_all_jobs()


@pytest.fixture(scope="session")
def submit(cluster: Cluster, small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    engine = write_engine_config(tmp_path_factory.mktemp("engine") / "ds.json", micro_batch=2)
    return Submission(cluster, small_corpus, engine)


@pytest.fixture(scope="session")
def uninterrupted(submit: Submission, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run over two nodes."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = submit.pretrain(run_dir)
    assert job.wait_for_end() == "COMPLETED", job.printed()
    assert job.restarts() == 0
    return run_dir
