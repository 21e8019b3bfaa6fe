"""Checkpoints on disk: whatever is damaged or interrupted, the newest whole one is found, and never a broken one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.worlds import run_world

from pmlm_dist.checkpoint.files import (
    KINDS,
    CheckpointReader,
    CorruptCheckpoint,
    FileDigest,
    checkpoint_problems,
    rank_file,
    read_weights,
    sha256_of,
    write_json,
    write_numbers,
)
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.resume import differences, find_checkpoint
from pmlm_dist.config import ConfigError

FILES = ("state.json", rank_file(0), rank_file(1))
WHOLE = Fragment.whole("layers.0.weight", (4, 6), used_rows=3)
HALVES = (replace(WHOLE, stop=10), replace(WHOLE, start=10))


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


def numbers(step: int, kind: str) -> np.ndarray:
    """What a kind of the one tensor is at `step`, whole."""
    return (np.arange(24, dtype=np.float32) + 1000 * step + 100 * KINDS.index(kind)).reshape(4, 6)


def begin(folder: CheckpointFolder, step: int) -> tuple[Path, dict[str, FileDigest]]:
    """What the ranks write before rank 0 commits."""
    temporary = folder.temporary(step, attempt="a")
    temporary.mkdir(parents=True)
    files = {}
    for rank, half in enumerate(HALVES):
        chunks = [numbers(step, kind).reshape(-1)[half.start : half.stop].tobytes() for kind in KINDS]
        files[rank_file(rank)] = write_numbers(temporary / rank_file(rank), [half], chunks)
    state = {"step": step, "samples_consumed": 8 * step, "tokens_seen": 99, "identity": {}, "configuration": {}}
    return temporary, files | {"state.json": write_json(temporary / "state.json", state)}


def write(folder: CheckpointFolder, step: int) -> Path:
    """A whole checkpoint, as two ranks write it."""
    path = folder.commit(step, *begin(folder, step))
    folder.remove_old(path)
    return path


def three(root: Path, *, keep: int = 3) -> CheckpointFolder:
    """Whole checkpoints of steps 10, 20 and 30."""
    folder = CheckpointFolder(root, keep=keep)
    for step in (10, 20, 30):
        write(folder, step)
    return folder


def steps_of(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def is_intact(path: Path) -> bool:
    """Whether a checkpoint holds exactly what was written, found out without its manifest or our reader."""
    if {file.name for file in path.iterdir()} != {"manifest.json", *FILES}:
        return False
    step = int(path.name[5:])
    halves = [load_file(path / rank_file(rank)) for rank in (0, 1)]
    return json.loads((path / "state.json").read_text())["step"] == step and all(
        np.array_equal(np.concatenate([half[f"{kind}/{WHOLE.name}"] for half in halves]), numbers(step, kind).ravel())
        for kind in KINDS
    )


def test_what_was_written_is_found_whole(tmp_path: Path):
    folder = three(tmp_path)
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])
    assert all(is_intact(tmp_path / f"step-000000{step}") for step in (10, 20, 30))
    pointer = json.loads((tmp_path / "latest").read_text())
    assert pointer["checkpoint"] == "step-00000030"
    assert pointer["manifest_sha256"] == sha256_of(tmp_path / "step-00000030/manifest.json")
    assert not list(tmp_path.glob("*.tmp*"))


def test_numbers_are_read_back_from_the_pieces(tmp_path: Path):
    path = write(CheckpointFolder(tmp_path, keep=1), 10)
    assert {name: weight.tolist() for name, weight in read_weights(path).items()} == {
        WHOLE.name: numbers(10, "weight")[:3].tolist()  # the last row pads
    }
    with CheckpointReader(path) as reader:
        assert reader.tensors == {WHOLE.name: WHOLE}
        for kind in KINDS:
            assert np.array_equal(reader.read(WHOLE, kind), numbers(10, kind))


def test_more_rows_that_pad_are_left_as_they_are(tmp_path: Path):
    path = write(CheckpointFolder(tmp_path, keep=1), 10)
    found = np.full(36, -1.0, np.float32)
    with CheckpointReader(path) as reader:
        reader.fill(found, Fragment.whole(WHOLE.name, (6, 6), used_rows=3), "exp_avg")
    assert np.array_equal(found[:24], numbers(10, "exp_avg").ravel())
    assert np.all(found[24:] == -1)


def test_a_rank_without_numbers_writes_an_empty_file(tmp_path: Path):
    """Of very small models a rank may hold nothing but padding."""
    folder = CheckpointFolder(tmp_path, keep=1)
    temporary, files = begin(folder, 10)
    files[rank_file(2)] = write_numbers(temporary / rank_file(2), [], [])
    assert checkpoint_problems(folder.commit(10, temporary, files)) == []


def test_numbers_that_do_not_fit_their_placements_are_a_fault_of_the_program(tmp_path: Path):
    with pytest.raises(ValueError, match="its placements need"):
        write_numbers(tmp_path / "x", [WHOLE], [b"\0" * 4])


def test_a_disk_that_gives_back_something_else_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *_: os.pwrite(descriptor, b"!", 300))
    with pytest.raises(OSError, match="reads back with another checksum"):
        write_numbers(tmp_path / "x", [WHOLE], [b"\0" * 24 * 4 * 3])


@pytest.mark.parametrize("root", ["", "never/made"])
def test_without_checkpoints_there_is_none_and_no_complaint(tmp_path: Path, root: str):
    assert CheckpointFolder(tmp_path / root, keep=1).newest_valid() == (None, [])


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path, *, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def forge(path: Path, name: str, content: bytes) -> None:
    """Put `content` into a file of a checkpoint and its checksum into the manifest."""
    (path / name).write_bytes(content)
    listed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"].update({name: listed}))


def forge_numbers(path: Path, tensors: dict[str, np.ndarray], index: Any) -> None:
    """Put other tensors, and another index of them, into the file of rank 0."""
    save_file(tensors, path / "forged", metadata={"placements": index if isinstance(index, str) else json.dumps(index)})
    content = (path / "forged").read_bytes()
    (path / "forged").unlink()
    forge(path, rank_file(0), content)


class Hostile:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


OWN = {f"{kind}/{WHOLE.name}": np.zeros(10, np.float32) for kind in KINDS}
INDEX = HALVES[0].as_json()

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut by a byte": (lambda path: cut(path / FILES[2]), "rank-00001.safetensors has"),
    "an empty file": (lambda path: (path / FILES[1]).write_bytes(b""), "rank-00000.safetensors has 0 bytes, expected"),
    "a missing state": (lambda path: (path / FILES[0]).unlink(), "state.json is missing"),
    "a missing rank": (lambda path: (path / FILES[2]).unlink(), "rank-00001.safetensors is missing"),
    "a file too many": (lambda path: (path / "evil.pt").touch(), "evil.pt is not in the manifest"),
    "a folder too many": (lambda path: (path / "evil").mkdir(), "evil is not in the manifest"),
    "a folder in a file's place": (
        lambda path: ((path / FILES[1]).unlink(), (path / FILES[1]).mkdir()),
        "rank-00000.safetensors is missing",
    ),
    "a link in a file's place": (
        lambda path: (
            (path / FILES[1]).rename(path.parent / "elsewhere"),
            (path / FILES[1]).symlink_to(path.parent / "elsewhere"),
        ),
        "rank-00000.safetensors is missing",
    ),
    "another step's file": (
        lambda path: shutil.copy(path.parent / "step-00000020" / FILES[1], path / FILES[1]),
        "another checksum",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "an empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "half a manifest": (lambda path: cut(path / "manifest.json", by=300), "manifest.json cannot be read"),
    "a manifest of nothing": (lambda path: edit_manifest(path, lambda m: m.update(files={})), "does not list"),
    "a manifest of bytes": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json"),
    "a manifest that is a list": (lambda path: (path / "manifest.json").write_text("[]"), "it holds no object"),
    "a manifest of brackets": (lambda path: (path / "manifest.json").write_text("[" * 10**6), "Recursion"),
    "a manifest without files": (lambda path: edit_manifest(path, lambda m: m.pop("files")), "manifest.json"),
    "a manifest with a list of files": (
        lambda path: edit_manifest(path, lambda m: m.update(files=[])),
        "manifest.json",
    ),
    "an entry without checksum": (
        lambda path: edit_manifest(path, lambda m: m["files"][FILES[0]].pop("sha256")),
        "manifest.json",
    ),
    "an entry that is a number": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({FILES[0]: 3})),
        "manifest.json",
    ),
    "an entry that lies elsewhere": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({"../latest": m["files"][FILES[0]]})),
        "which is no file of a checkpoint",
    ),
    "the old format": (lambda path: edit_manifest(path, lambda m: m.update(version=1)), "is of format 1, this program"),
    "a later format": (lambda path: edit_manifest(path, lambda m: m.update(version=3)), "is of format 3, this program"),
    "no format": (lambda path: edit_manifest(path, lambda m: m.pop("version")), "is of format None"),
    "no files at all": (lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()], "manifest.json"),
    "a state without identity": (lambda path: forge(path, FILES[0], b'{"step": 30}'), "state.json lacks"),
    "a state that is a number": (lambda path: forge(path, FILES[0], b"30"), "state.json cannot be read"),
    "a pickle with a right checksum": (
        lambda path: forge(path, FILES[1], pickle.dumps(Hostile())),
        "rank-00000.safetensors cannot be read",
    ),
    "a huge header": (
        lambda path: forge(path, FILES[1], (2**62).to_bytes(8, "little") + b"{}"),
        "rank-00000.safetensors cannot be read",
    ),
    "numbers without an index": (lambda path: forge_numbers(path, OWN, "nothing"), "no readable index"),
    "an index of a hostile depth": (lambda path: forge_numbers(path, OWN, "[" * 10**6), "no readable index"),
    "an index of nothing": (lambda path: forge_numbers(path, OWN, []), "other tensors than its index"),
    "an index beyond the tensor": (lambda path: forge_numbers(path, OWN, [INDEX | {"stop": 25}]), "no readable index"),
    "an index of another size": (lambda path: forge_numbers(path, OWN, [INDEX | {"stop": 9}]), "other tensors than"),
    "the same twice": (lambda path: forge_numbers(path, OWN, [INDEX, INDEX]), "other tensors than its index"),
    "another type of number": (
        lambda path: forge_numbers(path, {name: part.astype(np.float64) for name, part in OWN.items()}, [INDEX]),
        "other tensors than its index",
    ),
    "numbers in another place": (
        lambda path: forge_numbers(path, OWN, [INDEX | {"start": 1, "stop": 11}]),
        "do not hold each of its numbers exactly once",
    ),
    "numbers of another tensor": (
        lambda path: forge_numbers(path, OWN, [INDEX | {"shape": [6, 4]}]),
        "disagree about its shape",
    ),
    "another precision of moments is missing": (
        lambda path: forge_numbers(path, {name: OWN[name] for name in list(OWN)[:2]}, [INDEX]),
        "other tensors than its index",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault("F25", "F26", "F27", "F41")
def test_a_damaged_checkpoint_is_passed_over_and_the_damage_named(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = three(tmp_path)
    inflict, complaint = DAMAGES[damage]
    inflict(tmp_path / "step-00000030")
    newest, complaints = folder.newest_valid()
    assert newest == tmp_path / "step-00000020"
    assert len(complaints) >= 1
    assert all(str(tmp_path / "step-00000030") in line for line in complaints)
    assert any(complaint in line for line in complaints), complaints
    assert not (tmp_path / "PWNED").exists()
    with pytest.raises(CorruptCheckpoint, match="is not whole"):
        read_weights(tmp_path / "step-00000030")


def test_several_damaged_ones_are_all_named(tmp_path: Path):
    folder = three(tmp_path)
    cut(tmp_path / "step-00000030" / FILES[1])
    (tmp_path / "step-00000020" / FILES[0]).unlink()
    newest, complaints = folder.newest_valid()
    assert newest == tmp_path / "step-00000010"
    assert [re.findall(r"step-0*(\d+)", line) for line in complaints] == [["30"], ["20"]]


def test_an_unreadable_file_counts_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that answers with an error, for instance."""
    folder = three(tmp_path)
    digest = hashlib.file_digest

    def broken(file: Any, algorithm: str) -> Any:
        if file.name.endswith(f"step-00000030/{FILES[1]}"):
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", broken)
    newest, complaints = folder.newest_valid()
    assert newest == tmp_path / "step-00000020"
    assert "Input/output error" in complaints[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Whole checkpoints of steps 10 and 20, to be left as they are."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("two"), keep=2)
    for step in (10, 20):
        write(folder, step)
    return folder


@contextlib.contextmanager
def flipped(path: Path, where: float, mask: int) -> Iterator[None]:
    """Change the byte at the share `where` of a file for a while."""
    whole = path.read_bytes()
    at = int(where * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(whole)


POSITION, MASK = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


@given(where=POSITION, mask=MASK, name=st.sampled_from(FILES))
@settings(max_examples=300, deadline=None)
@pytest.mark.fault("F26")
def test_a_changed_byte_anywhere_is_noticed(two: CheckpointFolder, where: float, mask: int, name: str):
    with flipped(two.folder(20) / name, where, mask):
        newest, (complaint,) = two.newest_valid()
    assert newest == two.folder(10)
    assert f"{name} has another checksum" in complaint


@given(where=POSITION, mask=MASK)
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_in_the_manifest_never_ends_the_search(two: CheckpointFolder, where: float, mask: int):
    """A blank that became another blank means nothing; any other change passes this checkpoint over."""
    manifest = two.folder(20) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    with flipped(manifest, where, mask):
        newest, complaints = two.newest_valid()
        if newest == two.folder(20):
            assert json.loads(manifest.read_text())["files"] == files
        else:
            assert newest == two.folder(10)
            assert complaints


@pytest.mark.parametrize(
    ("pointer", "complaint"),
    [
        (None, "latest cannot be read"),
        ("", "latest cannot be read"),
        ("{", "latest cannot be read"),
        ('{"checkpoint": "step-00000099"}', "latest points to step-00000099, which is not there"),
        ("{}", "latest points to None"),
        ('{"checkpoint": "step-00000020"}', None),  # the process ended just before it moved on
    ],
)
@pytest.mark.fault("F22", "F23", "F24")
def test_the_pointer_does_not_decide_and_is_named_when_it_is_wrong(
    tmp_path: Path, pointer: str | None, complaint: str | None
):
    folder = three(tmp_path)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    newest, complaints = folder.newest_valid()
    assert newest == tmp_path / "step-00000030"
    assert complaints == [] if complaint is None else complaint in complaints[0]


def test_a_folder_that_was_never_committed_does_not_count(tmp_path: Path):
    folder = three(tmp_path)
    shutil.copytree(tmp_path / "step-00000030", folder.temporary(40, attempt="b"))
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])
    folder.remove_temporary()
    assert steps_of(tmp_path) == [10, 20, 30]
    assert not folder.temporary(40, attempt="b").exists()


def test_a_checkpoint_that_lacks_a_rank_is_not_committed(tmp_path: Path):
    folder = three(tmp_path)
    temporary, files = begin(folder, 40)
    (temporary / rank_file(1)).unlink()
    files.pop(rank_file(1))
    with pytest.raises(CorruptCheckpoint, match="do not hold each of its numbers exactly once"):
        folder.commit(40, temporary, files)
    assert folder.newest_valid() == (tmp_path / "step-00000030", [])


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (99_999_999, 100_000_000):
        write(folder, step)
    assert folder.newest_valid() == (tmp_path / "step-100000000", [])


@pytest.mark.fault("F24")
def test_when_none_is_whole_all_are_named_and_nothing_starts_anew(tmp_path: Path):
    folder = three(tmp_path)
    for step in (10, 20, 30):
        cut(tmp_path / f"step-000000{step}" / FILES[1])
    with pytest.raises(ConfigError) as caught:
        folder.newest_valid()
    for step in (10, 20, 30):
        assert sum(str(tmp_path / f"step-000000{step}") in problem for problem in caught.value.problems) == 1
    assert f"remove {tmp_path} to start anew" in caught.value.problems[-1]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.fault("F32")
def test_the_newest_are_kept(tmp_path: Path, keep: int):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in range(1, 8):
        write(folder, step)
        assert steps_of(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_never_trades_the_checkpoint_just_written_for_a_broken_one(tmp_path: Path, keep: int):
    """A run falls back behind broken checkpoints, and then saves at a step before theirs."""
    folder = three(tmp_path)
    cut(tmp_path / "step-00000020" / FILES[1])
    cut(tmp_path / "step-00000030" / FILES[1])
    again = CheckpointFolder(tmp_path, keep=keep)
    assert again.newest_valid()[0] == tmp_path / "step-00000010"
    write(again, 15)
    assert folder.newest_valid()[0] == tmp_path / "step-00000015"


def test_every_kth_step_is_kept_for_ever(tmp_path: Path):
    folder = CheckpointFolder(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        write(folder, step)
    assert steps_of(tmp_path) == [4, 8, 10, 11]


def test_broken_ones_do_not_take_the_place_of_whole_ones(tmp_path: Path):
    folder = three(tmp_path, keep=3)
    cut(tmp_path / "step-00000030" / FILES[1])
    write(CheckpointFolder(tmp_path, keep=2), 40)
    assert steps_of(tmp_path) == [20, 30, 40]
    write(CheckpointFolder(tmp_path, keep=2), 50)
    assert steps_of(tmp_path) == [40, 50]
    assert folder.newest_valid()[0] == tmp_path / "step-00000050"


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    folder = three(tmp_path)
    broken = tmp_path / "step-00000030"
    cut(broken / FILES[1])
    (broken / "left over").touch()
    assert write(folder, 30) == broken
    assert is_intact(broken)
    assert folder.newest_valid() == (broken, [])


class Killed(BaseException):
    """The process ended here."""


class Killer:
    """Counts operations that change the disk and ends the process before number `at`, or within it if it is a write."""

    OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int | None):
        self.count, self.at, self.log = 0, at, []
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        write_text = Path.write_text

        def half(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
            try:
                self._strike("write", path)
            except Killed:
                write_text(path, text[: len(text) // 2], *args, **kwargs)
                raise
            return write_text(path, text, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", half)

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *args: Any, **kwargs: Any) -> Any:
            self._strike(name, os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target)
            return operation(target, *args, **kwargs)

        return watched

    def _strike(self, name: str, target: Any) -> None:
        if self.count == self.at:
            raise Killed
        self.count += 1
        self.log.append((name, str(target)))


def commit_over_a_broken_one(root: Path, monkeypatch: pytest.MonkeyPatch, *, at: int | None) -> Killer:
    """With steps 10, 20 and a broken 30 there, write 30 again, keeping two; the process ends at operation `at`."""
    three(root)
    folder = CheckpointFolder(root, keep=2)
    cut(root / "step-00000030" / FILES[1])
    with monkeypatch.context() as patch:
        killer = Killer(patch, at=at)
        with contextlib.suppress(Killed):
            write(folder, 30)
    return killer


@pytest.mark.fault("F21", "F32")
def test_an_end_between_any_two_operations_of_a_commit_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    operations = commit_over_a_broken_one(tmp_path / "dry", monkeypatch, at=None).count
    assert operations > 15
    seen = set()
    for at in range(operations):
        root = tmp_path / str(at)
        assert commit_over_a_broken_one(root, monkeypatch, at=at).count == at
        folder = CheckpointFolder(root, keep=2)
        newest, _ = folder.newest_valid()
        assert newest is not None
        assert is_intact(newest), f"killed before operation {at}"
        seen.add(newest.name)
        folder.remove_temporary()
        write(folder, 30)  # the next life gets there again
        assert folder.newest_valid() == (root / "step-00000030", [])
        assert steps_of(root) == [20, 30]
    assert seen == {"step-00000020", "step-00000030"}


def test_every_byte_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = commit_over_a_broken_one(tmp_path, monkeypatch, at=None).log
    temporary = CheckpointFolder(tmp_path, keep=2).temporary(30, attempt="a")
    named = log.index(("rename", str(temporary)))
    flushed = {target for name, target in log[:named] if name == "fsync"}
    assert flushed >= {str(temporary), *(str(temporary / name) for name in (*FILES, "manifest.json"))}
    pointed = next(index for index, (name, target) in enumerate(log) if name == "replace" and "latest" in target)
    assert named < log.index(("fsync", str(tmp_path))) < pointed
    removed = [index for index, (name, target) in enumerate(log) if "step-00000010" in target and name == "rename"]
    assert removed
    assert min(removed) > pointed


def found_by_ranks(root: Path) -> tuple[str, list[str]]:
    """What a rank of a world gets: the checkpoint or the problems, and the warnings."""
    import warnings

    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = str(find_checkpoint(CheckpointFolder(root, keep=3), topology))
        except ConfigError as error:
            found = str(error)
    return found, [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]


@pytest.mark.distributed
def test_all_ranks_go_on_from_the_same_checkpoint_and_one_warns(tmp_path: Path):
    three(tmp_path)
    cut(tmp_path / "step-00000030" / FILES[1])
    (first, warned), (second, silent) = run_world(found_by_ranks, 2, tmp_path)
    assert first == second == str(tmp_path / "step-00000020")
    assert len(warned) == 1
    assert f"{tmp_path / 'step-00000030'} is not whole" in warned[0]
    assert f"going on from {tmp_path / 'step-00000020'}" in warned[0]
    assert silent == []


@pytest.mark.distributed
def test_no_whole_checkpoint_ends_every_rank_alike(tmp_path: Path):
    write(CheckpointFolder(tmp_path, keep=1), 10)
    (tmp_path / "step-00000010" / "manifest.json").write_text("[]")
    (first, _), (second, _) = run_world(found_by_ranks, 2, tmp_path)
    assert first == second
    assert "no whole checkpoint is left" in first


def test_faults_of_a_whole_checkpoint_are_none(tmp_path: Path):
    assert checkpoint_problems(write(CheckpointFolder(tmp_path, keep=1), 1)) == []


def test_differences_name_every_setting_that_differs_or_is_missing():
    saved, now = {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}
    assert differences(saved, now) == ["b was 2, is now 3", "d was None, is now 4"]
    assert differences(saved, saved) == []
