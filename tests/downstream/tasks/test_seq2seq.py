"""Task seq2seq and `pmlm generate`: learning, equality over topologies, error messages, nothing overwritten."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_tasks import COLORS, KINDS, config, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import build_pretrained, open_pretrained, save_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.downstream.settings import FinetuneConfig, GenerationConfig, InputConfig, Recipe
from pmlm_dist.downstream.tasks.overlap import overlap_scores
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout
from pmlm_dist.metrics.run_log import read_metrics

GENERATION = GenerationConfig(10, 6, decoding=DecodingConfig(beam=2, max_length=6, no_repeat_ngram=0))


def pair_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """The target has kind and color of the source in reverse order, and a verb for every other row."""
    rows = []
    for number in range(first, first + count):
        color, kind = COLORS[number % 3], KINDS[(number // 3) % 3]
        filler = " ".join(["stands"] * (number % 4))
        target = f"{kind} {color}" if number % 2 else f"{kind} {color} swims"
        rows.append(
            {"id": f"p{number}", "src": f"{'who' if number % 2 else 'what'} {filler} {color} {kind}", "tgt": target}
        )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", pair_rows(37))
    write_jsonl(folder / "validation.jsonl", pair_rows(7, first=100))
    return folder


def seq2seq_config(model: Path, data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    inputs = changes.pop("inputs", InputConfig())
    return config(model, data, output, **{"task": "seq2seq", "generation": GENERATION, "inputs": inputs, **changes})


def learn(settings: FinetuneConfig) -> Any:
    from pmlm_dist.downstream.finetune import finetune

    return finetune(settings)


@pytest.fixture(scope="module")
def tuned(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A fine-tuned model, and its ROUGE-L."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    recipe = Recipe(lr=5e-3, batch=8, epochs=40, dropout=0.0)
    (runs,) = run_world(learn, 1, seq2seq_config(model, data, output, recipe=recipe, evaluate_every=100))
    return output, runs[0].scores["validation"]["rougeL"]


@pytest.mark.distributed
def test_finetuning_learns_to_generate(tuned: tuple[Path, float]):
    assert tuned[1] > 90
    lines = [json.loads(line) for line in (tuned[0] / "predictions-validation.jsonl").open()]
    assert [line["id"] for line in lines] == [row["id"] for row in pair_rows(7, first=100)]
    assert sum(line["prediction"] == line["reference"] for line in lines) >= 6
    scores = json.loads((tuned[0] / "scores.json").read_text())["scores"]["validation"]
    nll, tokens = (sum(line[f"reference_{name}"] for line in lines) for name in ("nll", "tokens"))
    assert scores["nll"] == nll / tokens < 0.5


@pytest.mark.distributed
def test_reference_nll_equals_nll_under_layout_of_decoding(tuned: tuple[Path, float]):
    pretrained = open_pretrained(tuned[0])
    network, special = build_pretrained(pretrained).eval(), special_ids(pretrained.vocabulary)
    rule = Seq2SeqRule(GENERATION.max_source, GENERATION.max_target, noise=False)
    lines = [json.loads(line) for line in (tuned[0] / "predictions-validation.jsonl").open()]
    for row, line in zip(pair_rows(7, first=100), lines, strict=True):
        source, target = (np.array(ids) for ids in pretrained.vocabulary.encode_batch([row["src"], row["tgt"]]))
        layout = build_seq2seq_layout(
            [(source, target)], sample_ids=[0], epochs=[0], seed=0, rule=rule, special=special
        )
        tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
        with torch.no_grad():
            logits_1MBV = network(inputs=SlotInputs.of(tensors), objectives=("par",))
        nll_M = -logits_1MBV[0, :, 0].log_softmax(dim=-1)[range(GENERATION.max_target), tensors["targets_BM"][0]]
        assert line["reference_nll"] == pytest.approx(float(nll_M @ tensors["weights_BM"][0]), abs=0.006)
        assert line["reference_tokens"] == len(target) + 1


@pytest.mark.distributed
def test_losses_and_predictions_are_equal_on_any_topology(model: Path, data: Path, tmp_path: Path):
    recipe = Recipe(lr=3e-3, batch=8, epochs=1, dropout=0.0)
    results = {}
    for name, ranks, tp, zero in (("single", 1, 1, 0), ("zero 3", 2, 1, 3), ("tensor", 2, 2, 1)):
        output = tmp_path / name
        run_world(learn, ranks, seq2seq_config(model, data, output, tp=tp, zero=zero, micro_batch=4, recipe=recipe))
        metrics = read_metrics(output).values()
        losses = [
            scalars[key] for scalars in metrics for key in ("train/loss", "train/gradient_norm") if key in scalars
        ]
        results[name] = losses, [json.loads(line) for line in (output / "predictions-validation.jsonl").open()]
    assert len(results["single"][0]) == 2 * 5  # 37 pairs in batches of 8
    for name in ("zero 3", "tensor"):
        code, output = run_generate(tmp_path / name, tmp_path / name, "--batch", "4", rows=pair_rows(7, first=100))
        assert code == 0  # one process loads the checkpoint of any topology
        predictions = [line["prediction"] for line in results["single"][1]]
        assert [json.loads(line)["prediction"] for line in output.open()] == predictions
        assert results[name][0] == pytest.approx(results["single"][0], rel=2e-4), name
        assert [line["prediction"] for line in results[name][1]] == predictions
        for line, single in zip(results[name][1], results["single"][1], strict=True):
            assert line == {**single, "reference_nll": pytest.approx(single["reference_nll"], abs=0.02)}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"src": "a fish", "other": "x"}], {}, "no column tgt or target or summary .*, there are src, other"),
        ([{"src": "a fish", "tgt": " "}], {}, "row 1: column tgt holds no text"),
        ([{"src": "", "tgt": "fish"}], {}, "row 1: column src holds no text"),
        ([{"src": "a fish", "tgt": "\u200b"}], {}, "row 1: .*tgt .*no t"),
        (pair_rows(3), {"generation": GenerationConfig(60, 6)}, r"60 tokens .*do not fit the model's 64 positions"),
        ([{"src": "fish " * 9, "tgt": "red"}], {"inputs": InputConfig(too_long="raise")}, "11 tokens, at most 10"),
        (pair_rows(3), {"generation": GenerationConfig(10, 6, 2.0)}, r"generation.target_mask_prob \(2.0\)"),
        (pair_rows(3), {"generation": GenerationConfig(10, 6, decoding=DecodingConfig(beam=0))},
         r"decoding.beam \(0\)"),
    ],
)  # fmt: skip
def test_invalid_rows_or_settings_raise_before_anything_is_written(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        learn(seq2seq_config(model, tmp_path / "data", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- pmlm generate


def run_generate(tuned: Path, tmp_path: Path, *flags: str, rows: Any = None) -> tuple[int, Path]:
    sources = write_jsonl(tmp_path / "in.jsonl", pair_rows(7, first=100) if rows is None else rows)
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "--model", str(tuned), "--input", str(sources), "--output", str(output), *flags]
    return main(arguments), output


def test_generate_with_saved_settings_equals_predictions_of_evaluation(tuned, tmp_path):
    code, output = run_generate(tuned[0], tmp_path, "--batch", "3")
    assert code == 0
    expected = [json.loads(line)["prediction"] for line in (tuned[0] / "predictions-validation.jsonl").open()]
    lines = [json.loads(line) for line in output.open()]
    assert [line["prediction"] for line in lines] == expected
    assert [line["id"] for line in lines] == [row["id"] for row in pair_rows(7, first=100)]
    assert all(line["ended"] and line["score"] < 0 for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]  # no temporary file


def generate_with(arguments: list[str]) -> int:
    return main(["generate", *arguments])


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_generate_on_several_ranks_equals_one_rank(tuned: tuple[Path, float], tmp_path: Path, method: str):
    sources = write_jsonl(tmp_path / "in.jsonl", pair_rows(11, first=100))  # of different lengths; shards of 4, 4 and 3
    arguments = ["--model", str(tuned[0]), "--input", str(sources), "--method", method, "--temperature", "3"]
    for name, ranks in (("one", 1), ("three", 3)):
        codes = run_world(generate_with, ranks, [*arguments, "--output", str(tmp_path / name)])
        assert codes == [0] * ranks
    one, three = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("one", "three"))
    assert [line["id"] for line in three] == [row["id"] for row in pair_rows(11, first=100)]
    assert [line["prediction"] for line in three] == [line["prediction"] for line in one]
    assert [line["score"] for line in three] == pytest.approx([line["score"] for line in one], abs=1e-5)


@pytest.mark.distributed
def test_generate_with_more_ranks_than_sources_and_error_on_all_ranks(tuned: tuple[Path, float], tmp_path: Path):
    sources = write_jsonl(tmp_path / "in.jsonl", pair_rows(1))
    arguments = ["--model", str(tuned[0]), "--input", str(sources), "--output", str(tmp_path / "out")]
    assert run_world(generate_with, 2, arguments) == [0, 0]
    assert len((tmp_path / "out").read_text().splitlines()) == 1
    assert run_world(generate_with, 2, arguments) == [2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--beam", "0"), "decoding.beam (0) must be positive"),
        (("--method", "sample", "--temperature", "0"), "for the likeliest: --method greedy"),
        (("--min-length", "6", "--max-length", "5"), "decoding.min_length (6) must be below decoding.max_length (5)"),
        (("--no-repeat-ngram", "-1"), "decoding.no_repeat_ngram (-1) must not be negative"),
        (("--num-return-sequences", "3", "--beam", "2"), "decoding.num_return_sequences (3)"),
        (("--seed", "-1"), "decoding.seed (-1) must not be negative"),
        (("--batch", "0"), "--batch (0) must be positive"),
        (("--length-penalty", "nan"), "decoding.length_penalty (nan) must be a finite number"),
        (("--method", "sample", "--temperature", "inf"), "decoding.temperature (inf) must be"),
        (("--max-length", "100"), "positions"),
    ],
)
def test_generate_with_invalid_setting_exits_with_message(tuned, tmp_path, capsys, flags, message):
    code, output = run_generate(tuned[0], tmp_path, *flags)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_no_repeat_ngram_longer_than_any_target_has_no_effect(tuned, tmp_path):
    before = run_generate(tuned[0], tmp_path)[1].read_text()
    (tmp_path / "out.jsonl").unlink()
    assert run_generate(tuned[0], tmp_path, "--no-repeat-ngram", "50")[1].read_text() == before


def test_generate_accepts_unusual_unicode_and_names_row_of_invalid_unicode(tuned, tmp_path, capsys):
    unusual = ["\u202egnol", "fish\x00bird", "\N{FISH} fish", "x" * 5000, "\r\nfish\u2028bird"]
    code, output = run_generate(tuned[0], tmp_path, "--too-long", "truncate", rows=[{"src": text} for text in unusual])
    assert code == 0
    assert [json.loads(line)["id"] for line in output.read_text().split("\n")[:-1]] == list(range(5))
    output.unlink()
    assert run_generate(tuned[0], tmp_path, rows=[{"src": "fish"}, {"src": "\ud800"}])[0] == 2
    assert "row 2: column src holds no text" in capsys.readouterr().err
    assert not output.exists()


def test_generate_from_tsv_returns_several_sequences(tuned, tmp_path):
    (tmp_path / "in.tsv").write_text("text\twho\nwho red fish\tx\nwhat blue bird\ty\n")
    arguments = ["--model", str(tuned[0]), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out")]
    assert main(["generate", *arguments, "--column", "text", "--beam", "3", "--num-return-sequences", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").open()]
    assert [len(line["others"]) for line in lines] == [2, 2]
    assert all(line["score"] >= line["others"][0]["score"] >= line["others"][1]["score"] for line in lines)


def test_generate_overwrites_nothing_and_reports_invalid_input(tuned, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("existing")
    assert run_generate(tuned[0], tmp_path)[0] == 2
    assert "exists already, and nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "existing"
    (tmp_path / "out.jsonl").unlink()
    below_a_file = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "in.jsonl" / "out")]
    assert main(["generate", "--model", str(tuned[0]), *below_a_file]) == 2
    assert "is no folder, or not within one" in capsys.readouterr().err
    long = [{"src": "red fish " * 9}]
    for rows, flags, message in (
        (long, (), "row 1: its source has 20 tokens, at most 10 fit"),
        ([{"words": "a"}], (), "no column src or source or text for the source, there are words: name it by --column"),
        ([{"src": "who"}, {"src": ""}], (), "row 2: column src holds no text"),
        ([], (), "is empty"),
        (long, ("--top-p", "0", "--min-length", "9"), "decoding.top_p (0.0)"),
    ):
        assert run_generate(tuned[0], tmp_path, *flags, rows=rows)[0] == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()
    assert run_generate(tuned[0], tmp_path, "--too-long", "truncate", rows=long)[0] == 0


def test_generate_with_nan_in_weights_exits_with_message(model, tmp_path, capsys):
    pretrained = open_pretrained(model)
    pretrained.weights["layers.0.ffn_in.bias"][0] = float("nan")
    save_pretrained(replace(pretrained, facts={}), tmp_path / "nan")
    code, output = run_generate(tmp_path / "nan", tmp_path)
    assert code == 2
    assert "are not finite (NaN)" in capsys.readouterr().err
    assert not output.exists()


def test_generate_and_fill_reject_model_of_other_task(model, data, tmp_path, capsys):
    rows = [{"text": row["src"], "label": row["tgt"].split()[1]} for row in pair_rows(9)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    recipe = Recipe(lr=1e-3, batch=8, epochs=1, dropout=0.0)
    run_world(learn, 1, config(model, tmp_path / "data", tmp_path / "classes", recipe=recipe))
    source, output = write_jsonl(tmp_path / "in.jsonl", pair_rows(1)), tmp_path / "predictions"
    for arguments in (["generate", "--input", str(source), "--output", str(output)], ["fill", "a [MASK]"]):
        assert main([*arguments, "--model", str(tmp_path / "classes")]) == 2
        assert "was fine-tuned for classification and cannot generate" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- scores


def test_rouge_and_bleu_equal_known_values():
    equal = overlap_scores(["the cat sat on the mat"], ["The cat sat on the mat"])
    assert equal == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100, "bleu": 100})
    # Common words in order: 3 of 4 and 5, F1 = 2 * 3 / 9; common bigrams: 1 of 3 and 4, F1 = 2 * 1 / 7.
    scores = overlap_scores(["a b x d"], ["a b c d e"])
    assert (scores["rouge1"], scores["rouge2"], scores["rougeL"]) == pytest.approx((200 / 3, 200 / 7, 200 / 3))


# ------------------------------------------------------------------------------------------------------------ start-up


@pytest.mark.full
def test_commands_that_do_not_train_do_not_import_deepspeed():
    """DeepSpeed takes seconds to import, and prints to stdout, which programs parse."""
    code = "import sys, pmlm_dist.commands.fill, pmlm_dist.downstream.evaluate; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
