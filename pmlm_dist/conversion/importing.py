"""`pmlm import`: BERT, MPNet and UniLM checkpoints as initial weights for `train.py --init`.

config.json, tensors, vocabulary  --read_pretrained: strict names and shapes-->  PretrainedWeights  -->  folder
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pmlm_dist.checkpoint.initial_weights import ARCHITECTURE_SETTINGS, flag_of
from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.conversion.bert import from_bert
from pmlm_dist.conversion.files import CONFIG, INDEX, OLD_WEIGHTS, WEIGHTS, read_tensors
from pmlm_dist.conversion.huggingface import ImportedModel
from pmlm_dist.conversion.mpnet import from_mpnet
from pmlm_dist.conversion.pretrained import PretrainedWeights, save_pretrained
from pmlm_dist.conversion.tensors import Tensors, without_wrappers
from pmlm_dist.conversion.unilm import from_unilm, is_unilm
from pmlm_dist.json_input import read_json_object
from pmlm_dist.vocabulary.files import TOKENIZER, WORD_LIST
from pmlm_dist.vocabulary.vocabulary import Vocabulary

Format = Literal["auto", "bert", "mpnet", "unilm"]
_FORMATS: dict[str, Callable[..., ImportedModel]] = {"bert": from_bert, "mpnet": from_mpnet, "unilm": from_unilm}


def import_weights(path: Path, /, *, output: Path, vocabulary: Path | None = None, format: Format = "auto") -> None:
    """Import a BERT, MPNet (Hugging Face) or UniLM checkpoint as initial weights for `train.py --init`.

    Args:
        path: A folder with config.json, model.safetensors or pytorch_model.bin (or the index of several), and
            tokenizer.json or vocab.txt; or a
            UniLM file NAME.bin beside NAME-config.json and NAME-vocab.txt.
        output: The folder to write, which must not exist.
        vocabulary: A corpus whose vocabulary has the same tokens in another order: the weights are reordered to it.
        format: Format of the checkpoint; `auto` detects it from the settings and the names of the tensors.
    """
    pretrained = read_pretrained(path, format=format)
    if vocabulary is not None:
        pretrained = pretrained.with_vocabulary(Vocabulary.load(vocabulary), origin=str(vocabulary))
    save_pretrained(pretrained, output)
    for note in (*pretrained.facts["notes"], *pretrained.vocabulary.notes):
        print(f"note: {note}")
    parameters = sum(weight.numel() for weight in pretrained.weights.values())
    print(
        f"written: {output} ({pretrained.facts['format']}, {parameters:,} parameters; vocabulary "
        f"{pretrained.vocabulary.size}, {pretrained.vocabulary.description})\n"
        f"to prepare a corpus: pmlm prepare-corpus --vocabulary {shlex.quote(str(output))} ...\n"
        f"to train: train.py --init {shlex.quote(str(output))} {' '.join(needed_flags(pretrained.model))}"
    )


def needed_flags(model: ModelConfig) -> list[str]:
    """Return the command line flags of `model` that differ from the base preset."""
    default = ModelConfig()
    names = [name for name in ARCHITECTURE_SETTINGS if name != "vocab_size"]
    return [flag_of(name, getattr(model, name)) for name in names if getattr(model, name) != getattr(default, name)]


def read_pretrained(path: Path | str, *, format: Format = "auto") -> PretrainedWeights:
    """Load the model at `path`. Raises `ConfigError` with every problem; dropped tensors are in `facts["notes"]`."""
    path = Path(path)
    settings_file, tensors_file, vocabulary_file = _find_files(path)
    settings = read_json_object(settings_file)
    tensors, wrapper_notes = without_wrappers(read_tensors(tensors_file), origin=str(path))
    name = _detect_format(settings, tensors, path) if format == "auto" else format
    vocabulary = Vocabulary.load(vocabulary_file)
    model, weights, notes = _FORMATS[name](settings, tensors, vocabulary, origin=str(path))
    facts = {"format": name, "from": str(path.absolute()), "notes": [*wrapper_notes, *notes]}
    return PretrainedWeights(model, weights, vocabulary, facts)


def _detect_format(settings: dict[str, Any], tensors: Tensors, path: Path) -> str:
    kind = settings.get("model_type")
    if kind in (None, "bert", "unilm") and is_unilm(settings, tensors):
        return "unilm"
    if kind == "mpnet" or (kind is None and any(name.startswith("mpnet.") for name in tensors)):
        return "mpnet"
    if kind == "bert" or (kind is None and any("token_type_embeddings" in name for name in tensors)):
        return "bert"
    raise ConfigError([f"{path}: model_type ({kind}) cannot be imported: must be bert, mpnet or unilm"])


def _find_files(path: Path) -> tuple[Path, Path, Path]:
    """Return the files of settings and tensors, and the vocabulary: NAME-vocab.txt or the folder of one."""
    if path.is_dir():
        names = (f"{name}{end}" for name in (WEIGHTS, OLD_WEIGHTS) for end in ("", INDEX))
        folder, tensors = path, _first([path / name for name in names], "weights")
    elif path.is_file():
        folder, tensors = path.parent, path
    else:
        raise ConfigError([f"{path} does not exist"])
    named = [] if path.is_dir() else [folder / f"{path.stem}-{name}" for name in (CONFIG, WORD_LIST)]
    settings = _first([*named[:1], folder / CONFIG], "settings")
    vocabulary = _first([*named[1:], folder / TOKENIZER, folder / WORD_LIST], "vocabulary")
    return settings, tensors, vocabulary if vocabulary in named else folder


def _first(candidates: list[Path], content: str) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError([f"no {content} found: none of {', '.join(map(str, candidates))} exists"])
