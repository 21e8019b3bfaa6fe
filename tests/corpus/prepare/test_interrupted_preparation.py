"""Interrupted preparations: incomplete work is not used, finished work is not repeated."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.preparations import command, config, content, texts, write_source

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.prepare import pipeline
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.prepare.scan import Scan
from pmlm_dist.corpus.prepare.sorted_runs import RunPacker
from pmlm_dist.vocabulary.vocabulary import Vocabulary

KILLED_IN_UNIT_5 = """
import os, signal, sys
from pmlm_dist import cli
from pmlm_dist.corpus.prepare import pipeline, sorted_runs

add = sorted_runs.RunPacker.add


def add_or_die(self, unit):
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, unit)


sorted_runs.RunPacker.add = add_or_die
pipeline.BUFFER_BYTES = 1  # every unit is committed separately
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def corpus(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    prepare_corpus(config(source, output))
    return output


@pytest.mark.full
@pytest.mark.distributed
def test_killed_preparation_resumes_with_another_number_of_ranks(source: Path, corpus: Path, tmp_path: Path):
    """SIGKILL of rank 1 of 2 in unit 5; three ranks resume, and write the bytes of one rank."""
    program, wanted = tmp_path / "killed.py", config(source, tmp_path / "corpus")
    program.write_text(KILLED_IN_UNIT_5)
    killed = command(wanted, ranks=2, program=(str(program),))
    assert subprocess.run(killed, capture_output=True, timeout=120, check=False).returncode != 0
    assert not (wanted.output / "manifest.json").exists()
    scanned = {path: path.stat().st_mtime_ns for path in (wanted.output / ".journal/scan").iterdir()}
    packed = {path: path.read_bytes() for path in (wanted.output / ".journal/runs").glob("*.json")}
    assert len(scanned) > 12
    assert packed
    again = subprocess.run(command(wanted, ranks=3), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"are scanned and {len(packed)} packed; 0 shards are written" in again.stdout
    assert content(wanted.output) == content(corpus)


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["scan", "pack", "write"])
def test_resume_does_not_repeat_finished_work(
    source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Interrupted in the third call of a phase; the next run makes the missing calls only."""
    owner, name = {"scan": (Scan, "_scan_unit"), "pack": (RunPacker, "add"), "write": (pipeline, "write_shard")}[where]
    work: Callable = getattr(owner, name)
    calls: list[int] = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*arguments, **options)

    monkeypatch.setattr(pipeline, "BUFFER_BYTES", 1)
    monkeypatch.setattr(owner, name, counted)
    wanted = config(source, tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(wanted)
    assert not (wanted.output / "manifest.json").exists()
    if where == "write":
        (wanted.output / "train/shard-000000.tar.tmp-0123abcd").write_bytes(b"incomplete")  # left by SIGKILL
    prepare_corpus(wanted)
    assert content(wanted.output) == content(corpus)
    total = len(calls) - 1
    fresh = config(source, tmp_path / "fresh")
    calls[:] = [0] * 3
    prepare_corpus(fresh)
    assert total == len(calls) - 3


def test_journal_left_after_the_manifest_is_removed(source: Path, corpus: Path, tmp_path: Path):
    wanted = config(source, tmp_path / "corpus")
    prepare_corpus(wanted)
    (wanted.output / ".journal/scan").mkdir(parents=True)
    prepare_corpus(wanted)
    assert content(wanted.output) == content(corpus)
    assert not (wanted.output / ".journal").exists()


@pytest.fixture
def unfinished(source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a copy of the source and an unfinished corpus with the vocabulary of `corpus`."""
    (tmp_path / "source").mkdir()
    for path in source.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    commit = RunPacker.commit
    monkeypatch.setattr(RunPacker, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config(tmp_path / "source", tmp_path / "out", vocabulary=corpus, vocabulary_size=None))
    monkeypatch.setattr(RunPacker, "commit", commit)
    return tmp_path


def test_another_vocabulary_raises_before_and_after_completion(unfinished: Path, corpus: Path):
    other = unfinished / "vocabulary"
    Vocabulary.train(texts(50), 120).save(other)
    wanted = config(unfinished / "source", unfinished / "out", vocabulary=other, vocabulary_size=None)
    with pytest.raises(ConfigError, match=r"\.journal holds an unfinished corpus with vocabulary_fingerprint '"):
        prepare_corpus(wanted)
    same = config(unfinished / "source", unfinished / "out", vocabulary=corpus, vocabulary_size=None)
    prepare_corpus(same)
    with pytest.raises(ConfigError, match=r"holds a corpus with vocabulary_fingerprint '.*remove the folder"):
        prepare_corpus(wanted)


def test_resume_with_changed_input_raises(unfinished: Path, corpus: Path):
    """Also if only the modification time of a file changed."""
    wanted = config(unfinished / "source", unfinished / "out", vocabulary=corpus, vocabulary_size=None)
    (unfinished / "source/d.txt").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"other input: 1 files changed since, .*d\.txt for example: remove the folder"
    ):
        prepare_corpus(wanted)
    (unfinished / "source/b.txt").write_text("something else")
    with pytest.raises(ConfigError, match="unfinished corpus with input_files"):
        prepare_corpus(wanted)


def test_unusable_settings_can_be_corrected(source: Path, corpus: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="exceeds the"):
        prepare_corpus(config(source, tmp_path / "corpus", shards=100_000))
    with pytest.raises(ConfigError, match=r"vocabulary_size .*use more"):
        prepare_corpus(config(source, tmp_path / "corpus", vocabulary_size=20))
    prepare_corpus(config(source, tmp_path / "corpus"))
    assert content(tmp_path / "corpus") == content(corpus)
