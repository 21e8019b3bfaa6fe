"""Corpora read from a program (data.allow_pipe), and corpora in object stores."""

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
from pmlm_dist.data.remote_files import parse_address
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
    """A program that writes a file of a corpus; the file `faults` beside it names its fault for shards."""
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
    return SplitReader(CorpusSource.open(corpus, data), split=TRAIN, access=ShardAccess.from_config(data))


def calls(program: Path) -> list[str]:
    path = program.with_name("calls")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.fault("F62")
def test_program_without_allow_pipe_raises(program, tmp_path):
    for corpus in (address(program), Path(address(program))):
        with pytest.raises(ConfigError, match=r"commands are never run .* --data\.allow-pipe"):
            CorpusSource.open(corpus, settings(tmp_path, allow_pipe=False))
    assert not DataConfig().allow_pipe
    assert not calls(program)


def test_allowed_program_is_run_once_per_file(program, tmp_path):
    data = settings(tmp_path)
    for _ in range(2):
        split = reader(Path(address(program)), data)
        for i in range(38):
            assert split.sample(i).tokens.tolist() == tokens_of(TRAIN, i).tolist()
    shards = [call for call in calls(program) if ".tar" in call]
    assert sorted(shards) == [f"['{shard.name}']" for shard in split.shards]


@pytest.mark.fault("F62")
def test_address_is_not_evaluated_by_a_shell(program, tmp_path):
    witness = tmp_path / "witness"
    hostile = f"{address(program)} '; touch {witness}' $(touch {witness}) `touch {witness}` | touch {witness} && x"
    reader(hostile, settings(tmp_path)).sample(0)
    assert not witness.exists()
    assert "'$(touch'" in calls(program)[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status", "exited with status 7: .*on fire"),
        ("late", "exited with status 7"),  # after every byte
        ("silent", "exited with status 3: .*on fire"),
        ("flip", "expected sha256"),
        ("endless", "received more than"),
    ],
)
def test_failing_program_is_retried_then_raises(program, tmp_path, fault, message):
    split = reader(address(program), settings(tmp_path))
    program.with_name("faults").write_text(fault)
    with pytest.raises(ShardError, match=message) as caught:
        split.sample(0)
    assert caught.value.shard == split.shards[0]
    assert len([call for call in calls(program) if ".tar" in call]) == 2
    assert not list((tmp_path / "cache").glob("*.part"))
    assert not list((tmp_path / "cache").glob("*.tar"))
    program.with_name("faults").unlink()
    assert split.sample(0).tokens.tolist() == tokens_of(TRAIN, 0).tolist()


def test_hanging_program_is_killed_with_its_children(program, tmp_path):
    reader(address(program), settings(tmp_path))
    program.with_name("faults").write_text("stuck")
    began = time.monotonic()
    impatient = settings(tmp_path, retries=0, transfer_timeout_s=3.0)
    split = SplitReader(
        CorpusSource(tmp_path / "corpus", address(program)), split=TRAIN, access=ShardAccess.from_config(impatient)
    )
    with pytest.raises(ShardError, match="no byte for 3 s"):
        split.sample(0)
    assert time.monotonic() - began < 30
    child = Path("/proc", program.with_name("child").read_text(), "stat")
    for _ in range(200):  # a killed orphan is gone, or a zombie until its new parent reaps it
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the child was not killed")


def test_invalid_program_raises(tmp_path):
    for corpus, message in (
        ("pipe:", "must name a program"),
        ("pipe:cat corpus", r"with \{\} for the name of the file"),
        ("pipe:{} x", "must name a program"),
        ("pipe:cat '{}", "cannot be split into arguments"),
        (f"pipe:{tmp_path}/nowhere {{}}", "FileNotFoundError"),
        ("pipe:false {}", "exited with status 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorpusSource.open(corpus, settings(tmp_path))


def test_endless_manifest_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files, "MAX_METADATA_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=f"has more than {1 << 20} bytes"):
        CorpusSource.open("pipe:yes {}", settings(tmp_path))


def test_address_in_a_program_is_restored_from_a_path():
    command = "pipe:aws s3 cp s3://bucket/corpus/{} -"
    assert parse_address(Path(command), allow_pipe=True) == parse_address(command, allow_pipe=True) == command


# ------------------------------------------------------------------------------------------------------- object stores


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_shards_are_read_from_an_object_store(program, tmp_path, scheme):
    with object_store(scheme) as store:
        store.put(str(program.parent / "corpus"), "/bucket/corpus", recursive=True)
        split = reader(Path(f"{scheme}://bucket/corpus"), settings(tmp_path, allow_pipe=False))
        samples = [split.sample(i).tokens.tolist() for i in range(38)]
        assert samples == [tokens_of(TRAIN, i).tolist() for i in range(38)]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_missing_package_of_an_object_store_raises_with_its_name(tmp_path, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{scheme}:// needs a package: pip install 'pmlm_dist\[{scheme}\]'"):
        CorpusSource.open(f"{scheme}://bucket/corpus", settings(tmp_path))


def test_program_leaves_no_open_file_descriptors(program, tmp_path):
    split = reader(address(program), settings(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    program.with_name("faults").write_text("endless")
    with pytest.raises(ShardError):
        split.sample(0)
    assert len(os.listdir("/proc/self/fd")) == before
