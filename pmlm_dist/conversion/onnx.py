"""The encoder of an export as ONNX, checked with onnxruntime (extra `onnx`).

    export folder --AutoModel--> torch.onnx --> onnx/model.onnx

Its inputs: input_ids, attention_mask, for BERT also token_type_ids [batch, length]; its output: last_hidden_state
[batch, length, E].
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmlm_dist.config import ConfigError
from pmlm_dist.conversion.huggingface import load_transformers

LARGEST_DIFFERENCE = 1e-4
"""Between hidden states of torch and of onnxruntime, in fp32."""
_FILE = Path("onnx") / "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def missing_for_onnx() -> list[str]:
    """Packages that the export needs and that are not installed."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def write_onnx(folder: Path) -> float:
    """Add onnx/model.onnx to an export that transformers loads; the largest difference of hidden states found.

    Raises `ConfigError` when packages are missing, or onnxruntime computes something else.
    """
    missing = missing_for_onnx()
    if missing:
        raise ConfigError([f"--onnx needs {', '.join(missing)}: pip install 'pmlm_dist[onnx]'"])
    encoder = load_transformers().AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    names = ["input_ids", "attention_mask", *([] if encoder.config.model_type == "mpnet" else ["token_type_ids"])]
    path = folder / _FILE
    path.parent.mkdir()
    _convert(_States(encoder, names).eval(), _inputs(encoder.config, names, batch=2, length=16), path)
    difference = max(
        _difference(path, encoder, _inputs(encoder.config, names, batch=batch, length=length))
        for batch, length in ((1, 8), (3, 40))
    )
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError([f"onnxruntime's hidden states differ by {difference:.1e} from torch's: nothing was written"])
    return difference


class _States(nn.Module):
    """The encoder as a function of its inputs by place, to its last hidden states alone."""

    def __init__(self, encoder: nn.Module, names: list[str]):
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encoder(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


def _inputs(config: Any, names: list[str], *, batch: int, length: int) -> dict[str, Tensor]:
    """Random texts; all but the first are shorter, and padded."""
    generator = torch.Generator().manual_seed(length)
    length = min(length, config.max_position_embeddings - 2)
    ids_BT = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    valid_BT = torch.arange(length) < length - 3 * torch.arange(batch)[:, None]
    found = {
        "input_ids": ids_BT.masked_fill(~valid_BT, config.pad_token_id),
        "attention_mask": valid_BT.long(),
        "token_type_ids": torch.zeros_like(ids_BT),
    }
    return {name: found[name] for name in names}


def _convert(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    warnings.filterwarnings("ignore", module="torch.onnx")  # of names of axes, and of torch's own deprecated calls
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # operators of torchvision, which nothing here uses
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        output_names=["last_hidden_state"],
        dynamic_shapes=(tuple(sizes for _ in inputs),),
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def _difference(path: Path, encoder: nn.Module, inputs: dict[str, Tensor]) -> float:
    import onnxruntime

    with torch.no_grad():
        expected_BTE = encoder(**inputs).last_hidden_state
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found_BTE = np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    valid_BT = inputs["attention_mask"].bool().numpy()
    return float(np.abs(found_BTE - expected_BTE.numpy())[valid_BT].max())
