"""The ONNX encoder of an export equals torch, for other batch sizes and lengths than it was converted with."""

import numpy as np
import pytest
import torch
from support.random_models import pmlm_outputs, random_pretrained, random_text, save_random_model

from pmlm_dist import cli
from pmlm_dist.conversion import onnx as conversion
from pmlm_dist.conversion.export import export

missing = conversion.missing_packages()
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs_onnx
@pytest.mark.full
@pytest.mark.parametrize(("format", "relative_bias"), [("bert", False), ("mpnet", True)])
def test_onnx_states_equal_the_models(tmp_path, format, relative_bias: bool):
    import onnxruntime

    export(
        save_random_model(tmp_path / "source", relative_bias=relative_bias),
        format=format,
        output=tmp_path / "out",
        onnx=True,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    ids_BT, segments_BT, valid_BT = random_text(batch=4, length=31)
    if format == "mpnet":
        segments_BT = torch.zeros_like(segments_BT)
    expected, _ = pmlm_outputs(random_pretrained(relative_bias=relative_bias), ids_BT, segments_BT, valid_BT)
    exported_ids = torch.tensor([1, 0, *range(2, 49)])[ids_BT] if format == "mpnet" else ids_BT
    all_inputs = {"input_ids": exported_ids, "attention_mask": valid_BT.long(), "token_type_ids": segments_BT}
    inputs = {item.name: all_inputs[item.name].numpy() for item in session.get_inputs()}
    assert ("token_type_ids" in inputs) == (format == "bert")
    states = np.asarray(session.run(None, inputs)[0])
    np.testing.assert_allclose(states[valid_BT.numpy()], expected[valid_BT], atol=1e-4)


def test_onnx_export_without_packages_raises_and_writes_nothing(tmp_path, capsys, monkeypatch):
    save_random_model(tmp_path / "source")
    monkeypatch.setattr(conversion, "_REQUIRED_PACKAGES", ("no_such_package",))
    command = ["export", str(tmp_path / "source"), "--format", "mpnet", "--output", str(tmp_path / "out"), "--onnx"]
    assert cli.main(command) == 2
    assert "--onnx requires no_such_package" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_onnx_export_of_unilm_raises(tmp_path, capsys):
    save_random_model(tmp_path / "source")
    assert cli.main(["export", str(tmp_path / "source"), "--format", "unilm", "--onnx"]) == 2
    assert "not --format unilm" in capsys.readouterr().err
