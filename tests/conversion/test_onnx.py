"""The ONNX encoder beside an export answers as torch does, for other sizes than it was made with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.random_models import own_answers, random_pretrained, random_text, saved

from pmlm_dist import cli
from pmlm_dist.conversion import onnx as conversion
from pmlm_dist.conversion.export import export

missing = conversion.missing_for_onnx()
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs_onnx
@pytest.mark.parametrize(("format", "relative_bias"), [("bert", False), ("mpnet", True)])
def test_states_are_the_models(tmp_path, format, relative_bias: bool):
    import onnxruntime

    export(saved(tmp_path / "own", relative_bias=relative_bias), format=format, output=tmp_path / "out", onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    ids_BT, segments_BT, valid_BT = random_text(batch=4, length=31)
    if format == "mpnet":
        segments_BT = torch.zeros_like(segments_BT)
    expected, _ = own_answers(random_pretrained(relative_bias=relative_bias), ids_BT, segments_BT, valid_BT)
    moved = torch.tensor([1, 0, *range(2, 49)])[ids_BT] if format == "mpnet" else ids_BT
    given = {"input_ids": moved, "attention_mask": valid_BT.long(), "token_type_ids": segments_BT}
    inputs = {item.name: given[item.name].numpy() for item in session.get_inputs()}
    assert ("token_type_ids" in inputs) == (format == "bert")
    found = np.asarray(session.run(None, inputs)[0])
    np.testing.assert_allclose(found[valid_BT.numpy()], expected[valid_BT], atol=1e-4)


def test_without_its_packages_it_is_refused_and_nothing_written(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "own")
    monkeypatch.setattr(conversion, "_NEEDED", ("no_such_package",))
    command = ["export", str(tmp_path / "own"), "--format", "mpnet", "--output", str(tmp_path / "out"), "--onnx"]
    assert cli.main(command) == 2
    assert "--onnx needs no_such_package" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_unilm_has_no_onnx(tmp_path, capsys):
    saved(tmp_path / "own")
    assert cli.main(["export", str(tmp_path / "own"), "--format", "unilm", "--onnx"]) == 2
    assert "--format unilm is not" in capsys.readouterr().err
