"""`pmlm score` and `pmlm evaluate --suite`: files, ranks, ties, errors; `likelihood/test_scoring.py` has numbers."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.small_tasks import text_rows, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import build_pretrained, open_pretrained, save_pretrained
from pmlm_dist.downstream import score
from pmlm_dist.likelihood.minimal_pairs import BAD, GOOD, MinimalPair, accuracies, read_pairs
from pmlm_dist.likelihood.scoring import METHODS, score_texts

TEXTS = [row["text"] for row in text_rows(7)]
PAIRS = [
    {GOOD: good, BAD: f"{good} {bad}", "UID": f"paradigm_{number % 2}", "linguistics_term": "length"}
    for number, (good, bad) in enumerate(zip(TEXTS, reversed(TEXTS), strict=True))
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def call(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_scores_of_a_file_are_the_sums_on_any_number_of_ranks(method: Any, model: Path, tmp_path: Path):
    rows = [{"id": f"t{number}", "sentence": text} for number, text in enumerate(TEXTS)]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ["score", str(source), "--model", str(model), "--method", method, "--batch-slots", "64"]
    assert run_world(call, 2, [*arguments, "--output", str(output)]) == [0, 0]
    pretrained = open_pretrained(model)
    encoded = pretrained.vocabulary.encode_batch(TEXTS)
    vocabulary = pretrained.vocabulary
    expected = score_texts(build_pretrained(pretrained), encoded, method=method, vocabulary=vocabulary, slots=10**6)
    for row, result, scores in zip(rows, lines(output), expected, strict=True):
        assert (result["id"], result["tokens"]) == (row["id"], len(scores))
        assert result["score"] == pytest.approx(math.fsum(scores), abs=1e-4)
    assert main([*arguments, "--output", str(output)]) == 2  # nothing is overwritten


def test_text_file_without_output_is_scored_to_standard_output(model: Path, tmp_path: Path, capfdbinary):
    (tmp_path / "in.txt").write_text(f"{TEXTS[0]}\r\n\n{TEXTS[1]}\n", newline="")
    assert main(["score", str(tmp_path / "in.txt"), "--model", str(model)]) == 0
    printed = capfdbinary.readouterr()
    assert [json.loads(line)["id"] for line in printed.out.splitlines()] == [0, 1]
    assert b"par: 2 texts" in printed.err
    assert b"perplexity" in printed.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"other": "a"}\n', "no column text or sentence for the text, there are other: name it by --column"),
        ('{"text": ""}\n', "text 1: column text holds no text"),
        (
            json.dumps({"text": "fish " * 600}) + "\n",
            "text 1 ('fish fish fish fish fish fish fish fish '): it has 600 tokens, and the model takes 1 to",
        ),
    ],
)
def test_files_that_cannot_be_scored_are_errors(content: str, message: str, model: Path, tmp_path: Path, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    assert main(["score", str(tmp_path / "in.jsonl"), "--model", str(model)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.distributed
def test_suite_gives_the_accuracies_of_the_scores(model: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        archive.writestr("data/pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in PAIRS))
        archive.writestr("__MACOSX/data/._pairs.jsonl", b"\x00\x01")
    arguments = ["evaluate", "--suite", "blimp", "--model", str(model), "--data", str(tmp_path / "pairs.zip")]
    out = tmp_path / "out"
    assert run_world(call, 2, [*arguments, "--predictions", str(out), "--batch-slots", "64"]) == [0, 0]
    results = json.loads((out / "scores.json").read_text())
    assert results.keys() == {"par", "pll"}
    for method, result in results.items():
        rows = lines(out / f"pairs-{method}.jsonl")
        assert [row["good"] for row in rows] == TEXTS
        won = [row["score_good"] > row["score_bad"] for row in rows]
        assert result["accuracy"] == pytest.approx(sum(won) / len(won))
        assert result["pairs"] == len(PAIRS)
        assert result["terms"] == {"length": result["accuracy"]}
        assert result["paradigms"]["paradigm_0"] == pytest.approx(sum(won[::2]) / 4)
    # The scores are those of `pmlm score`.
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": text} for text in TEXTS])
    assert main(["score", str(good), "--model", str(model), "--output", str(tmp_path / "good")]) == 0
    scores = [row["score"] for row in lines(tmp_path / "good")]
    assert scores == pytest.approx([row["score_good"] for row in lines(out / "pairs-par.jsonl")], abs=1e-4)


def test_model_with_equal_logits_wins_one_half(model: Path, tmp_path: Path):
    pretrained = open_pretrained(model)
    for weight in pretrained.weights.values():
        weight.zero_()
    save_pretrained(pretrained, tmp_path / "flat")
    pairs = [{GOOD: f"fish {first} swims", BAD: f"fish {second} swims"} for first, second in (("red", "fish"),) * 3]
    write_jsonl(tmp_path / "data" / "swaps.jsonl", pairs)
    arguments = ["evaluate", "--suite", "blimp", "--model", str(tmp_path / "flat"), "--data", str(tmp_path / "data")]
    assert main([*arguments, "--predictions", str(tmp_path / "out")]) == 0
    for result in json.loads((tmp_path / "out" / "scores.json").read_text()).values():
        assert (result["accuracy"], result["ties"]) == (0.5, 3)
        assert result["paradigms"] == {"swaps": 0.5}


def test_tie_counts_one_half_and_groups_are_apart():
    pairs = [MinimalPair(paradigm, term, "a", "b") for paradigm, term in (("p", "s"), ("p", "s"), ("q", "t"))]
    result = accuracies(pairs, [0.3, 1e-6, -0.2])
    assert result["accuracy"] == 0.5
    assert result["terms"] == {"s": 0.75, "t": 0.0}
    assert result["paradigms"] == {"p": 0.75, "q": 0.0}


def test_first_pairs_of_each_paradigm_are_read(tmp_path: Path):
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    assert [pair.good for pair in read_pairs(path, most=1)] == TEXTS[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"pairs.jsonl, line 2: not JSON"),
        (json.dumps({GOOD: "a"}), r"pairs.jsonl, line 2: it needs the fields sentence_good and sentence_bad"),
        (json.dumps([1]), r"pairs.jsonl, line 2: it needs the fields"),
        (json.dumps({GOOD: "a", BAD: "half a pair: \udc80"}), r"pairs.jsonl, line 2: it needs the fields"),
    ],
)
def test_line_without_a_pair_is_an_error(line: str, message: str, tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_pairs(tmp_path)


def test_source_without_pairs_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no .jsonl file"):
        read_pairs(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_pairs(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("pairs.jsonl", json.dumps(PAIRS[0]))
    content = bytearray((tmp_path / "locked.zip").read_bytes())
    for offset in (6, content.index(b"PK\x01\x02") + 8):
        content[offset] |= 1  # encrypted
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read: .*encrypted"):
        read_pairs(tmp_path / "locked.zip")


def test_suite_ended_in_its_second_method_is_resumed(model: Path, tmp_path: Path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    out = tmp_path / "out"
    command = ["evaluate", "--suite", "blimp", "--model", str(model), "--data", str(source), "--batch-slots", "64"]

    def interrupt(model: Any, texts: Any, *, method: str, **settings: Any) -> list[list[float]]:
        if method == "pll":
            raise KeyboardInterrupt
        return score_texts(model, texts, method="par", **settings)

    with monkeypatch.context() as patch:
        patch.setattr(score, "score_texts", interrupt)
        assert main([*command, "--predictions", str(out)]) == 130
    assert main([*command, "--predictions", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"pairs-par.jsonl", "pairs-pll.jsonl", "scores.json"}
    for path in out.glob("pairs-*"):
        path.unlink()
    assert main([*command, "--predictions", str(out)]) == 2
    assert "scores.json exists already, and nothing is overwritten" in capsys.readouterr().err
