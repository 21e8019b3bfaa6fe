"""Models with random nonzero weights, and checkpoints and vocabularies in the formats of `transformers`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, MPNetConfig, MPNetForMaskedLM

from pmlm_dist.config import ModelConfig
from pmlm_dist.conversion.pretrained import PretrainedWeights, build_pretrained, hidden_states, logits, save_pretrained
from pmlm_dist.planning.parameters import parameter_shapes
from pmlm_dist.vocabulary.vocabulary import Vocabulary

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"w{number}" for number in range(40)),
    "##s",
    ",",
    "red",
    "tea",
]
MODEL = ModelConfig(
    vocab_size=len(WORDS), hidden_size=32, num_layers=2, num_heads=4, ffn_size=64, max_positions=48, segment_types=2
)
SHARED: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def random_pretrained(*, seed: int = 0, **changes: Any) -> PretrainedWeights:
    """Return a model with random parameters, biases and norms included."""
    model, generator = replace(MODEL, **changes), torch.Generator().manual_seed(seed)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in parameter_shapes(model).items()}
    facts = {"format": "bert", "from": "a random number generator", "notes": []}
    return PretrainedWeights(model, weights, Vocabulary.from_tokens(WORDS), facts)


def save_random_model(folder: Path, **changes: Any) -> Path:
    """Save a model of `random_pretrained` as `pmlm import` does."""
    return save_pretrained(random_pretrained(**changes), folder)


def random_text(*, length: int = 24, batch: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, segments and validity [B, T]; each text is shorter than the one before, and padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, len(WORDS), (batch, length), generator=generator)
    valid_BT = torch.arange(length) < length - 5 * torch.arange(batch)[:, None]
    segments_BT = (torch.arange(length) > length // 2).long().expand_as(ids_BT)
    return ids_BT.masked_fill(~valid_BT, 0), segments_BT, valid_BT


def pmlm_outputs(pretrained: PretrainedWeights, ids_BT, segments_BT, valid_BT) -> tuple[torch.Tensor, torch.Tensor]:
    """Return last hidden states and logits of our implementation in double precision."""
    model = build_pretrained(pretrained).double()
    states_BTE = hidden_states(model, ids_BT, segments_BT=segments_BT, valid_BT=valid_BT)
    return states_BTE, logits(model, states_BTE)


def randomized(model: torch.nn.Module) -> Any:
    """Set every parameter of a model of `transformers` to random numbers."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def bert_folder(folder: Path, *, kind: Any = BertForMaskedLM, words: list[str] = WORDS) -> Any:
    """Save a BERT with `transformers`, and a vocab.txt; return the model in double precision."""
    model = randomized(kind(BertConfig(**SHARED, max_position_embeddings=48)))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return model.double()


MPNET_WORDS = ["<s>", "<pad>", "</s>", "<unk>", *WORDS[:-5], "<mask>"]
"""Tokens in the order of the published MPNet: its special tokens around BERT's vocabulary."""


def mpnet_folder(folder: Path) -> Any:
    """Save an MPNet with `transformers`, and a tokenizer.json; return the model in double precision."""
    config = MPNetConfig(**SHARED, max_position_embeddings=50, relative_attention_num_buckets=32)
    model = randomized(MPNetForMaskedLM(config))
    model.save_pretrained(folder)
    specification = json.loads(Vocabulary.from_tokens(MPNET_WORDS).exported_json)
    ids = {word: id for id, word in enumerate(MPNET_WORDS)}
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specification["added_tokens"] = [{"id": ids[word], "content": word, **flags} for word in special]
    (folder / "tokenizer.json").write_text(json.dumps(specification))
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, "mask_token": {"content": "<mask>"}}))
    return model.double()
