"""`pmlm embed` against single passes; `pmlm linear-probe` beside its comparators."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_tasks import text_rows, write_jsonl
from support.worlds import run_world

from pmlm_dist.cli import main
from pmlm_dist.conversion.pretrained import build_pretrained, hidden_states, open_pretrained
from pmlm_dist.downstream.embed import LinearProbeConfig, linear_probe

TEXTS = [row["text"] for row in text_rows(9)]


def call(arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.distributed
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_pooled_states_on_any_number_of_ranks(model: Path, tmp_path: Path, pooling: str):
    source, output = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS]), tmp_path / "out.npy"
    arguments = ["embed", str(source), "--model", str(model), "--pooling", pooling, "--batch", "4"]
    assert run_world(call, 2, [*arguments, "--output", str(output)]) == [0, 0]
    vectors = np.load(output)
    assert (vectors.dtype, len(vectors)) == (np.float32, len(TEXTS))
    pretrained = open_pretrained(model)
    network, vocabulary = build_pretrained(pretrained), pretrained.vocabulary
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([[vocabulary.cls_id, *vocabulary.encode_batch([text])[0], vocabulary.sep_id]])
        states = hidden_states(network, ids, segments_BT=torch.zeros_like(ids), valid_BT=torch.ones_like(ids) > 0)[0]
        np.testing.assert_allclose(vector, states.mean(0) if pooling == "mean" else states[0], rtol=1e-4, atol=1e-5)
    assert main([*arguments, "--output", str(output)]) == 2  # nothing is overwritten


@pytest.mark.distributed
def test_linear_probe_reads_the_classes_that_the_words_tell(model: Path, data: Path):
    """The color in the text is its class: each comparator but the majority finds it, also on two ranks."""
    results = run_world(linear_probe, 2, LinearProbeConfig(model=model, data=str(data)))
    assert results[0] == results[1]
    assert results[0].keys() == {"pre-trained", "untrained", "TF-IDF", "majority class"}
    assert results[0]["TF-IDF"] == 1.0
    assert results[0]["pre-trained"] > results[0]["majority class"] == pytest.approx(1 / 3, abs=0.12)


def test_row_without_label_is_an_error(model: Path, tmp_path: Path, capsys):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "a red fish", "label": None}])
    assert main(["linear-probe", "--model", str(model), "--data", str(tmp_path)]) == 2
    assert "split train, row 1: it has no label" in capsys.readouterr().err
