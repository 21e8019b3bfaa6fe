"""What `transformers` saved is read so that the same comes out, and nothing of it is passed over without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.random_models import (
    MPNET_WORDS,
    WORDS,
    bert_folder,
    mpnet_folder,
    own_answers,
    random_pretrained,
    random_text,
)
from transformers import BertForPreTraining, BertModel

from pmlm_dist import cli
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.pretrained import open_pretrained, save_pretrained
from pmlm_dist.conversion.tensors import RELATIVE_BIAS


def asked(ids_BT, segments_BT, valid_BT) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_BT, "token_type_ids": segments_BT, "attention_mask": valid_BT.long()}


@torch.no_grad()
def test_bert_gives_its_logits(tmp_path):
    bert, text = bert_folder(tmp_path), random_text()
    expected = bert(**asked(*text)).logits
    found = read_pretrained(tmp_path)
    assert not found.model.relative_bias
    torch.testing.assert_close(own_answers(found, *text)[1][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    assert found.facts["notes"] == []


@torch.no_grad()
def test_a_bare_encoder_gets_a_drawn_head_and_says_so(tmp_path):
    bert, text = bert_folder(tmp_path, kind=BertModel), random_text()
    expected = bert(**asked(*text)).last_hidden_state
    found = read_pretrained(tmp_path)
    torch.testing.assert_close(own_answers(found, *text)[0][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    pooler, head = found.facts["notes"]
    assert "bert.pooler.dense.weight" in pooler
    assert "head.dense is drawn anew" in head
    assert 0.015 < found.weights["head.dense.weight"].std() < 0.025
    assert torch.equal(read_pretrained(tmp_path).weights["head.dense.weight"], found.weights["head.dense.weight"])


@torch.no_grad()
def test_bert_for_pre_training_loses_its_pair_classifier_and_says_so(tmp_path):
    bert, text = bert_folder(tmp_path, kind=BertForPreTraining), random_text()
    found = read_pretrained(tmp_path)
    expected = bert(**asked(*text)).prediction_logits
    torch.testing.assert_close(own_answers(found, *text)[1][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    (note,) = found.facts["notes"]
    assert "cls.seq_relationship.weight" in note


@torch.no_grad()
def test_mpnet_gives_its_logits_and_its_special_tokens_their_parts(tmp_path):
    mpnet = mpnet_folder(tmp_path)
    found = read_pretrained(tmp_path)
    words = found.vocabulary
    assert [words.token(id) for id in (0, 1, 2, 50 - 2)] == ["[CLS]", "[PAD]", "[SEP]", "[MASK]"]
    assert words.token(MPNET_WORDS.index("[UNK]")) == "[UNK]"
    idle = [MPNET_WORDS.index(word) for word in ("<unk>", "[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert all(id in words.special_ids for id in idle if id < len(MPNET_WORDS))
    ids_BT, segments_BT, valid_BT = random_text()
    ids_BT = (ids_BT + 1).clamp(2, len(MPNET_WORDS) - 1).masked_fill(~valid_BT, 1)
    expected = mpnet(input_ids=ids_BT, attention_mask=valid_BT.long()).logits
    _, logits = own_answers(found, ids_BT, segments_BT, valid_BT)  # both segments are zero: they may be anything
    torch.testing.assert_close(logits[valid_BT], expected[valid_BT], rtol=0, atol=1e-11)


@pytest.mark.parametrize("spelling", ["gamma", "bin", "half"])
def test_old_spellings_and_other_files_are_read_alike(tmp_path, spelling: str):
    bert_folder(tmp_path)
    expected = read_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if spelling == "gamma":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, before in old.items():
            tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    if spelling == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if spelling == "bin":
        (tmp_path / "model.safetensors").unlink()
        tensors["bert.embeddings.position_ids"] = torch.arange(48)[None]
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    found = read_pretrained(tmp_path)
    for name, weight in expected.weights.items():
        right = weight.bfloat16().float() if spelling == "half" else weight
        assert torch.equal(found.weights[name], right), name


def test_a_corpus_vocabulary_in_another_order_is_taken_over(tmp_path, capsys):
    export_of = random_pretrained()
    save_pretrained(export_of, tmp_path / "own")
    assert cli.main(["export", str(tmp_path / "own"), "--format", "mpnet", "--output", str(tmp_path / "mpnet")]) == 0
    corpus = tmp_path / "corpus"
    export_of.vocabulary.save(corpus)
    command = ["import", str(tmp_path / "mpnet"), "--output", str(tmp_path / "again"), "--vocabulary", str(corpus)]
    assert cli.main(command) == 0
    assert "--model.hidden-size 32" in capsys.readouterr().out
    again = open_pretrained(tmp_path / "again")
    assert again.vocabulary.fingerprint == export_of.vocabulary.fingerprint
    for name, weight in export_of.weights.items():
        if name not in ("embeddings.position.weight", "embeddings.segment.weight"):
            assert torch.equal(again.weights[name], weight), name
    folded = export_of.weights["embeddings.position.weight"] + export_of.weights["embeddings.segment.weight"][0]
    assert torch.equal(again.weights["embeddings.position.weight"], folded)
    assert RELATIVE_BIAS in again.weights


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `pmlm import` says; it must leave nothing."""
    output = folder.parent / "imported"
    assert cli.main(["import", str(folder), "--output", str(output), *more]) == 2
    assert [path.name for path in folder.parent.iterdir() if "imported" in path.name] == []
    return capsys.readouterr().err


def changed_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def changed_settings(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path, capsys):
    folder = tmp_path / "bert"
    bert_folder(folder)

    def change(tensors):
        del tensors["bert.encoder.layer.1.intermediate.dense.bias"]
        tensors["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(32, 60)
        tensors["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(32, 64)
        tensors["lora.A"] = torch.zeros(2)
        tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(32, dtype=torch.int8)
        tensors["cls.predictions.decoder.weight"] = torch.zeros(len(WORDS), 32)

    changed_tensors(folder, change)
    message = refusal(folder, capsys)
    assert "lacks tensors: bert.encoder.layer.1.intermediate.dense.bias [64]" in message
    assert "layer.0.output.dense.weight has shape [32, 60], its configuration says [32, 64]" in message
    assert "has no place for: bert.encoder.layer.2.output.dense.weight, lora.A" in message
    assert "layer.0.output.dense.bias holds torch.int8" in message
    assert "cls.predictions.decoder.weight is not tied" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hidden_act": "relu"}, "hidden_act (relu) must be gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type (relative_key) must be absolute"),
        ({"is_decoder": True}, "is_decoder (True) must be False"),
        ({"model_type": "roberta"}, "holds a roberta model; what can be imported: bert, mpnet, unilm"),
        ({"vocab_size": 60}, "its embedding has 60 rows, its tokenizer 49 tokens"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers (two) must be a positive number"),
        ({"num_attention_heads": 5}, "num_attention_heads (5) must divide hidden_size"),
    ],
)
def test_other_models_are_refused(tmp_path, capsys, settings: dict[str, Any], expected: str):
    folder = tmp_path / "bert"
    bert_folder(folder)
    changed_settings(folder, **settings)
    assert expected in refusal(folder, capsys)


def test_files_that_are_missing_or_broken_are_named(tmp_path, capsys):
    folder = tmp_path / "bert"
    assert "there is no file or folder" in refusal(folder, capsys)
    bert_folder(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{weights} cannot be read" in refusal(folder, capsys)
    weights.unlink()
    assert "no weights found" in refusal(folder, capsys)
    (folder / "pytorch_model.bin").write_bytes(b"no weights either")
    assert "pytorch_model.bin cannot be read" in refusal(folder, capsys)


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bert"
    bert_folder(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"bert.x": Malice()}, folder / "pytorch_model.bin")
    assert "cannot be read" in refusal(folder, capsys)
    assert not (tmp_path / "executed").exists()


def test_a_cased_word_list_is_refused(tmp_path, capsys):
    folder = tmp_path / "bert"
    bert_folder(folder, words=[*WORDS[:-1], "Tea"])
    assert "is cased (it has 'Tea')" in refusal(folder, capsys)


def test_a_corpus_with_other_words_is_refused(tmp_path, capsys, small_corpus):
    folder = tmp_path / "bert"
    bert_folder(folder)
    message = refusal(folder, capsys, "--vocabulary", str(small_corpus))
    assert "(125 tokens) is not that of the weights (49)" in message
    assert "'w40'" in message


def test_nothing_is_overwritten(tmp_path, capsys):
    bert_folder(tmp_path / "bert")
    output = tmp_path / "there"
    output.mkdir()
    assert cli.main(["import", str(tmp_path / "bert"), "--output", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert list(output.iterdir()) == []
