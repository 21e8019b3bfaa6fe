"""ONNX export of the encoder, checked with onnxruntime (extra `onnx`).

    export folder --AutoModel--> torch.onnx --> onnx/model.onnx

Inputs: input_ids, attention_mask and, for BERT, token_type_ids [batch, length]. Output: last_hidden_state
[batch, length, E].
"""

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

MAX_DIFFERENCE = 1e-4
"""Between the hidden states of torch and onnxruntime, in fp32."""
_FILE = Path("onnx") / "model.onnx"
_REQUIRED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_packages() -> list[str]:
    """Return the required packages that are not installed."""
    return [name for name in _REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]


def write_onnx(folder: Path | str) -> float:
    """Add onnx/model.onnx to an export that `transformers` can load; return the largest difference of hidden states.

    Raises `ConfigError` if packages are missing, or onnxruntime computes different hidden states.
    """
    missing = missing_packages()
    if missing:
        raise ConfigError([f"--onnx requires {', '.join(missing)}: pip install 'pmlm_dist[onnx]'"])
    encoder = load_transformers().AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    names = ["input_ids", "attention_mask", *([] if encoder.config.model_type == "mpnet" else ["token_type_ids"])]
    path = Path(folder) / _FILE
    path.parent.mkdir()
    _convert(_HiddenStates(encoder, names).eval(), _inputs(encoder.config, names, batch=2, length=16), path)
    # Other sizes than those of the conversion: constants of the trace would show.
    difference = max(
        _difference(path, encoder, _inputs(encoder.config, names, batch=batch, length=length))
        for batch, length in ((1, 8), (3, 40))
    )
    if not difference <= MAX_DIFFERENCE:
        raise ConfigError(
            [f"the hidden states of onnxruntime and torch differ by {difference:.1e}: nothing was written"]
        )
    return difference


class _HiddenStates(nn.Module):
    """The encoder with positional inputs, and the last hidden states as its only output."""

    def __init__(self, encoder: nn.Module, names: list[str]):
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.encoder(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


def _inputs(config: Any, names: list[str], *, batch: int, length: int) -> dict[str, Tensor]:
    """Return random texts; all but the first are shorter and padded."""
    generator = torch.Generator().manual_seed(length)
    length = min(length, config.max_position_embeddings - 2)
    ids_BT = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    valid_BT = torch.arange(length) < length - 3 * torch.arange(batch)[:, None]
    inputs = {
        "input_ids": ids_BT.masked_fill(~valid_BT, config.pad_token_id),
        "attention_mask": valid_BT.long(),
        "token_type_ids": torch.zeros_like(ids_BT),
    }
    return {name: inputs[name] for name in names}


def _convert(model: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    warnings.filterwarnings("ignore", module="torch.onnx")  # about names of axes, and deprecated calls inside torch
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # about operators of torchvision, which are not used
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
    actual_BTE = np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    valid_BT = inputs["attention_mask"].bool().numpy()
    return float(np.abs(actual_BTE - expected_BTE.numpy())[valid_BT].max())
