"""Imports of models saved by `transformers`: equal outputs, and a note or an error for everything that differs."""

import contextlib
import json
import warnings
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
    pmlm_outputs,
    random_pretrained,
    random_text,
)
from transformers import AutoTokenizer, BertForPreTraining, BertModel

from pmlm_dist import cli
from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.files import read_tensors
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.pretrained import open_pretrained, save_pretrained
from pmlm_dist.planning.parameters import RELATIVE_BIAS
from pmlm_dist.vocabulary.vocabulary import Vocabulary


def model_inputs(ids_BT, segments_BT, valid_BT) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_BT, "token_type_ids": segments_BT, "attention_mask": valid_BT.long()}


@torch.no_grad()
def test_imported_bert_has_equal_logits(tmp_path):
    bert, text = bert_folder(tmp_path), random_text()
    expected = bert(**model_inputs(*text)).logits
    imported = read_pretrained(tmp_path)
    assert not imported.model.relative_bias
    torch.testing.assert_close(pmlm_outputs(imported, *text)[1][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    assert imported.facts["notes"] == []


@torch.no_grad()
def test_bare_encoder_gets_a_new_head_with_a_note(tmp_path):
    bert, text = bert_folder(tmp_path, kind=BertModel), random_text()
    expected = bert(**model_inputs(*text)).last_hidden_state
    imported = read_pretrained(tmp_path)
    torch.testing.assert_close(pmlm_outputs(imported, *text)[0][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    pooler, head = imported.facts["notes"]
    assert "bert.pooler.dense.weight" in pooler
    assert "head.dense is newly initialized" in head
    assert 0.015 < imported.weights["head.dense.weight"].std() < 0.025
    assert torch.equal(read_pretrained(tmp_path).weights["head.dense.weight"], imported.weights["head.dense.weight"])


@torch.no_grad()
def test_sentence_pair_classifier_is_dropped_with_a_note(tmp_path):
    bert, text = bert_folder(tmp_path, kind=BertForPreTraining), random_text()
    imported = read_pretrained(tmp_path)
    expected = bert(**model_inputs(*text)).prediction_logits
    torch.testing.assert_close(pmlm_outputs(imported, *text)[1][text[2]], expected[text[2]], rtol=0, atol=1e-11)
    (note,) = imported.facts["notes"]
    assert "cls.seq_relationship.weight" in note


@torch.no_grad()
def test_imported_mpnet_has_equal_logits_and_special_tokens(tmp_path):
    mpnet = mpnet_folder(tmp_path)
    imported = read_pretrained(tmp_path)
    vocabulary = imported.vocabulary
    assert [vocabulary.tokens[id] for id in (0, 1, 2, 50 - 2)] == ["[CLS]", "[PAD]", "[SEP]", "[MASK]"]
    assert vocabulary.tokens[MPNET_WORDS.index("[UNK]")] == "[UNK]"
    unused = [MPNET_WORDS.index(word) for word in ("<unk>", "[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert all(id in vocabulary.special_ids for id in unused if id < len(MPNET_WORDS))
    ids_BT, segments_BT, valid_BT = random_text()
    ids_BT = (ids_BT + 1).clamp(2, len(MPNET_WORDS) - 1).masked_fill(~valid_BT, 1)
    expected = mpnet(input_ids=ids_BT, attention_mask=valid_BT.long()).logits
    _, logits = pmlm_outputs(imported, ids_BT, segments_BT, valid_BT)  # both segment rows are zero: any segments do
    torch.testing.assert_close(logits[valid_BT], expected[valid_BT], rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", ["gamma", "bin", "half"])
def test_old_names_and_file_formats_are_imported(tmp_path, variant: str):
    bert_folder(tmp_path)
    expected = read_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if variant == "gamma":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, before in old.items():
            tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    if variant == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if variant == "bin":
        (tmp_path / "model.safetensors").unlink()
        tensors["bert.embeddings.position_ids"] = torch.arange(48)[None]
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    imported = read_pretrained(tmp_path)
    for name, weight in expected.weights.items():
        correct = weight.bfloat16().float() if variant == "half" else weight
        assert torch.equal(imported.weights[name], correct), name


def published(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a model of `kind` and return its tensors; in a bare encoder and in UniLM's format they are BERT's."""
    if kind == "mpnet":
        mpnet_folder(folder)
    elif kind == "bare":
        bert_folder(folder, kind=BertModel)
    else:
        bert_folder(folder)
    return load_file(folder / "model.safetensors")


KINDS = ("bert", "bare", "mpnet", "unilm")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_tokens_are_left_out_with_one_note(tmp_path, kind: str):
    tensors, tokens, format = published(tmp_path, kind), len(WORDS), "auto" if kind != "unilm" else "unilm"
    expected = read_pretrained(tmp_path, format=format)
    padded = {name: t for name, t in tensors.items() if t.shape[0] == tokens}
    assert len(padded) == (1 if kind == "bare" else 2)
    if kind != "bare":  # a tied copy of the embedding, as old files have it
        decoder = "lm_head.decoder.weight" if kind == "mpnet" else "cls.predictions.decoder.weight"
        padded[decoder] = next(t for t in padded.values() if t.dim() == 2)
    padded = {name: torch.cat([t, torch.full((7, *t.shape[1:]), 9.0)]) for name, t in padded.items()}
    save_file(tensors | padded, tmp_path / "model.safetensors")
    change_settings(tmp_path, vocab_size=tokens + 7)
    imported = read_pretrained(tmp_path, format=format)
    assert imported.model == expected.model
    assert all(torch.equal(imported.weights[name], weight) for name, weight in expected.weights.items())
    (note,) = [note for note in imported.facts["notes"] if "are left out: the last 7 of" in note]
    assert "embeddings" in note


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "net.",
        "_forward_module.encoder.",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_wrapped_models_are_read_with_one_note(tmp_path, kind: str, prefix: str):
    tensors, format = published(tmp_path, kind), "auto" if kind != "unilm" else "unilm"
    expected = read_pretrained(tmp_path, format=format)
    wrapped = {f"{prefix}{name.replace('encoder.', 'encoder._orig_mod.')}": t for name, t in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    imported = read_pretrained(tmp_path, format=format)
    assert all(torch.equal(imported.weights[name], weight) for name, weight in expected.weights.items())
    wrappers, *notes = imported.facts["notes"]
    assert prefix in wrappers
    assert "_orig_mod." in wrappers
    assert notes == expected.facts["notes"]


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_sharded_weights_are_imported(tmp_path, end: str, capsys):
    folder = tmp_path / "bert"
    tensors = published(folder, "bert")
    expected = read_pretrained(folder)
    name = {"safetensors": "model", "bin": "pytorch_model"}[end]
    files = {tensor: f"{name}-0000{n % 3 + 1}-of-00003.{end}" for n, tensor in enumerate(tensors)}
    for file in set(files.values()):
        part = {tensor: tensors[tensor] for tensor in files if files[tensor] == file}
        (save_file if end == "safetensors" else torch.save)(part, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / f"{name}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    imported = read_pretrained(folder)
    assert all(torch.equal(imported.weights[name], weight) for name, weight in expected.weights.items())
    for changed, expected_message in (
        ({"more": files["cls.predictions.bias"]}, "lists tensors that its files lack, copy all files again: more"),
        ({"more": "../bert/config.json"}, "must list a file beside it for each tensor"),
        ({"more": f"missing.{end}"}, f"missing.{end} cannot be read"),
    ):
        index.write_text(json.dumps({"weight_map": files | changed}))
        assert expected_message in error_of_import(folder, capsys)


def test_weights_are_reordered_to_the_vocabulary_of_a_corpus(tmp_path, capsys):
    original = random_pretrained()
    save_pretrained(original, tmp_path / "source")
    assert cli.main(["export", str(tmp_path / "source"), "--format", "mpnet", "--output", str(tmp_path / "mpnet")]) == 0
    corpus = tmp_path / "corpus"
    original.vocabulary.save(corpus)
    command = ["import", str(tmp_path / "mpnet"), "--output", str(tmp_path / "imported"), "--vocabulary", str(corpus)]
    assert cli.main(command) == 0
    assert "--model.hidden-size 32" in capsys.readouterr().out
    imported = open_pretrained(tmp_path / "imported")
    assert imported.vocabulary.fingerprint == original.vocabulary.fingerprint
    for name, weight in original.weights.items():
        if name not in ("embeddings.position.weight", "embeddings.segment.weight"):
            assert torch.equal(imported.weights[name], weight), name
    folded = original.weights["embeddings.position.weight"] + original.weights["embeddings.segment.weight"][0]
    assert torch.equal(imported.weights["embeddings.position.weight"], folded)
    assert RELATIVE_BIAS in imported.weights


@pytest.mark.parametrize("format", ["bert", "unilm"])
def test_added_words_survive_import_and_export(tmp_path, capsys, format: str):
    folder, text = tmp_path / "bert", f"New York, {WORDS[10]} covid-19!"
    bert_folder(folder, words=WORDS[:-2])
    (folder / "added_tokens.json").write_text(json.dumps({"covid-19": len(WORDS) - 2, "New York": len(WORDS) - 1}))
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert {len(WORDS) - 2, len(WORDS) - 1} <= set(expected)
    assert cli.main(["import", str(folder), "--output", str(tmp_path / "imported")]) == 0
    assert f"vocabulary {len(WORDS)}, uncased, accents stripped, 2 added words" in capsys.readouterr().out
    target = tmp_path / "exported"
    assert cli.main(["export", str(tmp_path / "imported"), "--format", format, "--output", str(target)]) == 0
    vocabulary = open_pretrained(tmp_path / "imported").vocabulary
    assert vocabulary.encode_batch([text])[0] == expected[1:-1]
    assert read_pretrained(target).vocabulary.fingerprint == vocabulary.fingerprint
    if format == "bert":
        assert AutoTokenizer.from_pretrained(target)(text)["input_ids"] == expected


def test_vocabulary_that_reads_text_otherwise_raises():
    pretrained = random_pretrained()
    with pytest.raises(ConfigError, match=r"corpus \(cased, accents kept\) has the tokens.*otherwise \(uncased"):
        pretrained.with_vocabulary(Vocabulary.from_tokens(WORDS, lowercase=False), origin="corpus")


# --------------------------------------------------------------------------------------------------------------- errors


def error_of_import(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error message of `pmlm import`, which must write no output."""
    output = folder.parent / "imported"
    assert cli.main(["import", str(folder), "--output", str(output), *arguments]) == 2
    assert [path.name for path in folder.parent.iterdir() if "imported" in path.name] == []
    return capsys.readouterr().err


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_fewer_rows_than_tokens_raises(tmp_path, capsys):
    bert_folder(tmp_path / "bert", words=[*WORDS, "one", "more"])
    message = error_of_import(tmp_path / "bert", capsys)
    assert f"word_embeddings.weight has {len(WORDS)} rows, but there are {len(WORDS) + 2} tokens; put the" in message


def test_other_names_give_a_short_message(tmp_path, capsys):
    bert_folder(tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    other = {f"net.{name}": t for name, t in tensors.items()} | {"loss.weight": torch.ones(2)}
    save_file(other, tmp_path / "bert" / "model.safetensors")
    message = error_of_import(tmp_path / "bert", capsys)
    assert f"and {len(tensors) - 3} more" in message
    assert len(message) < 1000
    both = {name: t.clone() for name, t in tensors.items()} | {f"module.{name}": t for name, t in tensors.items()}
    save_file(both, tmp_path / "bert" / "model.safetensors")
    assert "tensors have the same name without module.: save one model alone" in error_of_import(
        tmp_path / "bert", capsys
    )


def test_weights_of_another_type_are_one_line(tmp_path, capsys):
    bert_folder(tmp_path / "bert")
    change_tensors(tmp_path / "bert", lambda tensors: tensors.update({n: t.to(torch.int8) for n, t in tensors.items()}))
    message = error_of_import(tmp_path / "bert", capsys)
    assert message.count("has type torch.int8") == 2
    assert len(message.splitlines()) == 2


def test_published_folder_as_a_checkpoint_names_the_import(tmp_path, capsys):
    bert_folder(tmp_path / "bert")
    assert cli.main(["fill", "w1 [MASK]", "--model", str(tmp_path / "bert")]) == 2
    assert "read it by `pmlm import` first" in capsys.readouterr().err


def test_import_lists_every_mismatched_tensor(tmp_path, capsys):
    folder = tmp_path / "bert"
    bert_folder(folder)

    def change(tensors):
        del tensors["bert.encoder.layer.1.intermediate.dense.bias"]
        tensors["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(32, 60)
        tensors["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(32, 64)
        tensors["lora.A"] = torch.zeros(2)
        tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(32, dtype=torch.int8)
        tensors["cls.predictions.decoder.weight"] = torch.zeros(len(WORDS), 32)

    change_tensors(folder, change)
    message = error_of_import(folder, capsys)
    assert "missing tensors: bert.encoder.layer.1.intermediate.dense.bias [64]" in message
    assert "layer.0.output.dense.weight has shape [32, 60], its configuration requires [32, 64]" in message
    assert "without a counterpart in this model: bert.encoder.layer.2.output.dense.weight, lora.A" in message
    assert "layer.0.output.dense.bias has type torch.int8" in message
    assert "cls.predictions.decoder.weight is not tied" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hidden_act": "relu"}, "hidden_act (relu) must be gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type (relative_key) must be absolute"),
        ({"is_decoder": True}, "is_decoder (True) must be False"),
        ({"model_type": "roberta"}, "model_type (roberta) cannot be imported: must be bert, mpnet or unilm"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers (two) must be a positive number"),
        ({"num_hidden_layers": 10**30}, "must be a positive number up to 100,000"),
        ({"hidden_size": 10**400}, "config.json, line 1 is not JSON (the number 100000000000... (401 characters)"),
        ({"num_attention_heads": 5}, "num_attention_heads (5) must divide hidden_size"),
    ],
)
def test_import_of_unsupported_model_raises(tmp_path, capsys, settings: dict[str, Any], expected: str):
    folder = tmp_path / "bert"
    bert_folder(folder)
    change_settings(folder, **settings)
    assert expected in error_of_import(folder, capsys)


def test_import_of_missing_or_corrupt_files_raises(tmp_path, capsys):
    folder = tmp_path / "bert"
    assert f"{folder} does not exist" in error_of_import(folder, capsys)
    bert_folder(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{weights} cannot be read" in error_of_import(folder, capsys)
    weights.unlink()
    assert "no weights found" in error_of_import(folder, capsys)
    (folder / "pytorch_model.bin").write_bytes(b"no weights either")
    assert "pytorch_model.bin cannot be read" in error_of_import(folder, capsys)


def test_damaged_weights_raise_one_line(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.bin").read_bytes()
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        (tmp_path / "damaged.bin").write_bytes(damaged[: len(content) - position % 2])
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ConfigError):
            read_tensors(tmp_path / "damaged.bin")


class TouchOnUnpickling:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_import_does_not_execute_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bert"
    bert_folder(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"bert.x": TouchOnUnpickling()}, folder / "pytorch_model.bin")
    assert "cannot be read" in error_of_import(folder, capsys)
    assert not (tmp_path / "executed").exists()


def test_import_of_a_cased_word_list_raises(tmp_path, capsys):
    folder = tmp_path / "bert"
    bert_folder(folder, words=[*WORDS[:-1], "Tea"])
    assert "is cased (1 of its tokens, 'Tea' for example" in error_of_import(folder, capsys)


def test_import_with_other_vocabulary_raises(tmp_path, capsys, small_corpus):
    folder = tmp_path / "bert"
    bert_folder(folder)
    message = error_of_import(folder, capsys, "--vocabulary", str(small_corpus))
    assert "(125 tokens) differs from that of the weights (49)" in message
    assert "'w40'" in message


def test_existing_output_is_not_overwritten(tmp_path, capsys):
    bert_folder(tmp_path / "bert")
    output = tmp_path / "existing"
    output.mkdir()
    assert cli.main(["import", str(tmp_path / "bert"), "--output", str(output)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert list(output.iterdir()) == []
