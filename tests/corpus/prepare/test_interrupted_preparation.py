"""A preparation that is killed, stopped or refused: nothing half is taken for whole, nothing finished is done again."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.preparations import command, config, content, texts, write_source

from pmlm_dist.config import ConfigError
from pmlm_dist.corpus.packing.sorted_runs import RunPacker
from pmlm_dist.corpus.prepare import pipeline
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.prepare.scan import Scan
from pmlm_dist.vocab import Vocabulary

DIES = """
import os, signal, sys
from pmlm_dist import cli
from pmlm_dist.corpus.packing import sorted_runs
from pmlm_dist.corpus.prepare import pipeline

add = sorted_runs.Packing.add


def add_or_die(self, unit):
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, unit)


sorted_runs.Packing.add = add_or_die
pipeline.BUFFER_BYTES = 1  # every unit is finished by itself
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


@pytest.mark.distributed
def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(source: Path, corpus: Path, tmp_path: Path):
    """SIGKILL in unit 5, which rank 1 of 2 packs; three ranks end it, and write the bytes of a run by one."""
    program, wanted = tmp_path / "dies.py", config(source, tmp_path / "corpus")
    program.write_text(DIES)
    killed = command(wanted, ranks=2, program=(str(program),))
    assert subprocess.run(killed, capture_output=True, timeout=120, check=False).returncode != 0
    assert not (wanted.output / "manifest.json").exists()
    scanned = {path: path.stat().st_mtime_ns for path in (wanted.output / ".unfinished/scan").iterdir()}
    packed = {path: path.read_bytes() for path in (wanted.output / ".unfinished/runs").glob("*.json")}
    assert len(scanned) > 12
    assert packed
    again = subprocess.run(command(wanted, ranks=3), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert f"are scanned and {len(packed)} packed; 0 shards are written" in again.stdout
    assert content(wanted.output) == content(corpus)


@pytest.mark.parametrize("where", ["scan", "pack", "write"])
def test_what_is_finished_is_not_done_again(
    source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """Interrupted at the third piece of work of a phase; the next run does what is missing, no more."""
    owner, name = {"scan": (Scan, "_scan_unit"), "pack": (RunPacker, "add"), "write": (pipeline, "write_shard")}[where]
    work: Callable = getattr(owner, name)
    calls: list[int] = []

    def counted(*given, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*given, **more)

    monkeypatch.setattr(pipeline, "BUFFER_BYTES", 1)
    monkeypatch.setattr(owner, name, counted)
    wanted = config(source, tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(wanted)
    assert not (wanted.output / "manifest.json").exists()
    prepare_corpus(wanted)
    assert content(wanted.output) == content(corpus)
    in_all = len(calls) - 1
    fresh = config(source, tmp_path / "fresh")
    calls[:] = [0] * 3
    prepare_corpus(fresh)
    assert in_all == len(calls) - 3


def test_a_run_that_ended_right_after_its_manifest_leaves_nothing_for_long(source: Path, corpus: Path, tmp_path: Path):
    wanted = config(source, tmp_path / "corpus")
    prepare_corpus(wanted)
    (wanted.output / ".unfinished/scan").mkdir(parents=True)
    prepare_corpus(wanted)
    assert content(wanted.output) == content(corpus)
    assert not (wanted.output / ".unfinished").exists()


@pytest.fixture
def unfinished(source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an unfinished corpus in the vocabulary of `corpus`, of a source of its own."""
    (tmp_path / "source").mkdir()
    for path in source.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())

    def interrupted(*given, **more):
        raise KeyboardInterrupt

    finish = RunPacker.finish
    monkeypatch.setattr(RunPacker, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config(tmp_path / "source", tmp_path / "out", vocabulary=corpus, vocabulary_size=None))
    monkeypatch.setattr(RunPacker, "finish", finish)
    return tmp_path


def test_another_vocabulary_is_refused_between_runs_and_after(unfinished: Path, corpus: Path):
    other = unfinished / "vocabulary"
    Vocabulary.train(texts(50), 120).save(other)
    wanted = config(unfinished / "source", unfinished / "out", vocabulary=other, vocabulary_size=None)
    with pytest.raises(ConfigError, match=r"\.unfinished holds an unfinished corpus with vocabulary_fingerprint '"):
        prepare_corpus(wanted)
    same = config(unfinished / "source", unfinished / "out", vocabulary=corpus, vocabulary_size=None)
    prepare_corpus(same)
    with pytest.raises(ConfigError, match=r"holds a corpus with vocabulary_fingerprint '.*remove the folder"):
        prepare_corpus(wanted)


def test_changed_input_is_refused_between_runs(unfinished: Path, corpus: Path):
    """Also where only the time of a file tells."""
    wanted = config(unfinished / "source", unfinished / "out", vocabulary=corpus, vocabulary_size=None)
    (unfinished / "source/d.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"other input: 1 files changed since, .*d\.txt for one: remove the folder"):
        prepare_corpus(wanted)
    (unfinished / "source/b.txt").write_text("something else")
    with pytest.raises(ConfigError, match="unfinished corpus with input_files"):
        prepare_corpus(wanted)


def test_settings_that_turn_out_to_be_wrong_can_be_mended(source: Path, corpus: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="exceeds the"):
        prepare_corpus(config(source, tmp_path / "corpus", shards=100_000))
    with pytest.raises(ConfigError, match=r"vocabulary_size .*use more"):
        prepare_corpus(config(source, tmp_path / "corpus", vocabulary_size=20))
    prepare_corpus(config(source, tmp_path / "corpus"))
    assert content(tmp_path / "corpus") == content(corpus)
