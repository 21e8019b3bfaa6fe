"""The released UniLM format: read as the authors' code reads it, and written so that it is read the same."""

from __future__ import annotations

import json

import pytest
import torch
from support.random_models import WORDS, bert_folder, own_answers, random_pretrained, random_text, saved
from transformers import MPNetConfig, MPNetForMaskedLM

from pmlm_dist import cli
from pmlm_dist.conversion.export import export
from pmlm_dist.conversion.huggingface import as_mpnet
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.pretrained import open_pretrained


def released(folder, *, relative_bias: torch.Tensor | None = None, named: str | None = None):
    """A BERT without biases of keys, as UniLM's file has it; the BERT in double precision."""
    bert = bert_folder(folder)
    for layer in bert.bert.encoder.layer:
        layer.attention.self.key.bias.data.zero_()
    tensors = {name: tensor.float() for name, tensor in bert.state_dict().items() if "decoder" not in name}
    for layer in range(2):
        place = f"bert.encoder.layer.{layer}.attention.self"
        parts = [tensors.pop(f"{place}.{part}.weight") for part in ("query", "key", "value")]
        tensors[f"{place}.qkv_linear.weight"] = torch.cat(parts)
        tensors[f"{place}.q_bias"] = tensors.pop(f"{place}.query.bias").view(1, 1, -1)
        tensors[f"{place}.v_bias"] = tensors.pop(f"{place}.value.bias").view(1, 1, -1)
        del tensors[f"{place}.key.bias"]
    settings = json.loads((folder / "config.json").read_text())
    if relative_bias is not None:
        tensors["bert.encoder.rel_pos_bias.weight"] = relative_bias
        settings |= {"rel_pos_bins": relative_bias.shape[1], "max_rel_pos": 128}
    del settings["model_type"]
    (folder / "model.safetensors").unlink()
    start = f"{named}-" if named else ""
    (folder / "config.json").unlink()
    (folder / f"{start}config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").rename(folder / f"{start}vocab.txt")
    torch.save(tensors, folder / (f"{named}.bin" if named else "pytorch_model.bin"))
    return bert


@torch.no_grad()
@pytest.mark.parametrize("named", [None, "unilm1.2-base-uncased"])
def test_fused_weights_without_relative_bias_compute_what_bert_does(tmp_path, named):
    bert, (ids_BT, segments_BT, valid_BT) = released(tmp_path, named=named), random_text()
    found = read_pretrained(tmp_path / f"{named}.bin" if named else tmp_path)
    assert found.facts["format"] == "unilm"
    expected = bert(input_ids=ids_BT, token_type_ids=segments_BT, attention_mask=valid_BT.long()).logits
    _, logits = own_answers(found, ids_BT, segments_BT, valid_BT)
    torch.testing.assert_close(logits[valid_BT], expected[valid_BT], rtol=0, atol=1e-11)


@torch.no_grad()
def test_the_relative_bias_is_used_as_mpnet_uses_it(tmp_path):
    relative_bias = torch.randn(4, 32)
    released(tmp_path, relative_bias=relative_bias)
    found = read_pretrained(tmp_path)
    assert torch.equal(found.weights["relative_bias.weight"], relative_bias)
    mpnet_form = as_mpnet(found)
    mpnet = MPNetForMaskedLM(MPNetConfig(**mpnet_form.settings)).eval()
    mpnet.load_state_dict(mpnet_form.tensors, strict=False)
    ids_BT, segments_BT, valid_BT = random_text()
    swapped = torch.tensor([1, 0, *range(2, len(WORDS))])
    expected = mpnet(input_ids=swapped[ids_BT], attention_mask=valid_BT.long()).logits[..., swapped]
    _, logits = own_answers(found, ids_BT, torch.zeros_like(segments_BT), valid_BT)
    torch.testing.assert_close(logits[valid_BT].float(), expected[valid_BT], rtol=0, atol=1e-4)


@pytest.mark.parametrize("relative_bias", [True, False])
def test_what_is_written_is_read_back_and_answers_alike(tmp_path, relative_bias: bool):
    own = random_pretrained(relative_bias=relative_bias)
    export(saved(tmp_path / "own", relative_bias=relative_bias), format="unilm", output=tmp_path / "unilm")
    tensors = torch.load(tmp_path / "unilm" / "pytorch_model.bin", weights_only=True)
    assert tensors["bert.encoder.layer.0.attention.self.qkv_linear.weight"].shape == (96, 32)
    assert not any("key" in name for name in tensors)
    assert ("bert.encoder.rel_pos_bias.weight" in tensors) == relative_bias
    found, text = read_pretrained(tmp_path / "unilm"), random_text()
    assert found.model == own.model
    valid_BT = text[2]
    # biases of keys are left out: they change no softmax
    torch.testing.assert_close(own_answers(found, *text)[1][valid_BT], own_answers(own, *text)[1][valid_BT])


def test_the_way_there_and_back_keeps_the_segments(tmp_path):
    export(saved(tmp_path / "own"), format="unilm", output=tmp_path / "unilm")
    assert cli.main(["import", str(tmp_path / "unilm"), "--output", str(tmp_path / "again")]) == 0
    segments = open_pretrained(tmp_path / "again").weights["embeddings.segment.weight"]
    assert torch.equal(segments, random_pretrained().weights["embeddings.segment.weight"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bert.encoder.layer.0.attention.self.qkv_linear.weight": torch.zeros(95, 32)}, "query.weight [32, 32]"),
        ({"bert.encoder.layer.0.attention.self.k_bias": torch.zeros(32)}, "has no place for: bert.encoder.layer.0"),
        ({"bert.encoder.rel_pos_bias.weight": torch.zeros(4, 16)}, "has shape [4, 16]"),
        ({"bert.encoder.rel_pos_bias.weight": None}, "rel_pos_bins is 32, but the checkpoint has no"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, capsys, change, expected):
    folder = tmp_path / "unilm"
    released(folder, relative_bias=torch.randn(4, 32))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True) | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "pytorch_model.bin")
    assert cli.main(["import", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
