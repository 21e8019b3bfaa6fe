"""`pmlm fill`: parsing of masks, orders of filling, output, error messages."""

import contextlib
import io
import json

import pytest
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.commands.fill import read_masks
from pmlm_dist.conversion.pretrained import open_pretrained


def test_read_masks_returns_ids_and_positions(model):
    vocabulary = open_pretrained(model).vocabulary
    masked = read_masks("the [MASK] fish [MASK:2].", vocabulary, positions=9)
    tokens = [vocabulary.tokens[id] for id in masked.ids]
    assert tokens == ["[CLS]", "the", "[MASK]", "fish", "[MASK]", "[MASK]", ".", "[SEP]"]
    assert masked.spans == [[2], [4, 5]]


@pytest.mark.parametrize("order", ["ae", "left", "right", "confidence", "2,1"])
def test_fill_prints_text_and_alternatives(model, capsys, order):
    arguments = ["fill", "the [MASK] fish [MASK:2].", "--model", str(model), "--order", order]
    assert main([*arguments, "--json", "--alternatives", "3"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert [mask["mask"] for mask in output["masks"]] == [1, 2, 2]
    assert all(len(mask["choices"]) == 3 for mask in output["masks"])
    assert output["masks"][0]["choices"][0]["token"] in output["text"]
    assert main(arguments) == 0
    assert "mask 2, step" in capsys.readouterr().out


def run_fill(arguments: list[str]) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        return main(["fill", *arguments]), output.getvalue()


@pytest.mark.distributed
def test_fill_prints_on_rank_zero_only(model):
    (code, output), (other_code, other_output) = run_world(run_fill, 2, ["a [MASK] fish", "--model", str(model)])
    assert (code, other_code) == (0, 0)
    assert "mask 1, step 1" in output
    assert not other_output


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("no mask here", [], "there is nothing to fill"),
        ("a [MASK:0]", [], "has no token"),
        ("a [MASK:65]", [], "[MASK:65] has more tokens than the model has positions, 64"),
        ("a [MASK:99999999999999999999]", [], "is not a valid mask"),
        ("a [MASK] and [MASK:-1]", [], "[MASK:-1] is not a valid mask: put [MASK] for a token"),
        ("caf\udce9 [MASK]", [], "the text is not UTF-8"),
        ("a [MASK]", ["--order", "1,2"], "--order (1,2) must be ae, left, right, confidence"),
        ("a " * 70 + "[MASK]", [], "the text has 73 tokens, the model 64 positions"),
        ("a [MASK]", ["--alternatives", "0"], "--alternatives (0) must be positive"),
    ],
)
def test_fill_with_invalid_text_or_setting_exits_with_message(model, capsys, text, flags, message):
    assert main(["fill", text, "--model", str(model), *flags]) == 2
    assert message in capsys.readouterr().err
