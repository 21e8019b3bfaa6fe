"""Corpora that a program writes, where that is allowed, and corpora at the addresses of object stores."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from support.numbered_corpus import SHARD_SIZES, tokens_of, write_corpus
from support.object_store import object_store

from pmlm_dist.config import ConfigError, DataConfig
from pmlm_dist.corpus.shards import TRAIN, ShardError
from pmlm_dist.data import remote_files
from pmlm_dist.data.remote_files import address_of
from pmlm_dist.data.stream import CorpusSource, ShardAccess, SplitReader

PROGRAM = """
import os, pathlib, shutil, subprocess, sys, time
folder, name = pathlib.Path(__file__).parent, sys.argv[1]
assert not sys.stdin.read()
with (folder / "calls").open("a") as calls:
    print(sys.argv[1:], file=calls)
content = (folder / "corpus" / name).read_bytes()
faults = folder / "faults"
fault = faults.read_text() if faults.exists() and name.endswith(".tar") else ""
if fault in ("status", "silent"):
    print("half of it" * 200 + " the disk is on fire", file=sys.stderr)
    if fault == "silent":
        sys.exit(3)
    content = content[: len(content) // 2]
if fault == "flip":
    content = bytes([content[0] ^ 1]) + content[1:]
if fault == "endless":
    while True:
        sys.stdout.buffer.write(content)
if fault == "late":
    sys.stdout.buffer.write(content)
sys.stdout.buffer.write(content if fault != "late" else b"")
sys.stdout.buffer.flush()
if fault == "stuck":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    time.sleep(60)
sys.exit(7 if fault in ("status", "late") else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that writes a file of a corpus; `faults` beside it tells what it does wrong with shards."""
    folder = write_corpus(tmp_path / "corpus", dict(SHARD_SIZES))
    (folder / "tokenizer.json").write_text("{}")
    path = tmp_path / "give.py"
    path.write_text(PROGRAM)
    return path


def address(program: Path) -> str:
    return f"pipe:{sys.executable} {program} {{}}"


def settings(tmp_path: Path, **changes) -> DataConfig:
    defaults = {"cache": str(tmp_path / "cache"), "retries": 1, "retry_wait_s": 0.0, "transfer_timeout_s": 20.0}
    return DataConfig(**{**defaults, "allow_pipe": True, **changes})


def reader(corpus: Path | str, data: DataConfig) -> SplitReader:
    return SplitReader(CorpusSource.at(corpus, data), split=TRAIN, access=ShardAccess.of(data))


def calls(program: Path) -> list[str]:
    path = program.with_name("calls")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.fault("F62")
def test_a_program_is_refused_unless_it_is_allowed(program, tmp_path):
    for corpus in (address(program), Path(address(program))):
        with pytest.raises(ConfigError, match=r"commands are never run .* --data\.allow-pipe"):
            CorpusSource.at(corpus, settings(tmp_path, allow_pipe=False))
    assert not DataConfig().allow_pipe
    assert not calls(program)


def test_an_allowed_program_gives_each_file_once_through_the_cache(program, tmp_path):
    data = settings(tmp_path)
    for _ in range(2):
        numbered = reader(Path(address(program)), data)
        for i in range(38):
            assert numbered.numbered(i).tokens.tolist() == tokens_of(TRAIN, i).tolist()
    shards = [call for call in calls(program) if ".tar" in call]
    assert sorted(shards) == [f"['{shard.name}']" for shard in numbered.shards]


@pytest.mark.fault("F62")
def test_nothing_of_an_address_reaches_a_shell(program, tmp_path):
    witness = tmp_path / "witness"
    hostile = f"{address(program)} '; touch {witness}' $(touch {witness}) `touch {witness}` | touch {witness} && x"
    reader(hostile, settings(tmp_path)).numbered(0)
    assert not witness.exists()
    assert "'$(touch'" in calls(program)[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status", "ended with status 7: .*on fire"),
        ("late", "ended with status 7"),  # after every byte
        ("silent", "ended with status 3: .*on fire"),
        ("flip", "expected sha256"),
        ("endless", "got more than"),
    ],
)
def test_a_program_that_fails_is_tried_again_and_told(program, tmp_path, fault, message):
    numbered = reader(address(program), settings(tmp_path))
    program.with_name("faults").write_text(fault)
    with pytest.raises(ShardError, match=message) as caught:
        numbered.numbered(0)
    assert caught.value.shard == numbered.shards[0]
    assert len([call for call in calls(program) if ".tar" in call]) == 2
    assert not list((tmp_path / "cache").glob("*.part"))
    assert not list((tmp_path / "cache").glob("*.tar"))
    program.with_name("faults").unlink()
    assert numbered.numbered(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()


def test_a_program_that_is_stuck_is_killed_with_its_children(program, tmp_path):
    numbered = reader(address(program), settings(tmp_path))
    program.with_name("faults").write_text("stuck")
    began = time.monotonic()
    impatient = settings(tmp_path, retries=0, transfer_timeout_s=3.0)
    numbered = SplitReader(
        CorpusSource(tmp_path / "corpus", address(program)), split=TRAIN, access=ShardAccess.of(impatient)
    )
    with pytest.raises(ShardError, match="no byte for 3 s"):
        numbered.numbered(0)
    assert time.monotonic() - began < 30
    child = Path("/proc", program.with_name("child").read_text(), "stat")
    for _ in range(200):  # a killed orphan is gone, or waits for its new parent
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the child lives on")


def test_what_cannot_be_a_program_is_refused_or_named(tmp_path):
    for corpus, message in (
        ("pipe:", "must name a program"),
        ("pipe:cat corpus", r"with \{\} where the file's name goes"),
        ("pipe:{} x", "must name a program"),
        ("pipe:cat '{}", "cannot be split into arguments"),
        (f"pipe:{tmp_path}/nowhere {{}}", "FileNotFoundError"),
        ("pipe:false {}", "ended with status 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorpusSource.at(corpus, settings(tmp_path))


def test_a_small_file_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "LARGEST_SMALL_FILE", 1 << 20)
    with pytest.raises(ConfigError, match=f"has more than {1 << 20} bytes"):
        CorpusSource.at("pipe:yes {}", settings(tmp_path))


def test_addresses_in_a_program_survive_a_path():
    command = "pipe:aws s3 cp s3://bucket/corpus/{} -"
    assert address_of(Path(command), allow_pipe=True) == address_of(command, allow_pipe=True) == command


# ------------------------------------------------------------------------------------------------------- object stores


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_shards_of_an_object_store_are_asked_for_by_its_protocol(program, tmp_path, scheme):
    with object_store(scheme) as store:
        store.put(str(program.parent / "corpus"), "/bucket/corpus", recursive=True)
        numbered = reader(Path(f"{scheme}://bucket/corpus"), settings(tmp_path, allow_pipe=False))
        found = [numbered.numbered(i).tokens.tolist() for i in range(38)]
        assert found == [tokens_of(TRAIN, i).tolist() for i in range(38)]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_of_an_object_store_is_named(tmp_path, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{scheme}:// needs more: pip install 'pmlm_dist\[{scheme}\]'"):
        CorpusSource.at(f"{scheme}://bucket/corpus", settings(tmp_path))


def test_programs_leave_no_descriptors_behind(program, tmp_path):
    numbered = reader(address(program), settings(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    program.with_name("faults").write_text("endless")
    with pytest.raises(ShardError):
        numbered.numbered(0)
    assert len(os.listdir("/proc/self/fd")) == before
