"""Folders that others use: foreign files are kept, one preparation at a time, all ranks in one file system."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.preparations import command, config, content, write_source

from pmlm_dist import folder_lock
from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.prepare.mpi import singleton_problems
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.prepare.sorted_runs import RunPacker
from pmlm_dist.folder_lock import LOCK, FolderInUse, FolderLock, LockOwner
from pmlm_dist.launch_environment import launched_ranks

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


def test_unreadable_journal_is_one_message(source: Path, tmp_path: Path):
    journal = tmp_path / "out" / ".journal"
    journal.mkdir(parents=True)
    (journal / "outputs.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"outputs.json is not JSON \(its lists and objects are nested"):
        prepare_corpus(config(source, tmp_path / "out"))


@pytest.mark.fault("F43")
@pytest.mark.parametrize(
    "name",
    [
        *("images/shard-000000.tar", "train/shard-000000.tar", "vocab.txt", "unit_samples.npy", "python-docs.jsonl"),
        *("manifest.json.tmp-mine", ".journal/identity.json", ".journal/scan/notes.txt"),
    ],
)
def test_folder_with_foreign_files_raises_and_keeps_them(source: Path, tmp_path: Path, name: str):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"out holds \S+, which no preparation has written: give another --output"):
        prepare_corpus(config(source, tmp_path / "out"))
    assert content(tmp_path / "out") == {name: b"{}"}


@pytest.mark.fault("F43")
def test_foreign_files_that_appear_during_a_preparation_are_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One with the name of a shard is an error, others stay beside the corpus; also after unusable settings."""
    wanted, commit = config(source, tmp_path / "out"), RunPacker.commit
    foreign = [wanted.output / name for name in ("train/shard-000000.tar", "images/shard-000000.tar", "train/a.tmp-b")]

    def commit_after_others(self: RunPacker) -> None:
        for file in foreign:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"foreign")
        commit(self)

    monkeypatch.setattr(RunPacker, "commit", commit_after_others)
    with pytest.raises(ConfigError, match=r"exceeds the"):
        prepare_corpus(replace(wanted, shards=100_000))
    assert content(wanted.output) == {str(file.relative_to(wanted.output)): b"foreign" for file in foreign}
    for file in foreign:
        file.unlink()
        file.parent.rmdir() if not any(file.parent.iterdir()) else None
    with pytest.raises(ConfigError, match=r"holds train/shard-000000\.tar, which no preparation has written"):
        prepare_corpus(wanted)
    assert foreign[0].read_bytes() == b"foreign"
    foreign[0].unlink()
    monkeypatch.setattr(RunPacker, "commit", commit)
    prepare_corpus(wanted)
    assert foreign[0].stat().st_size > 100
    assert [file.read_bytes() for file in foreign[1:]] == [b"foreign"] * 2


@pytest.mark.fault("F44")
def test_second_preparation_in_a_folder_raises_and_changes_nothing(source: Path, tmp_path: Path):
    wanted = config(source, tmp_path / "out")
    wanted.output.mkdir()
    owner = replace(LockOwner.current({}), pid=os.getppid(), started=folder_lock._start_ticks(os.getppid()) or 0)
    (wanted.output / LOCK).write_text(json.dumps(asdict(owner)))
    before = content(wanted.output)
    with pytest.raises(FolderInUse, match=rf"out is in use by process {owner.pid}"):
        prepare_corpus(wanted)
    assert content(wanted.output) == before


@pytest.mark.fault("F44")
def test_preparation_that_lost_its_folder_writes_no_manifest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wanted, commit = config(source, tmp_path / "out"), RunPacker.commit

    def commit_after_takeover(self: RunPacker) -> None:
        (wanted.output / LOCK).write_text(json.dumps(asdict(replace(LockOwner.current({}), attempt="newer"))))
        commit(self)

    monkeypatch.setattr(RunPacker, "commit", commit_after_takeover)
    with pytest.raises(folder_lock.Superseded):
        prepare_corpus(wanted)
    assert not (wanted.output / "manifest.json").exists()
    assert not (wanted.output / "train").exists()


@pytest.mark.fault("F44")
def test_task_of_a_step_that_mpi_does_not_connect_raises_before_any_write(source: Path, tmp_path: Path):
    wanted = config(source, tmp_path / "out")
    arguments = command(wanted, ranks=1)
    alone = arguments[arguments.index(sys.executable) :]
    environ = {**os.environ, **STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environ.pop(name, None)  # of a test before
    done = subprocess.run(alone, capture_output=True, text=True, timeout=60, check=False, env=environ)
    assert done.returncode == 2
    assert "2 tasks were started, but MPI does not connect them" in done.stderr
    assert "`mpirun -n 2 pmlm prepare-corpus ...` or `srun --mpi=pmix`" in done.stderr
    assert not wanted.output.exists()


@pytest.mark.parametrize(
    ("environ", "launched"),
    [
        ({}, 1),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "3"}, 3),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, 1),
        ({**STEP, "SLURM_NTASKS": "4"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1),  # sbatch without srun
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2),  # torchrun
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, 1),
    ],
)
def test_world_of_one_rank_is_a_problem_if_several_were_launched(environ: dict[str, str], launched: int):
    assert launched_ranks(environ) == launched
    assert bool(singleton_problems(1, launched=launched)) == (launched > 1)
    assert singleton_problems(launched + 1, launched=launched) == []


@pytest.mark.distributed
def test_ranks_without_a_common_file_system_raise_before_any_work(source: Path, tmp_path: Path):
    """A folder of its own for each rank, as on the disks of two nodes."""
    launcher = command(config(source, Path("out")), ranks=1)
    program = launcher[launcher.index(sys.executable) :]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ranks = [["-n", "1", "-wdir", str(tmp_path / name), *program] for name in ("a", "b")]
    launched = [*launcher[: launcher.index("-n")], *ranks[0], ":", *ranks[1]]
    done = subprocess.run(launched, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("--output: rank 1 does not see in out what rank 0 writes there") == 1
    assert not (tmp_path / "a/out/manifest.json").exists()
    with FolderLock.acquire(tmp_path / "a/out"):
        pass
