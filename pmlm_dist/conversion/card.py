"""Model card of an export: training data, settings and progress, and limitations of the format."""

from __future__ import annotations

from typing import Any

from pmlm_dist.conversion.huggingface import ExportedModel
from pmlm_dist.conversion.pretrained import PretrainedWeights

_FRONT_MATTER = """---
language: en
library_name: {library}
pipeline_tag: fill-mask
tags:
- unilmv2
- pseudo-masked-language-model
- {kind}
---
"""
_SUMMARY = """
# Pseudo-masked language model

Pre-trained as described in UniLMv2 (arXiv 2002.12804): autoencoding and partially autoregressive prediction in one
forward pass of one network. This folder holds the model as `{kind}`, a bidirectional encoder with a masked-LM head. It
has no trained pooler: for sentence vectors, use the mean of the last hidden states.
"""


def model_card(pretrained: PretrainedWeights, exported: ExportedModel, *, difference: float) -> str:
    """Return Markdown with the front matter of a model hub."""
    kind = exported.settings["model_type"]
    library = "unilm" if kind == "unilm" else "transformers"
    parts = [
        _FRONT_MATTER.format(kind=kind, library=library) + _SUMMARY.format(kind=kind),
        "## Training\n" + _table(_training_facts(pretrained)),
        "## Model\n" + _table(_model_facts(pretrained)),
        "## Export\n"
        f"Largest difference of the logits from the checkpoint's after reloading: {difference:.1e} (fp32, random "
        "texts).\n",
    ]
    if exported.limitations:
        parts.append("Limitations of the format:\n" + "".join(f"- {text}\n" for text in exported.limitations))
    return "\n".join(parts)


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value is not None)
    return f"| | |\n|---|---|\n{rows}"


def _training_facts(pretrained: PretrainedWeights) -> dict[str, Any]:
    facts, run = pretrained.facts, pretrained.facts.get("configuration", {})
    imported = run.get("imported")
    if imported:
        return {"imported from": f"{imported.get('format')}, without further training"}
    objective, masking, optim = (run.get(name, {}) for name in ("objective", "masking", "optim"))
    identity = facts.get("identity", {})
    return {
        "optimizer steps": f"{facts['step']:,} of {run.get('train', {}).get('steps', 0):,}",
        "sequences": f"{facts['samples_consumed']:,}",
        "tokens": f"{facts['tokens_seen']:,}",
        "sequence length": run.get("sequence_length"),
        "batch (sequences)": identity.get("train_batch_size"),
        "objective": objective.get("kind"),
        "masked": f"{masking.get('rate')} of the tokens",
        "AdamW": ", ".join(f"{name} {value}" for name, value in optim.items()),
        "precision": identity.get("precision"),
        "corpus (sha256)": identity.get("corpus"),
        "vocabulary (sha256)": identity.get("vocabulary"),
        "initial weights": run.get("init"),
    }


def _model_facts(pretrained: PretrainedWeights) -> dict[str, Any]:
    model = pretrained.model
    bias = f"{model.relative_buckets} buckets, up to {model.relative_max_distance}" if model.relative_bias else "none"
    return {
        "parameters": f"{sum(weight.numel() for weight in pretrained.weights.values()):,}",
        "layers / hidden / heads / FFN": (
            f"{model.num_layers} / {model.hidden_size} / {model.num_heads} / {model.ffn_size}"
        ),
        "positions": model.max_positions,
        "relative position bias": bias,
        "tokens": f"{model.vocab_size:,}",
    }
