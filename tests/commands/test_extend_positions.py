"""`pmlm extend-positions`: the new embeddings, and error messages."""

import torch

from pmlm_dist.cli import main
from pmlm_dist.conversion.pretrained import open_pretrained


def test_extended_model_repeats_position_embeddings_and_keeps_other_weights(model, tmp_path):
    assert main(["extend-positions", str(model), "--positions", "150", "--output", str(tmp_path / "long")]) == 0
    before, after = open_pretrained(model), open_pretrained(tmp_path / "long")
    assert after.model.max_positions == 150
    name = "embeddings.position.weight"
    assert torch.equal(after.weights[name][:64], before.weights[name])
    assert torch.equal(after.weights[name][128:], before.weights[name][:22])
    assert all(torch.equal(after.weights[n], w) for n, w in before.weights.items() if n != name)


def test_extend_positions_out_of_memory_exits_with_message(model, tmp_path, capsys):
    assert main(["extend-positions", str(model), "--positions", str(10**15), "--output", str(tmp_path / "huge")]) == 81
    assert "pmlm: out of memory" in capsys.readouterr().err
    assert not (tmp_path / "huge").exists()


def test_extend_positions_without_increase_exits_with_message(model, tmp_path, capsys):
    assert main(["extend-positions", str(model), "--positions", "64", "--output", str(tmp_path / "same")]) == 2
    assert "--positions (64) must exceed the model's 64" in capsys.readouterr().err
