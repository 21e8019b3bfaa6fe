"""The format of the UniLM releases: imports compute what the authors' code does, and exports are imported unchanged."""

import json

import pytest
import torch
from support.random_models import WORDS, bert_folder, pmlm_outputs, random_pretrained, random_text, save_random_model
from transformers import MPNetConfig, MPNetForMaskedLM

from pmlm_dist import cli
from pmlm_dist.conversion.export import export
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.mpnet import to_mpnet
from pmlm_dist.conversion.pretrained import open_pretrained


def write_unilm_release(folder, *, relative_bias: torch.Tensor | None = None, named: str | None = None):
    """Write a BERT without biases of keys in UniLM's format; return the BERT in double precision."""
    bert = bert_folder(folder)
    for layer in bert.bert.encoder.layer:
        layer.attention.self.key.bias.data.zero_()
    tensors = {name: tensor.float() for name, tensor in bert.state_dict().items() if "decoder" not in name}
    for layer in range(2):
        module = f"bert.encoder.layer.{layer}.attention.self"
        parts = [tensors.pop(f"{module}.{part}.weight") for part in ("query", "key", "value")]
        tensors[f"{module}.qkv_linear.weight"] = torch.cat(parts)
        tensors[f"{module}.q_bias"] = tensors.pop(f"{module}.query.bias").view(1, 1, -1)
        tensors[f"{module}.v_bias"] = tensors.pop(f"{module}.value.bias").view(1, 1, -1)
        del tensors[f"{module}.key.bias"]
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
def test_fused_weights_without_relative_bias_have_berts_logits(tmp_path, named):
    bert, (ids_BT, segments_BT, valid_BT) = write_unilm_release(tmp_path, named=named), random_text()
    imported = read_pretrained(tmp_path / f"{named}.bin" if named else tmp_path)
    assert imported.facts["format"] == "unilm"
    expected = bert(input_ids=ids_BT, token_type_ids=segments_BT, attention_mask=valid_BT.long()).logits
    _, logits = pmlm_outputs(imported, ids_BT, segments_BT, valid_BT)
    torch.testing.assert_close(logits[valid_BT], expected[valid_BT], rtol=0, atol=1e-11)


def test_wrapped_and_padded_weights_are_imported(tmp_path):
    write_unilm_release(tmp_path, relative_bias=torch.randn(4, 32))
    expected = read_pretrained(tmp_path)
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:3]])
    tensors["cls.predictions.decoder_weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    torch.save({f"module._orig_mod.{name}": t for name, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    imported = read_pretrained(tmp_path)
    assert all(torch.equal(imported.weights[name], weight) for name, weight in expected.weights.items())
    assert len(imported.facts["notes"]) == 2


@torch.no_grad()
def test_relative_bias_has_mpnets_logits(tmp_path):
    relative_bias = torch.randn(4, 32)
    write_unilm_release(tmp_path, relative_bias=relative_bias)
    imported = read_pretrained(tmp_path)
    assert torch.equal(imported.weights["relative_bias.weight"], relative_bias)
    exported = to_mpnet(imported)
    mpnet = MPNetForMaskedLM(MPNetConfig(**exported.settings)).eval()
    mpnet.load_state_dict(exported.tensors, strict=False)
    ids_BT, segments_BT, valid_BT = random_text()
    mpnet_ids = torch.tensor([1, 0, *range(2, len(WORDS))])
    expected = mpnet(input_ids=mpnet_ids[ids_BT], attention_mask=valid_BT.long()).logits[..., mpnet_ids]
    _, logits = pmlm_outputs(imported, ids_BT, torch.zeros_like(segments_BT), valid_BT)
    torch.testing.assert_close(logits[valid_BT].float(), expected[valid_BT], rtol=0, atol=1e-4)


@pytest.mark.parametrize("relative_bias", [True, False])
def test_exported_model_is_imported_with_equal_logits(tmp_path, relative_bias: bool):
    pretrained = random_pretrained(relative_bias=relative_bias)
    export(
        save_random_model(tmp_path / "source", relative_bias=relative_bias), format="unilm", output=tmp_path / "unilm"
    )
    tensors = torch.load(tmp_path / "unilm" / "pytorch_model.bin", weights_only=True)
    assert tensors["bert.encoder.layer.0.attention.self.qkv_linear.weight"].shape == (96, 32)
    assert not any("key" in name for name in tensors)
    assert ("bert.encoder.rel_pos_bias.weight" in tensors) == relative_bias
    imported, text = read_pretrained(tmp_path / "unilm"), random_text()
    assert imported.model == pretrained.model
    valid_BT = text[2]
    # close, not equal: softmax is invariant to the dropped biases of keys but for rounding
    torch.testing.assert_close(pmlm_outputs(imported, *text)[1][valid_BT], pmlm_outputs(pretrained, *text)[1][valid_BT])


def test_export_and_import_keep_the_segments(tmp_path):
    export(save_random_model(tmp_path / "source"), format="unilm", output=tmp_path / "unilm")
    assert cli.main(["import", str(tmp_path / "unilm"), "--output", str(tmp_path / "imported")]) == 0
    segments = open_pretrained(tmp_path / "imported").weights["embeddings.segment.weight"]
    assert torch.equal(segments, random_pretrained().weights["embeddings.segment.weight"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bert.encoder.layer.0.attention.self.qkv_linear.weight": torch.zeros(95, 32)}, "query.weight [32, 32]"),
        (
            {"bert.encoder.layer.0.attention.self.k_bias": torch.zeros(32)},
            "without a counterpart in this model: bert.encoder.layer.0",
        ),
        ({"bert.encoder.rel_pos_bias.weight": torch.zeros(4, 16)}, "has shape [4, 16]"),
        ({"bert.encoder.rel_pos_bias.weight": None}, "rel_pos_bins is 32, but the checkpoint has no"),
    ],
)
def test_import_of_mismatched_tensors_raises(tmp_path, capsys, change, expected):
    folder = tmp_path / "unilm"
    write_unilm_release(folder, relative_bias=torch.randn(4, 32))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True) | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "pytorch_model.bin")
    assert cli.main(["import", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
