"""Results of `pmlm generate`, `evaluate` and `predict` are kept as they come; the same command computes the others."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_tasks import config, text_rows, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.config import ConfigError
from pmlm_dist.downstream import results as results_module
from pmlm_dist.downstream.results import ResultsFile, compute_batches, open_results

BATCHES = [[3, 0], [1], [2, 4]]
ROWS = [{"text": f"{'a ' * (n % 4)}red fish", "id": f"q{n}"} for n in range(11)]


def results_file(path: Path, **identity: Any) -> ResultsFile:
    return ResultsFile(path, {"model": "m", **identity}, batches=BATCHES, option="--output")


def interrupted(path: Path, *, batches: int = 1) -> ResultsFile:
    """Return a file that was opened, got results of some batches, and was closed."""
    file = results_file(path)
    file.open()
    for number in range(batches):
        file.append(number, [{"n": item} for item in BATCHES[number]])
    file.close()
    return file


# ---------------------------------------------------------------------------------------------------------- the file


def test_results_are_read_again_and_an_incomplete_line_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture):
    part = interrupted(tmp_path / "out").part
    assert "has 2 of 5 results: the same command computes the others" in capsys.readouterr().err
    with part.open("ab") as file:
        file.write(b'[1,[{"n":')
    again = results_file(tmp_path / "out")
    again.open()
    assert again.done == {0: [{"n": 3}, {"n": 0}]}
    again.append(1, [{"n": 1}])
    assert [json.loads(line) for line in part.read_text().splitlines()[1:]] == [[0, again.done[0]], [1, [{"n": 1}]]]


def test_results_of_another_command_raise_and_stay(tmp_path: Path):
    part = interrupted(tmp_path / "out").part
    before = part.read_bytes()
    with pytest.raises(ConfigError, match=r"out\.part has results of another command, which differs in model: start"):
        results_file(tmp_path / "out", model="other").open()
    batches = [[0], [1], [2]]  # those of the other command fit none of the results
    with pytest.raises(ConfigError, match=r"differs in model: start"):
        ResultsFile(tmp_path / "out", {"model": "other"}, batches=batches, option="--output").open()
    assert part.read_bytes() == before


@pytest.mark.parametrize("content", ["thesis\n", '{"a": 1}\n', "[1, 2]\n[0, [1, 1]]\n", "no line end"])
def test_foreign_file_in_place_of_the_part_raises_and_stays(tmp_path: Path, content: str):
    (tmp_path / "out.part").write_text(content)
    with pytest.raises(ConfigError, match=r"out\.part was not written by this program"):
        results_file(tmp_path / "out").open()
    assert (tmp_path / "out.part").read_text() == content


def test_part_without_results_is_replaced_or_removed(tmp_path: Path):
    part = interrupted(tmp_path / "out", batches=0).part
    assert not part.exists()
    killed = results_file(tmp_path / "out")
    killed.open()  # a killed process closes nothing
    other = results_file(tmp_path / "out", model="other")
    other.open()
    assert json.loads(part.read_text()) == {"results of": {"model": "other"}}


def test_existing_output_is_replaced_only_if_the_part_is_complete(tmp_path: Path):
    (tmp_path / "out").write_text("existing")
    for batches in (0, 1):
        with pytest.raises(ConfigError, match="out exists already, and nothing is overwritten: name another"):
            interrupted(tmp_path / "out", batches=batches)
        assert (tmp_path / "out").read_text() == "existing"
    (tmp_path / "out").unlink()
    file = interrupted(tmp_path / "out", batches=3)
    file.write([{"n": 0}])  # ended before the part was removed
    again = results_file(tmp_path / "out")
    again.open()
    again.write([{"n": 1}])
    again.remove_part()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out").read_text()) == {"n": 1}


def test_full_disk_is_reported_before_and_keeps_results_while_computing(tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    usage = SimpleNamespace(total=100, used=60, free=40)
    monkeypatch.setattr(results_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="out cannot be written: 120 bytes more are needed"):
        results_file(tmp_path / "out").open()
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"out cannot be written: .*No space left"):
            results_file(tmp_path / "out").open()
    assert not list(tmp_path.iterdir())
    file = results_file(tmp_path / "out")
    file.open()
    file.append(0, [{"n": 3}, {"n": 0}])
    monkeypatch.setattr(results_module, "_FSYNC_S", -1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"No space left.*out\.part has 2 of 5 results: make room"):
            file.append(1, [{"n": 1}])
    again = results_file(tmp_path / "out")
    again.open()
    assert again.done[0] == [{"n": 3}, {"n": 0}]


def compute_in_world(path: str, fails_at: int | None) -> list[Any]:
    from pmlm_dist.parallel import groups

    topology = groups.init_process_groups()
    seen = []

    def compute(items: Sequence[int]) -> list[Any]:
        if fails_at in items:
            raise ConfigError(["not this one"])
        seen.append(list(items))
        return [item * 10 for item in items]

    with open_results(topology, Path(path), lambda: results_file(Path(path))) as file:
        try:
            values = compute_batches(BATCHES, compute, topology, file=file)
        except ConfigError as error:
            return [error.problems, seen]
    return [values, seen]


@pytest.mark.distributed
def test_batches_are_shared_by_ranks_and_only_missing_ones_are_computed(tmp_path: Path):
    failed = run_world(compute_in_world, 2, str(tmp_path / "out"), 2)
    assert [problems for problems, _ in failed] == [["not this one"]] * 2
    assert [seen for _, seen in failed] == [[[3, 0]], [[1]]]
    ((values, seen),) = run_world(compute_in_world, 1, str(tmp_path / "out"), None)
    assert values == [0, 10, 20, 30, 40]
    assert seen == [[2, 4]]


# ------------------------------------------------------------------------------------------------------- the commands


def learn(settings: Any) -> None:
    from pmlm_dist.downstream.finetune import finetune

    finetune(settings)


@pytest.fixture(scope="module")
def classifier(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("classifier") / "out"
    run_world(learn, 1, config(model, data, output, report=("test",)))
    return output


def call(arguments: list[str]) -> int:
    return main(arguments)


def call_and_die(arguments: list[str], batches: int) -> int:
    """Call a command that is killed while it writes the results of a batch."""
    append = ResultsFile.append

    def append_half(self: ResultsFile, number: int, results: list[Any]) -> None:
        if len(self.done) == batches:
            self._file.write(b'[1,[{"predic')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, number, results)

    ResultsFile.append = append_half
    return main(arguments)


def commands(classifier: Path, model: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return each command without its output, and the option that names it."""
    sources = str(write_jsonl(folder / "in.jsonl", ROWS))
    generate = ["generate", "--model", str(model), "--input", sources, "--batch", "2", "--max-length", "8"]
    predict = ["predict", "--model", str(classifier), "--input", sources, "--batch", "2"]
    return {"generate": (generate, "--output"), "predict": (predict, "--output")}


@pytest.mark.distributed
@pytest.mark.fault("F46")
@pytest.mark.parametrize("name", ["generate", "predict"])
def test_killed_command_resumes_on_any_ranks_with_equal_results(
    classifier: Path, model: Path, tmp_path: Path, name: str
):
    arguments, option = commands(classifier, model, tmp_path)[name]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run_world(call, 1, [*arguments, option, str(whole)]) == [0]
    own = [*arguments, option, str(output)]
    with pytest.raises(AssertionError):
        run_world(call_and_die, 2, own, 2)
    assert not output.exists()
    assert len((tmp_path / "out.jsonl.part").read_bytes().splitlines()) == 4  # header, two batches, half of a line
    with pytest.raises(AssertionError):
        run_world(call_and_die, 1, own, 3)
    assert run_world(call, 1, [*own[:-2], option, str(output), "--precision", "bf16"]) == [2]
    assert run_world(call, 3, own) == [0] * 3
    assert output.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["id"] for line in output.open()] == [row["id"] for row in ROWS]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "whole.jsonl"}


def test_interrupted_command_says_what_it_keeps(model: Path, classifier: Path, tmp_path: Path, monkeypatch, capsys):
    arguments, option = commands(classifier, model, tmp_path)["generate"]
    append = ResultsFile.append

    def interrupt(self: ResultsFile, number: int, values: list[Any]) -> None:
        append(self, number, values)
        raise KeyboardInterrupt

    own = [*arguments, option, str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(ResultsFile, "append", interrupt)
        assert main(own) == 130
    said = capsys.readouterr().err
    assert "out.part has 2 of 11 results: the same command computes the others, on any number of ranks" in said
    assert "Traceback" not in said
    assert main(own) == 0
    assert "resuming: 2 of 11 results are in" in capsys.readouterr().err
    assert len((tmp_path / "out").read_text().splitlines()) == 11


@pytest.mark.distributed
@pytest.mark.fault("F46")
def test_killed_evaluation_of_two_splits_resumes(classifier: Path, tmp_path: Path):
    arguments = ["evaluate", "--model", str(classifier), "--split", "validation", "test", "--batch", "4"]
    own = [*arguments, "--predictions", str(tmp_path / "out")]
    with pytest.raises(AssertionError):
        run_world(call_and_die, 1, own, 2)  # both splits have a file; the first has two batches of three
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl*") if path.suffix != ".lock"} == {
        f"predictions-{split}.jsonl.part" for split in ("validation", "test")
    }
    assert run_world(call, 2, own) == [0, 0]
    for split in ("validation", "test"):
        name = f"predictions-{split}.jsonl"
        assert [json.loads(line) for line in (tmp_path / "out" / name).open()] == [
            json.loads(line) for line in (classifier / name).open()
        ]


@pytest.mark.parametrize("link", [True, False])
def test_half_of_a_surrogate_pair_in_an_id_is_written_as_it_was(
    classifier: Path, model: Path, tmp_path: Path, monkeypatch, link: bool
):
    if not link:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    rows = [{**row, "id": f"{row['id']}\ud83d"} for row in text_rows(3)]
    sources = write_jsonl(tmp_path / "in.jsonl", rows)
    for command, folder in (("generate", model), ("predict", classifier)):
        output = tmp_path / command
        arguments = ["--model", str(folder), "--input", str(sources), "--output", str(output)]
        assert main([command, *arguments, *(["--max-length", "4"] if command == "generate" else [])]) == 0
        assert [json.loads(line)["id"] for line in output.open()] == [row["id"] for row in rows]
        assert b'"q0\\ud83d"' in output.read_bytes()
