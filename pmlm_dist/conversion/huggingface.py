"""Hugging Face `transformers`: what BERT and MPNet have in common, model folders, and the outputs of a loaded folder.

    config.json  --read_shared_settings-->  ModelConfig                                                (import)
    ExportedModel  --write_folder-->  folder  --AutoModel, AutoTokenizer-->  ModelOutputs, token ids   (export)

`bert.py` and `mpnet.py` hold the two formats. Only this module imports `transformers`, and only to load a folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.conversion.files import CONFIG, WEIGHTS, write_settings
from pmlm_dist.conversion.pretrained import PretrainedWeights
from pmlm_dist.conversion.tensors import NameScheme, Tensors
from pmlm_dist.vocabulary.files import TOKENIZER, TOKENIZER_CONFIG
from pmlm_dist.vocabulary.vocabulary import SPECIAL_TOKENS, Vocabulary

_SHARED_SETTINGS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
"""Our setting -> theirs."""
_MAX_SIZE = 100_000
"""Of a dimension or a number of layers; one that no memory holds is a mistake of the file."""
_REQUIRED_SETTINGS = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Values that this model implements; a setting that is absent has this value by default."""


ImportedModel = tuple[ModelConfig, Tensors, list[str]]
"""Settings, all parameters, and notes on dropped and new ones."""


@dataclass(frozen=True)
class ExportedModel:
    """A model in another format, with the vocabulary that its token ids refer to."""

    settings: dict[str, Any]
    tensors: Tensors
    vocabulary: Vocabulary
    limitations: tuple[str, ...] = ()
    """Differences from the checkpoint that the format makes necessary, one sentence each."""


# -------------------------------------------------------------------------------------------------------------- import


def read_shared_settings(settings: dict[str, Any], vocabulary: Vocabulary, *, origin: str) -> ModelConfig:
    """Return the settings that BERT and MPNet share. Sizes are required; the others have the same defaults as ours.

    The size of the vocabulary is the number of tokens: `vocab_size` counts the rows of an embedding that may be padded.
    Raises `ConfigError` for every setting with a value that this model does not implement.
    """
    raise_if_any(
        [
            f"{origin}: {name} ({settings[name]}) must be {value}: this model implements nothing else"
            for name, value in _REQUIRED_SETTINGS.items()
            if settings.get(name, value) != value
        ]
    )
    shared: dict[str, Any] = {
        ours: positive_setting(settings, theirs, origin) for ours, theirs in _SHARED_SETTINGS.items() if _is_size(ours)
    }
    shared |= {
        ours: settings[theirs] for ours, theirs in _SHARED_SETTINGS.items() if theirs in settings and not _is_size(ours)
    }
    model = ModelConfig(**shared, vocab_size=vocabulary.size)
    if model.hidden_size % model.num_heads:
        raise ConfigError([f"{origin}: num_attention_heads ({model.num_heads}) must divide hidden_size"])
    return model


def _is_size(name: str) -> bool:
    return isinstance(getattr(ModelConfig, name), int)


def positive_setting(settings: dict[str, Any], name: str, origin: str) -> int:
    """Return a required positive integer. Raises `ConfigError` if it is missing or anything else."""
    value = settings.get(name)
    if not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise ConfigError([f"{origin}: {name} ({value}) must be a positive number up to {_MAX_SIZE:,} in its {CONFIG}"])
    return value


def add_prefix(tensors: Tensors, scheme: NameScheme) -> Tensors:
    """Return `tensors` under the names of the model with a head: prefix of a bare encoder, new LayerNorm names."""
    bare = not any(name.startswith(scheme.prefix) for name in tensors)
    parts = ("embeddings.", "encoder.", "pooler.")
    prefixed = {
        f"{scheme.prefix}{name}" if bare and name.startswith(parts) else name: tensor
        for name, tensor in tensors.items()
    }
    layer_norm = {".gamma": ".weight", ".beta": ".bias"}  # in files converted from TensorFlow
    return {
        name.removesuffix(end) + layer_norm[end]
        if (end := f".{name.rpartition('.')[2]}") in layer_norm
        else name: tensor
        for name, tensor in prefixed.items()
    }


# -------------------------------------------------------------------------------------------------------------- export


def shared_settings(pretrained: PretrainedWeights) -> dict[str, Any]:
    """Return the settings that BERT and MPNet share, under their names."""
    model = pretrained.model
    return {
        **{theirs: getattr(model, ours) for ours, theirs in _SHARED_SETTINGS.items()},
        "vocab_size": model.vocab_size,
        "pad_token_id": pretrained.vocabulary.pad_id,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    }


def write_folder(exported: ExportedModel, folder: Path | str, *, max_positions: int) -> None:
    """Write weights, settings and tokenizer in the layout of `from_pretrained`."""
    folder = Path(folder)
    weights = folder / WEIGHTS
    weights.touch()
    mode = weights.stat().st_mode  # by the umask; safetensors replaces the file by one that only its owner reads
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in exported.tensors.items()},  # safetensors rejects views
        weights,
        metadata={"format": "pt"},
    )
    weights.chmod(mode)
    write_settings(folder / CONFIG, {**exported.settings, "dtype": "float32", "torch_dtype": "float32"})
    _write_tokenizer(exported, folder, max_positions=max_positions)


def _write_tokenizer(exported: ExportedModel, folder: Path, *, max_positions: int) -> None:
    exported.vocabulary.save(folder)
    (folder / TOKENIZER).write_text(exported.vocabulary.exported_json, encoding="utf-8")
    segments = [] if exported.settings["model_type"] == "mpnet" else ["token_type_ids"]
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True)
    settings = {
        **exported.vocabulary.settings,
        **dict(names),
        # The class that uses tokenizer.json unchanged; those of BERT and MPNet rebuild the normalizer from settings.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "model_input_names": ["input_ids", *segments, "attention_mask"],
    }
    write_settings(folder / TOKENIZER_CONFIG, settings)


# -------------------------------------------------------------------------------------------------------- verification


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model at the N tokens that are not padding: last hidden states [N, E] and logits [N, V]."""

    states_NE: Tensor
    logits_NV: Tensor


@torch.no_grad()
def transformers_outputs(folder: Path | str, *, ids_BT: Tensor, segments_BT: Tensor, valid_BT: Tensor) -> ModelOutputs:
    """Load a folder with `transformers` and compute its outputs; MPNet ignores `segments_BT`."""
    transformers = load_transformers()
    inputs = {"input_ids": ids_BT, "attention_mask": valid_BT.long()}
    outputs = []
    for auto_class in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
        model = auto_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        segments = {} if model.config.model_type == "mpnet" else {"token_type_ids": segments_BT}
        outputs.append(model(**inputs, **segments)[0][valid_BT])
    return ModelOutputs(*outputs)


def transformers_token_ids(folder: Path | str, texts: list[str]) -> list[list[int]]:
    """Tokenize `texts` with the tokenizer in `folder`."""
    tokenizer = load_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(texts)["input_ids"]


def load_transformers() -> Any:
    """Import `transformers`. Raises `ConfigError` if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        problem = "transformers is required to check the export: pip install 'pmlm_dist[huggingface]'"
        raise ConfigError([problem]) from error
    transformers.logging.set_verbosity_error()  # it would warn of the missing pooler: see docs/formats.md
    transformers.logging.disable_progress_bar()
    return transformers
