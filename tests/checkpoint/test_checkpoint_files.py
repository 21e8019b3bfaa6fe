"""Checkpoint files: tensors are read back exactly, and every corruption is detected."""

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
from safetensors.numpy import save_file
from support.small_checkpoints import FILES, HALVES, WHOLE, truncate, values, write_checkpoint, write_parts, write_three

from pmlm_dist.checkpoint.files import KINDS, CheckpointReader, checkpoint_problems, read_weights, write_numbers
from pmlm_dist.checkpoint.folder import CheckpointFolder
from pmlm_dist.checkpoint.fragments import Fragment
from pmlm_dist.checkpoint.manifest import CorruptCheckpoint, rank_file, read_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_reader_assembles_full_tensors_from_fragments(tmp_path: Path):
    path = write_checkpoint(CheckpointFolder(tmp_path, keep=1), 10)
    assert {name: weight.tolist() for name, weight in read_weights(path).items()} == {
        WHOLE.name: values(10, "weight")[:3].tolist()  # the last row is padding
    }
    with CheckpointReader(path) as reader:
        assert reader.tensors == {WHOLE.name: WHOLE}
        for kind in KINDS:
            assert np.array_equal(reader.read(WHOLE, kind), values(10, kind))


def to_format_3(path: Path) -> None:
    """Rewrite the manifest of a checkpoint as the release before its index did."""

    def without_index(manifest: dict[str, Any]) -> None:
        manifest.pop("tensors")
        manifest["version"] = 3
        for entry in manifest["files"].values():
            entry.pop("kinds", None)
            entry.pop("fragments", None)

    edit_manifest(path, without_index)


def test_checkpoint_without_an_index_is_read_like_one_with_it(tmp_path: Path):
    with_index, without = (write_checkpoint(CheckpointFolder(tmp_path, keep=2), step) for step in (10, 11))
    to_format_3(without)
    assert checkpoint_problems(without) == []
    with CheckpointReader(with_index) as reader, CheckpointReader(without) as older:
        assert older.tensors == reader.tensors
        assert older.has_moments
        assert sorted(older.fragments(), key=str) == sorted(reader.fragments(), key=str)
        for kind in KINDS:
            assert np.array_equal(older.read(WHOLE, kind), values(11, kind))
    forge_tensors(without, OWN, [INDEX | {"start": 1, "stop": 11}])
    assert "do not hold each of its elements exactly once" in checkpoint_problems(without)[0]


@pytest.mark.parametrize("stop", [10, 11])
def test_reader_opens_only_the_files_that_hold_what_it_fills(tmp_path: Path, stop: int):
    path = write_checkpoint(CheckpointFolder(tmp_path, keep=1), 10)
    part, filled = replace(WHOLE, stop=stop), np.empty(stop, np.float32)
    if stop == HALVES[0].stop:  # the other file is not even there
        (path / FILES[2]).unlink()
    with CheckpointReader(path) as reader:
        for kind in KINDS:
            reader.fill(filled, part, kind)
            assert np.array_equal(filled, values(10, kind).ravel()[:stop])
        assert list(reader._opened) == list(FILES[1:2] if stop == HALVES[0].stop else FILES[1:])


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_problems_found_in_parts_are_those_of_the_whole(tmp_path: Path, parts: int):
    write_three(tmp_path)
    path = tmp_path / "step-00000030"
    truncate(path / FILES[2])
    forge(path, FILES[0], b'{"step": 30}')
    (path / "evil.pt").touch()
    found = [problem for part in range(parts) for problem in checkpoint_problems(path, part=part, parts=parts)]
    assert len(checkpoint_problems(path)) == 2
    assert set(found) >= set(checkpoint_problems(path))


def test_fill_leaves_additional_padding_rows_unchanged(tmp_path: Path):
    path = write_checkpoint(CheckpointFolder(tmp_path, keep=1), 10)
    filled = np.full(36, -1.0, np.float32)
    with CheckpointReader(path) as reader:
        reader.fill(filled, Fragment.whole(WHOLE.name, (6, 6), used_rows=3), "exp_avg")
    assert np.array_equal(filled[:24], values(10, "exp_avg").ravel())
    assert np.all(filled[24:] == -1)


def test_rank_without_fragments_writes_an_empty_file(tmp_path: Path):
    """With very small models a rank may hold padding alone."""
    folder = CheckpointFolder(tmp_path, keep=1)
    temporary, files = write_parts(folder, 10)
    files[rank_file(2)] = write_numbers(temporary / rank_file(2), [], [])
    assert checkpoint_problems(folder.commit(10, temporary, files)) == []


def test_write_numbers_with_wrong_size_raises(tmp_path: Path):
    with pytest.raises(ValueError, match="its fragments need"):
        write_numbers(tmp_path / "x", [WHOLE], [b"\0" * 4])


def test_write_numbers_detects_a_disk_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *_: os.pwrite(descriptor, b"!", 300))
    with pytest.raises(OSError, match="reads back with another checksum"):
        write_numbers(tmp_path / "x", [WHOLE], [b"\0" * 24 * 4 * 3])


def test_valid_checkpoint_has_no_problems(tmp_path: Path):
    assert checkpoint_problems(write_checkpoint(CheckpointFolder(tmp_path, keep=1), 1)) == []


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint by `content`, with its checksum in the manifest."""
    (path / name).write_bytes(content)
    listed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(path, lambda manifest: manifest["files"][name].update(listed))


def forge_tensors(path: Path, tensors: dict[str, np.ndarray], index: Any, *, listed: bool = False) -> None:
    """Replace tensors and index of the file of rank 0; `listed`: in the manifest as well."""
    save_file(tensors, path / "forged", metadata={"fragments": index if isinstance(index, str) else json.dumps(index)})
    content = (path / "forged").read_bytes()
    (path / "forged").unlink()
    forge(path, rank_file(0), content)
    if listed and isinstance(index, list):
        files = read_manifest(path)
        fragments = tuple(Fragment.from_json(entry) for entry in index)
        write_manifest(path, files | {rank_file(0): replace(files[rank_file(0)], fragments=fragments)})


class MaliciousPickle:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


OWN = {f"{kind}/{WHOLE.name}": np.zeros(10, np.float32) for kind in KINDS}
INDEX = HALVES[0].as_json()

CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (lambda path: truncate(path / FILES[2]), "rank-00001.safetensors has"),
    "empty file": (lambda path: (path / FILES[1]).write_bytes(b""), "rank-00000.safetensors has 0 bytes, expected"),
    "missing state": (lambda path: (path / FILES[0]).unlink(), "state.json is missing"),
    "missing rank file": (lambda path: (path / FILES[2]).unlink(), "rank-00001.safetensors is missing"),
    "additional file": (lambda path: (path / "evil.pt").touch(), "evil.pt is not in the manifest"),
    "additional folder": (lambda path: (path / "evil").mkdir(), "evil is not in the manifest"),
    "folder instead of a file": (
        lambda path: ((path / FILES[1]).unlink(), (path / FILES[1]).mkdir()),
        "rank-00000.safetensors is missing",
    ),
    "link instead of a file": (
        lambda path: (
            (path / FILES[1]).rename(path.parent / "elsewhere"),
            (path / FILES[1]).symlink_to(path.parent / "elsewhere"),
        ),
        "rank-00000.safetensors is missing",
    ),
    "file of another step": (
        lambda path: shutil.copy(path.parent / "step-00000020" / FILES[1], path / FILES[1]),
        "another checksum",
    ),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "truncated manifest": (lambda path: truncate(path / "manifest.json", by=300), "manifest.json cannot be read"),
    "manifest without entries": (lambda path: edit_manifest(path, lambda m: m.update(files={})), "does not list"),
    "binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json"),
    "manifest is a list": (lambda path: (path / "manifest.json").write_text("[]"), "it holds no object"),
    "deeply nested manifest": (lambda path: (path / "manifest.json").write_text("[" * 10**6), "Recursion"),
    "manifest without files": (lambda path: edit_manifest(path, lambda m: m.pop("files")), "manifest.json"),
    "manifest with a list of files": (lambda path: edit_manifest(path, lambda m: m.update(files=[])), "manifest.json"),
    "entry without checksum": (
        lambda path: edit_manifest(path, lambda m: m["files"][FILES[0]].pop("sha256")),
        "manifest.json",
    ),
    "entry is a number": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({FILES[0]: 3})),
        "manifest.json",
    ),
    "entry outside the folder": (
        lambda path: edit_manifest(path, lambda m: m["files"].update({"../latest": m["files"][FILES[1]]})),
        "which is no file of a checkpoint",
    ),
    "older format": (lambda path: edit_manifest(path, lambda m: m.update(version=2)), "is of format 2, this program"),
    "newer format": (lambda path: edit_manifest(path, lambda m: m.update(version=5)), "is of format 5, this program"),
    "missing format": (lambda path: edit_manifest(path, lambda m: m.pop("version")), "is of format None"),
    "no files": (lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()], "manifest.json"),
    "state without identity": (lambda path: forge(path, FILES[0], b'{"step": 30}'), "state.json lacks"),
    "state is a number": (lambda path: forge(path, FILES[0], b"30"), "state.json cannot be read"),
    "pickle with a correct checksum": (
        lambda path: forge(path, FILES[1], pickle.dumps(MaliciousPickle())),
        "rank-00000.safetensors cannot be read",
    ),
    "huge header": (
        lambda path: forge(path, FILES[1], (2**62).to_bytes(8, "little") + b"{}"),
        "rank-00000.safetensors cannot be read",
    ),
    "tensors without an index": (lambda path: forge_tensors(path, OWN, "nothing"), "no readable index"),
    "deeply nested index": (lambda path: forge_tensors(path, OWN, "[" * 10**6), "no readable index"),
    "index without entries": (lambda path: forge_tensors(path, OWN, []), "other tensors than its index"),
    "fragment beyond the tensor": (lambda path: forge_tensors(path, OWN, [INDEX | {"stop": 25}]), "no readable index"),
    "fragment of another size": (lambda path: forge_tensors(path, OWN, [INDEX | {"stop": 9}]), "other tensors than"),
    "fragment listed twice": (lambda path: forge_tensors(path, OWN, [INDEX, INDEX]), "other tensors than its index"),
    "tensors of another dtype": (
        lambda path: forge_tensors(path, {name: part.astype(np.float64) for name, part in OWN.items()}, [INDEX]),
        "other tensors than its index",
    ),
    "fragment at another place": (
        lambda path: forge_tensors(path, OWN, [INDEX | {"start": 1, "stop": 11}], listed=True),
        "do not hold each of its elements exactly once",
    ),
    "fragment of another shape": (
        lambda path: forge_tensors(path, OWN, [INDEX | {"shape": [6, 4]}], listed=True),
        "disagree about its shape",
    ),
    "fragments that the manifest does not list": (
        lambda path: forge_tensors(path, OWN, [INDEX | {"start": 1, "stop": 11}]),
        "holds other fragments than manifest.json lists",
    ),
    "manifest with fragments of another file": (
        lambda path: edit_manifest(path, lambda m: m["files"][FILES[1]].update(fragments=[[0, 0, 4, 10, 24]])),
        "holds other fragments than manifest.json lists",
    ),
    "manifest with a fragment of an unknown tensor": (
        lambda path: edit_manifest(path, lambda m: m["files"][FILES[1]].update(fragments=[[1, 0, 4, 0, 10]])),
        "manifest.json cannot be read",
    ),
    "manifest without tensors": (lambda path: edit_manifest(path, lambda m: m.pop("tensors")), "manifest.json"),
    "missing second moment": (
        lambda path: forge_tensors(path, {name: OWN[name] for name in list(OWN)[:2]}, [INDEX]),
        "other tensors than its index",
    ),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.fault("F25", "F26", "F27", "F41")
def test_corrupt_checkpoint_is_skipped_and_its_problem_reported(
    tmp_path: Path, corruption: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = write_three(tmp_path)
    corrupt, problem = CORRUPTIONS[corruption]
    corrupt(tmp_path / "step-00000030")
    newest, problems = folder.newest_valid()
    assert newest == tmp_path / "step-00000020"
    assert len(problems) >= 1
    assert all(str(tmp_path / "step-00000030") in line for line in problems)
    assert any(problem in line for line in problems), problems
    assert not (tmp_path / "PWNED").exists()
    with pytest.raises(CorruptCheckpoint, match="is corrupt"):
        read_weights(tmp_path / "step-00000030")


def test_several_corrupt_checkpoints_are_all_reported(tmp_path: Path):
    folder = write_three(tmp_path)
    truncate(tmp_path / "step-00000030" / FILES[1])
    (tmp_path / "step-00000020" / FILES[0]).unlink()
    newest, problems = folder.newest_valid()
    assert newest == tmp_path / "step-00000010"
    assert [re.findall(r"step-0*(\d+)", line) for line in problems] == [["30"], ["20"]]


def test_unreadable_file_is_reported_as_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For example, a disk that returns an error."""
    folder = write_three(tmp_path)
    digest = hashlib.file_digest

    def failing(file: Any, algorithm: str) -> Any:
        if file.name.endswith(f"step-00000030/{FILES[1]}"):
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", failing)
    newest, problems = folder.newest_valid()
    assert newest == tmp_path / "step-00000020"
    assert "Input/output error" in problems[0]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Valid checkpoints of steps 10 and 20, not to be changed."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("two"), keep=2)
    for step in (10, 20):
        write_checkpoint(folder, step)
    return folder


@contextlib.contextmanager
def flipped(path: Path, where: float, mask: int) -> Iterator[None]:
    """Within the block, flip the bits `mask` of the byte at relative position `where` of a file."""
    original = path.read_bytes()
    at = int(where * len(original))
    path.write_bytes(original[:at] + bytes([original[at] ^ mask]) + original[at + 1 :])
    try:
        yield
    finally:
        path.write_bytes(original)


POSITION, MASK = st.floats(0, 1, exclude_max=True), st.integers(1, 255)


@given(where=POSITION, mask=MASK, name=st.sampled_from(FILES))
@settings(max_examples=300, deadline=None)
@pytest.mark.fault("F26")
def test_changed_byte_in_any_file_is_detected(two_checkpoints: CheckpointFolder, where: float, mask: int, name: str):
    with flipped(two_checkpoints.folder(20) / name, where, mask):
        newest, (problem,) = two_checkpoints.newest_valid()
    assert newest == two_checkpoints.folder(10)
    assert f"{name} has another checksum" in problem


@given(where=POSITION, mask=MASK)
@settings(max_examples=500, deadline=None)
def test_changed_byte_in_the_manifest_never_stops_the_search(
    two_checkpoints: CheckpointFolder, where: float, mask: int
):
    """Whitespace changed to other whitespace is harmless; after any other change the checkpoint is skipped."""
    manifest = two_checkpoints.folder(20) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    with flipped(manifest, where, mask):
        newest, problems = two_checkpoints.newest_valid()
        if newest == two_checkpoints.folder(20):
            assert json.loads(manifest.read_text())["files"] == files
        else:
            assert newest == two_checkpoints.folder(10)
            assert problems
