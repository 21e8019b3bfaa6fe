"""Exports loaded by stock `transformers`: equal outputs and tokens, from a checkpoint of any topology."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.random_models import MODEL, WORDS, pmlm_outputs, random_pretrained, random_text, save_random_model
from support.small_runs import run_config
from support.worlds import run_world
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from pmlm_dist import cli
from pmlm_dist.checkpoint.files import read_weights
from pmlm_dist.conversion import export as exporting
from pmlm_dist.conversion.export import Format, export
from pmlm_dist.conversion.pretrained import open_pretrained
from pmlm_dist.conversion.tensors import join_key_value, split_key_value
from pmlm_dist.model.transformer import build_model
from pmlm_dist.parallel import groups
from pmlm_dist.planning.parameters import parameter_shapes

FORMATS: list[tuple[Format, bool]] = [("mpnet", True), ("mpnet", False), ("bert", False)]
MPNET_IDS = torch.tensor([1, 0, *range(2, len(WORDS))])
"""MPNet's ids: those of [PAD] and [UNK] exchanged."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Exports in every format, with and without relative position bias."""
    root = tmp_path_factory.mktemp("exports")
    for relative_bias in (True, False):
        save_random_model(root / f"source-{relative_bias}", relative_bias=relative_bias)
    exports = {}
    for format, relative_bias in FORMATS:
        exports[format, relative_bias] = root / f"{format}-{relative_bias}"
        export(root / f"source-{relative_bias}", format=format, output=exports[format, relative_bias])
    return exports


def test_parameter_shapes_are_those_of_the_model():
    groups.init_process_groups()
    for relative_bias in (True, False):
        config = replace(MODEL, relative_bias=relative_bias)
        model = build_model(config, padded_vocab_size=len(WORDS))
        assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_join_key_value_inverts_split_key_value():
    key_value = torch.arange(2 * 32 * 3).view(64, 3)
    key, value = split_key_value(key_value, MODEL)
    assert torch.equal(join_key_value(key, value, MODEL), key_value)
    assert torch.equal(key[:8], key_value[:8])  # the first head's keys
    assert torch.equal(value[:8], key_value[8:16])


@pytest.mark.parametrize(("format", "relative_bias"), FORMATS)
def test_exported_states_and_logits_equal_the_models(folders, format: str, relative_bias: bool):
    folder = folders[format, relative_bias]
    ids_BT, segments_BT, valid_BT = random_text(length=MODEL.max_positions)
    is_mpnet = format == "mpnet"
    segments = {} if is_mpnet else {"token_type_ids": segments_BT}
    inputs = {"input_ids": MPNET_IDS[ids_BT] if is_mpnet else ids_BT, "attention_mask": valid_BT.long(), **segments}
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float64).eval()(**inputs).logits
        states = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()(**inputs).last_hidden_state
    pretrained = random_pretrained(relative_bias=relative_bias)
    segments_BT = torch.zeros_like(segments_BT) if is_mpnet else segments_BT
    expected_states, expected_logits = pmlm_outputs(pretrained, ids_BT, segments_BT, valid_BT)
    # MPNet: positions and segment 0 were added in fp32
    torch.testing.assert_close(states[valid_BT], expected_states[valid_BT], rtol=0, atol=1e-6 if is_mpnet else 1e-12)
    reordered = logits[..., MPNET_IDS] if is_mpnet else logits
    torch.testing.assert_close(reordered[valid_BT], expected_logits[valid_BT], rtol=0, atol=1e-5 if is_mpnet else 1e-12)
    assert expected_logits[valid_BT].std() > 0.5


@pytest.mark.parametrize("side", ["left", "right"])
def test_mpnet_states_are_independent_of_padding(folders, side: str):
    folder = folders["mpnet", True]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    texts = [
        "w1 w2 zzz w3",
        "red teas, w30 w31 w32 w33 w34 w35",
    ]  # zzz is [UNK], whose id in the corpus is MPNet's padding id
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        padded = model(**inputs).last_hidden_state
    for row, expected in enumerate(alone):
        torch.testing.assert_close(padded[row][inputs["attention_mask"][row].bool()], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("format", "relative_bias"), FORMATS)
def test_exported_tokenizer_equals_the_vocabulary(folders, format: str, relative_bias: bool):
    tokenizer = AutoTokenizer.from_pretrained(folders[format, relative_bias])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Red TEAS, [MASK] zzz w3", "w4").input_ids)
    assert tokens == ["[CLS]", "red", "tea", "##s", ",", "[MASK]", "[UNK]", "w3", "[SEP]", "w4", "[SEP]"]
    assert tokenizer.model_max_length == MODEL.max_positions
    assert ("token_type_ids" in tokenizer("w1")) == (format == "bert")
    assert tokenizer.convert_tokens_to_ids("[PAD]") == tokenizer.pad_token_id == (1 if format == "mpnet" else 0)


@pytest.mark.parametrize(("format", "relative_bias"), FORMATS)
def test_fill_mask_pipeline_predicts_the_models_tokens(folders, format: str, relative_bias: bool):
    fill = pipeline("fill-mask", model=str(folders[format, relative_bias]), device="cpu")
    predictions = fill("w1 red [MASK] tea", top_k=3)
    pretrained = random_pretrained(relative_bias=relative_bias)
    ids = torch.tensor(
        [[2, *pretrained.vocabulary.encode_batch(["w1 red"])[0], 4, *pretrained.vocabulary.encode_batch(["tea"])[0], 3]]
    )
    _, logits = pmlm_outputs(pretrained, ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    scores, best = logits[0, 3].softmax(0).topk(3)
    assert [row["token_str"] for row in predictions] == [pretrained.vocabulary.tokens[int(id)] for id in best]
    np.testing.assert_allclose([row["score"] for row in predictions], scores, rtol=1e-3)


@pytest.mark.parametrize(("format", "relative_bias"), FORMATS)
def test_sentence_transformers_uses_the_mean_of_the_states(folders, format: str, relative_bias: bool):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    texts = ["w1 w2 w3", "red tea, w9 w10 w11 w12"]
    vectors = library.SentenceTransformer(str(folders[format, relative_bias]), device="cpu").encode(texts)
    pretrained = random_pretrained(relative_bias=relative_bias)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([[2, *pretrained.vocabulary.encode_batch([text])[0], 3]])
        states, _ = pmlm_outputs(pretrained, ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
        np.testing.assert_allclose(vector, states[0].mean(0), atol=1e-5)


def write_run(config: Any) -> None:
    from pmlm_dist.training.run import pretrain

    pretrain(config)


@pytest.mark.distributed
def test_checkpoint_of_any_topology_is_exported_with_a_model_card(small_corpus, tmp_path, capsys):
    config = run_config(small_corpus, tmp_path / "run", tp=2, steps=4, zero=1)
    run_world(write_run, 4, config)
    assert cli.main(["export", str(tmp_path / "run"), "--format", "mpnet"]) == 0
    folder = tmp_path / "run" / "export" / "mpnet-00000004"
    assert f"written: {folder}" in capsys.readouterr().out
    weights = read_weights(tmp_path / "run" / "checkpoints" / "step-00000004")
    mpnet = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    np.testing.assert_array_equal(mpnet["lm_head.dense.weight"], weights["head.dense.weight"])
    np.testing.assert_array_equal(
        mpnet["mpnet.encoder.layer.1.output.dense.weight"], weights["layers.1.ffn_out.weight"]
    )
    np.testing.assert_array_equal(
        mpnet["mpnet.encoder.relative_attention_bias.weight"], weights["relative_bias.weight"].T
    )
    card = (folder / "README.md").read_text()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    for fact in ("| optimizer steps | 4 of 4 |", "| sequences | 32 |", "ae+par", state["identity"]["corpus"]):
        assert fact in card


# --------------------------------------------------------------------------------------------------------------- errors


def error_of(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error message of a `pmlm` command that must exit with code 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_bert_export_with_relative_bias_raises(tmp_path, capsys):
    save_random_model(tmp_path / "source")
    message = error_of("export", tmp_path / "source", "--format", "bert", "--output", tmp_path / "out", capsys=capsys)
    assert "BERT has no relative position bias" in message
    assert "--format mpnet" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_mpnet_export_with_other_buckets_raises(tmp_path, capsys):
    save_random_model(tmp_path / "source", relative_buckets=16, relative_max_distance=64)
    message = error_of("export", tmp_path / "source", "--format", "mpnet", "--output", tmp_path / "out", capsys=capsys)
    assert "model.relative_buckets 32, this model has 16" in message
    assert "model.relative_max_distance 128, this model has 64" in message


def test_existing_output_is_not_overwritten(tmp_path, capsys):
    save_random_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    message = error_of("export", tmp_path / "source", "--format", "mpnet", "--output", tmp_path / "out", capsys=capsys)
    assert "already exists" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("format", ["mpnet", "unilm"])
def test_export_with_different_logits_is_not_written(tmp_path, capsys, monkeypatch, format: str):
    save_random_model(tmp_path / "source")
    correct = exporting._FORMATS[format]

    def wrong(pretrained):
        exported = correct(pretrained)
        (name,) = [name for name in exported.tensors if name.endswith("layer.1.output.LayerNorm.bias")]
        return replace(exported, tensors={**exported.tensors, name: exported.tensors[name] + 0.01})

    monkeypatch.setitem(exporting._FORMATS, format, wrong)
    message = error_of("export", tmp_path / "source", "--format", format, "--output", tmp_path / "out", capsys=capsys)
    assert "the logits of the export differ from the checkpoint's by" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_export_of_a_corrupt_checkpoint_raises(tmp_path, capsys):
    file = save_random_model(tmp_path / "source") / "weights" / "step-00000000" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    message = error_of("export", tmp_path / "source", "--format", "mpnet", "--output", tmp_path / "out", capsys=capsys)
    assert "another checksum" in message


def test_saved_weights_are_loaded_unchanged(tmp_path):
    pretrained = random_pretrained()
    loaded = open_pretrained(save_random_model(tmp_path / "source"))
    assert loaded.model == pretrained.model
    assert loaded.vocabulary.fingerprint == pretrained.vocabulary.fingerprint
    for name, weight in pretrained.weights.items():
        assert torch.equal(loaded.weights[name], weight)
