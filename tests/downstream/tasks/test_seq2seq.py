"""Fine-tuning to write, and the commands that write: any topology, learnable, refusals, nothing overwritten."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_tasks import COLOURS, KINDS, config, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.commands.generate import read_masks
from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.pretrained import build_pretrained, open_pretrained, save_pretrained
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.settings import DecodingConfig
from pmlm_dist.downstream.settings import FinetuneConfig, GenerationConfig, InputConfig, Recipe
from pmlm_dist.downstream.tasks.overlap import overlap_scores
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout
from pmlm_dist.metrics.run_log import read_metrics

WRITING = GenerationConfig(10, 6, decoding=DecodingConfig(beam=2, max_length=6, no_repeat_ngram=0))


def pair_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """The target names kind and colour of the source, in the other order, then what it does."""
    rows = []
    for number in range(first, first + count):
        colour, kind = COLOURS[number % 3], KINDS[(number // 3) % 3]
        filler = " ".join(["stands"] * (number % 4))
        target = f"{kind} {colour}" if number % 2 else f"{kind} {colour} swims"
        rows.append(
            {"id": f"p{number}", "src": f"{'who' if number % 2 else 'what'} {filler} {colour} {kind}", "tgt": target}
        )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", pair_rows(37))
    write_jsonl(folder / "validation.jsonl", pair_rows(7, first=100))
    return folder


def generation(model: Path, data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    inputs = changes.pop("inputs", InputConfig())
    return config(model, data, output, **{"task": "seq2seq", "generation": WRITING, "inputs": inputs, **changes})


def learn(wanted: FinetuneConfig) -> Any:
    from pmlm_dist.downstream.finetune import finetune

    return finetune(wanted)


@pytest.fixture(scope="module")
def tuned(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A model that has learned the task, and its ROUGE-L."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    recipe = Recipe(lr=5e-3, batch=8, epochs=40, dropout=0.0)
    (trials,) = run_world(learn, 1, generation(model, data, output, recipe=recipe, evaluate_every=100))
    return output, trials[0].scores["validation"]["rougeL"]


@pytest.mark.distributed
def test_the_network_learns_to_write(tuned: tuple[Path, float]):
    assert tuned[1] > 90
    lines = [json.loads(line) for line in (tuned[0] / "predictions-validation.jsonl").open()]
    assert [line["id"] for line in lines] == [row["id"] for row in pair_rows(7, first=100)]
    assert sum(line["prediction"] == line["reference"] for line in lines) >= 6
    scores = json.loads((tuned[0] / "scores.json").read_text())["scores"]["validation"]
    nll, tokens = (sum(line[f"reference_{what}"] for line in lines) for what in ("nll", "tokens"))
    assert scores["nll"] == nll / tokens < 0.5


@pytest.mark.distributed
def test_the_likelihood_of_a_reference_is_that_under_the_layout_of_decoding(tuned: tuple[Path, float]):
    found = open_pretrained(tuned[0])
    network, special = build_pretrained(found).eval(), special_ids(found.vocabulary)
    rule = Seq2SeqRule(WRITING.max_source, WRITING.max_target, noise=False)
    lines = [json.loads(line) for line in (tuned[0] / "predictions-validation.jsonl").open()]
    for row, line in zip(pair_rows(7, first=100), lines, strict=True):
        source, target = (np.array(ids) for ids in found.vocabulary.encode_batch([row["src"], row["tgt"]]))
        layout = build_seq2seq_layout(
            [(source, target)], sample_ids=[0], epochs=[0], seed=0, rule=rule, special=special
        )
        tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
        with torch.no_grad():
            logits_1MBV = network(inputs=SlotInputs.of(tensors), objectives=("par",))
        nats_M = -logits_1MBV[0, :, 0].log_softmax(dim=-1)[range(WRITING.max_target), tensors["targets_BM"][0]]
        assert line["reference_nll"] == pytest.approx(float(nats_M @ tensors["weights_BM"][0]), abs=0.006)
        assert line["reference_tokens"] == len(target) + 1


@pytest.mark.distributed
def test_losses_and_predictions_are_those_of_a_single_process_on_any_topology(model: Path, data: Path, tmp_path: Path):
    recipe = Recipe(lr=3e-3, batch=8, epochs=1, dropout=0.0)
    found = {}
    for name, ranks, tp, zero in (("single", 1, 1, 0), ("zero 3", 2, 1, 3), ("tensor", 2, 2, 1)):
        output = tmp_path / name
        run_world(learn, ranks, generation(model, data, output, tp=tp, zero=zero, micro_batch=4, recipe=recipe))
        metrics = read_metrics(output).values()
        losses = [
            scalars[key] for scalars in metrics for key in ("train/loss", "train/gradient_norm") if key in scalars
        ]
        found[name] = losses, [json.loads(line) for line in (output / "predictions-validation.jsonl").open()]
    assert len(found["single"][0]) == 2 * 5  # 37 pairs in batches of 8
    for name in ("zero 3", "tensor"):
        code, answers = generated(tmp_path / name, tmp_path / name, "--batch", "4", rows=pair_rows(7, first=100))
        assert code == 0  # one process answers from what any topology has saved
        said = [line["prediction"] for line in found["single"][1]]
        assert [json.loads(line)["prediction"] for line in answers.open()] == said
        assert found[name][0] == pytest.approx(found["single"][0], rel=2e-4), name
        assert [line["prediction"] for line in found[name][1]] == said
        for line, single in zip(found[name][1], found["single"][1], strict=True):
            assert line == {**single, "reference_nll": pytest.approx(single["reference_nll"], abs=0.02)}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"src": "a fish", "other": "x"}], {}, "no column tgt or target or summary .*, there are src, other"),
        ([{"src": "a fish", "tgt": " "}], {}, "row 1: column tgt holds no text"),
        ([{"src": "", "tgt": "fish"}], {}, "row 1: column src holds no text"),
        ([{"src": "a fish", "tgt": "\u200b"}], {}, "row 1: .*tgt .*no t"),
        (pair_rows(3), {"generation": GenerationConfig(60, 6)}, r"60 tokens .*do not fit the model's 64 positions"),
        ([{"src": "fish " * 9, "tgt": "red"}], {"inputs": InputConfig(too_long="refuse")}, "11 tokens, at most 10"),
        (pair_rows(3), {"generation": GenerationConfig(10, 6, 2.0)}, r"generation.target_mask_prob \(2.0\)"),
        (pair_rows(3), {"generation": GenerationConfig(10, 6, decoding=DecodingConfig(beam=0))}, r"decoding.beam \(0\)"),
    ],
)  # fmt: skip
def test_invalid_settings_raise_one_message_and_write_nothing(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        learn(generation(model, tmp_path / "data", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- pmlm generate


def generated(tuned: Path, tmp_path: Path, *flags: str, rows: Any = None) -> tuple[int, Path]:
    sources = write_jsonl(tmp_path / "in.jsonl", pair_rows(7, first=100) if rows is None else rows)
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "--model", str(tuned), "--input", str(sources), "--output", str(output), *flags]
    return main(arguments), output


def test_generate_writes_what_the_evaluation_wrote_with_the_settings_of_the_fine_tuning(tuned, tmp_path):
    code, output = generated(tuned[0], tmp_path, "--batch", "3")
    assert code == 0
    said = [json.loads(line)["prediction"] for line in (tuned[0] / "predictions-validation.jsonl").open()]
    lines = [json.loads(line) for line in output.open()]
    assert [line["prediction"] for line in lines] == said
    assert [line["id"] for line in lines] == [row["id"] for row in pair_rows(7, first=100)]
    assert all(line["ended"] and line["score"] < 0 for line in lines)
    assert not list(tmp_path.glob(".*"))


def generate_with(arguments: list[str]) -> int:
    return main(["generate", *arguments])


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_ranks_share_the_sources_and_keep_their_order(tuned: tuple[Path, float], tmp_path: Path, method: str):
    sources = write_jsonl(tmp_path / "in.jsonl", pair_rows(11, first=100))  # of different lengths; 11 = 4 + 4 + 3
    arguments = ["--model", str(tuned[0]), "--input", str(sources), "--method", method, "--temperature", "3"]
    for name, ranks in (("alone", 1), ("three", 3)):
        codes = run_world(generate_with, ranks, [*arguments, "--output", str(tmp_path / name)])
        assert codes == [0] * ranks
    alone, three = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("alone", "three"))
    assert [line["id"] for line in three] == [row["id"] for row in pair_rows(11, first=100)]
    assert [line["prediction"] for line in three] == [line["prediction"] for line in alone]
    assert [line["score"] for line in three] == pytest.approx([line["score"] for line in alone], abs=1e-5)


@pytest.mark.distributed
def test_more_ranks_than_sources_and_refusals_on_all_ranks(tuned: tuple[Path, float], tmp_path: Path):
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
def test_odd_settings_are_refused(tuned, tmp_path, capsys, flags, message):
    code, output = generated(tuned[0], tmp_path, *flags)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_rules_larger_than_any_answer_forbid_nothing(tuned, tmp_path):
    before = generated(tuned[0], tmp_path)[1].read_text()
    (tmp_path / "out.jsonl").unlink()
    assert generated(tuned[0], tmp_path, "--no-repeat-ngram", "50")[1].read_text() == before


def test_odd_texts_are_answered_or_refused_by_their_row(tuned, tmp_path, capsys):
    odd = ["\u202egnol", "fish\x00bird", "\N{FISH} fish", "x" * 5000, "\r\nfish\u2028bird"]
    code, output = generated(tuned[0], tmp_path, "--too-long", "truncate", rows=[{"src": text} for text in odd])
    assert code == 0
    assert [json.loads(line)["id"] for line in output.read_text().split("\n")[:-1]] == list(range(5))
    output.unlink()
    assert generated(tuned[0], tmp_path, rows=[{"src": "fish"}, {"src": "\ud800"}])[0] == 2
    assert "row 2: column src holds no text" in capsys.readouterr().err
    assert not output.exists()


def test_generate_with_other_settings_and_a_table(tuned, tmp_path):
    (tmp_path / "in.tsv").write_text("text\twho\nwho red fish\tx\nwhat blue bird\ty\n")
    arguments = ["--model", str(tuned[0]), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out")]
    assert main(["generate", *arguments, "--column", "text", "--beam", "3", "--num-return-sequences", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out").open()]
    assert [len(line["others"]) for line in lines] == [2, 2]
    assert all(line["score"] >= line["others"][0]["score"] >= line["others"][1]["score"] for line in lines)


def test_generate_overwrites_nothing_and_says_what_does_not_fit(tuned, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    assert generated(tuned[0], tmp_path)[0] == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    (tmp_path / "out.jsonl").unlink()
    inside_a_file = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "in.jsonl" / "out")]
    assert main(["generate", "--model", str(tuned[0]), *inside_a_file]) == 2
    assert "cannot be a folder" in capsys.readouterr().err
    long = [{"src": "red fish " * 9}]
    for rows, flags, message in (
        (long, (), "row 1: its source has 20 tokens, at most 10 fit"),
        ([{"words": "a"}], (), "no column src or source or text"),
        ([{"src": "who"}, {"src": ""}], (), "row 2: column src holds no text"),
        ([], (), "is empty"),
        (long, ("--top-p", "0", "--min-length", "9"), "decoding.top_p (0.0)"),
    ):
        assert generated(tuned[0], tmp_path, *flags, rows=rows)[0] == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out.jsonl").exists()
    assert generated(tuned[0], tmp_path, "--too-long", "truncate", rows=long)[0] == 0


def test_a_nan_in_the_weights_is_one_clear_message(model, tmp_path, capsys):
    pretrained = open_pretrained(model)
    pretrained.weights["layers.0.ffn_in.bias"][0] = float("nan")
    save_pretrained(replace(pretrained, facts={}), tmp_path / "broken")
    code, output = generated(tmp_path / "broken", tmp_path)
    assert code == 2
    assert "are not finite (NaN)" in capsys.readouterr().err
    assert not output.exists()


def test_a_model_of_another_task_cannot_write(model, data, tmp_path, capsys):
    rows = [{"text": row["src"], "label": row["tgt"].split()[1]} for row in pair_rows(9)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    recipe = Recipe(lr=1e-3, batch=8, epochs=1, dropout=0.0)
    run_world(learn, 1, config(model, tmp_path / "data", tmp_path / "classes", recipe=recipe))
    source, output = write_jsonl(tmp_path / "in.jsonl", pair_rows(1)), tmp_path / "answers"
    for arguments in (["generate", "--input", str(source), "--output", str(output)], ["fill", "a [MASK]"]):
        assert main([*arguments, "--model", str(tmp_path / "classes")]) == 2
        assert "was fine-tuned for classification and cannot write" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- pmlm fill, lengthen


def test_masks_are_read_at_their_places(model):
    vocabulary = open_pretrained(model).vocabulary
    masked = read_masks("the [MASK] fish [MASK:2].", vocabulary, positions=9)
    tokens = [vocabulary.token(id) for id in masked.ids]
    assert tokens == ["[CLS]", "the", "[MASK]", "fish", "[MASK]", "[MASK]", ".", "[SEP]"]
    assert masked.spans == [[2], [4, 5]]


@pytest.mark.parametrize("order", ["ae", "left", "right", "confidence", "2,1"])
def test_fill_prints_the_text_and_its_alternatives(model, capsys, order):
    arguments = ["fill", "the [MASK] fish [MASK:2].", "--model", str(model), "--order", order]
    assert main([*arguments, "--json", "--alternatives", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [mask["mask"] for mask in said["masks"]] == [1, 2, 2]
    assert all(len(mask["choices"]) == 3 for mask in said["masks"])
    assert said["masks"][0]["choices"][0]["token"] in said["text"]
    assert main(arguments) == 0
    assert "mask 2, step" in capsys.readouterr().out


def filled(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return main(["fill", *arguments]), said.getvalue()


@pytest.mark.distributed
def test_of_several_ranks_one_prints_what_was_filled(model):
    (code, alone), (other_code, said) = run_world(filled, 2, ["a [MASK] fish", "--model", str(model)])
    assert (code, other_code) == (0, 0)
    assert "mask 1, step 1" in alone
    assert not said


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("no mask here", [], "there is nothing to fill"),
        ("a [MASK:0]", [], "stands for no token"),
        ("a [MASK:65]", [], "[MASK:65] stands for more tokens than the model has positions, 64"),
        ("a [MASK:99999999999999999999]", [], "is no mask"),
        ("a [MASK] and [MASK:-1]", [], "[MASK:-1] is no mask: put [MASK] for a token"),
        ("caf\udce9 [MASK]", [], "the text is not UTF-8"),
        ("a [MASK]", ["--order", "1,2"], "--order (1,2) must be ae, left, right, confidence"),
        ("a " * 70 + "[MASK]", [], "the text has 73 tokens, the model 64 positions"),
        ("a [MASK]", ["--alternatives", "0"], "--alternatives (0)"),
    ],
)
def test_fill_says_what_does_not_fit(model, capsys, text, flags, message):
    assert main(["fill", text, "--model", str(model), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_lengthened_model_has_more_positions_and_computes_the_same_before_them(model, tmp_path, capsys):
    assert main(["extend-positions", str(model), "--positions", "150", "--output", str(tmp_path / "long")]) == 0
    before, after = open_pretrained(model), open_pretrained(tmp_path / "long")
    assert after.model.max_positions == 150
    name = "embeddings.position.weight"
    assert torch.equal(after.weights[name][:64], before.weights[name])
    assert torch.equal(after.weights[name][128:], before.weights[name][:22])
    assert all(torch.equal(after.weights[n], w) for n, w in before.weights.items() if n != name)
    assert main(["extend-positions", str(model), "--positions", str(10**15), "--output", str(tmp_path / "huge")]) == 81
    assert "pmlm: out of memory" in capsys.readouterr().err
    assert not (tmp_path / "huge").exists()
    assert main(["extend-positions", str(model), "--positions", "64", "--output", str(tmp_path / "same")]) == 2
    assert "--positions (64) must exceed the model's 64" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- scores


def test_rouge_and_bleu_of_known_texts():
    same = overlap_scores(["the cat sat on the mat"], ["The cat sat on the mat"])
    assert same == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100, "bleu": 100})
    # 3 of 4 and of 5 words in common, in order; 1 of 3 and of 4 pairs: F1 = 2 * 3 / 9 and 2 * 1 / 7.
    found = overlap_scores(["a b x d"], ["a b c d e"])
    assert (found["rouge1"], found["rouge2"], found["rougeL"]) == pytest.approx((200 / 3, 200 / 7, 200 / 3))


# ------------------------------------------------------------------------------------------------------------ start-up


def test_answering_needs_no_training_engine():
    """DeepSpeed takes seconds to start, and writes to what programs read."""
    code = "import sys, pmlm_dist.commands.generate; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
