"""The model card of an export: what was trained, on what, how far, and what the format could not hold."""

from __future__ import annotations

from typing import Any

from pmlm_dist.conversion.huggingface import Exported
from pmlm_dist.conversion.pretrained import PretrainedWeights

_FRONT = """---
language: en
library_name: {library}
pipeline_tag: fill-mask
tags:
- unilmv2
- pseudo-masked-language-model
- {kind}
---
"""
_PURPOSE = """
# Pseudo-masked language model

Pre-trained as UniLMv2 (arXiv 2002.12804) describes: autoencoding and partially autoregressive prediction in one forward
pass, one network for both. This folder holds it as `{kind}`, a bidirectional encoder with a masked-LM head; for
sentence vectors take the mean of the last hidden states. There is no trained pooler.
"""


def model_card(pretrained: PretrainedWeights, exported: Exported, *, difference: float) -> str:
    """Markdown with the front matter that hubs read."""
    kind = exported.settings["model_type"]
    library = "unilm" if kind == "unilm" else "transformers"
    parts = [
        _FRONT.format(kind=kind, library=library) + _PURPOSE.format(kind=kind),
        "## Training\n" + _table(_training_facts(pretrained)),
        "## Model\n" + _table(_model_facts(pretrained)),
        "## Export\n"
        f"Loaded back, its logits differed from the checkpoint's by at most {difference:.1e} (fp32, random texts).\n",
    ]
    if exported.lost:
        parts.append("What this format cannot hold:\n" + "".join(f"- {sentence}\n" for sentence in exported.lost))
    return "\n".join(parts)


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value is not None)
    return f"| | |\n|---|---|\n{rows}"


def _training_facts(pretrained: PretrainedWeights) -> dict[str, Any]:
    facts, run = pretrained.facts, pretrained.facts.get("configuration", {})
    imported = run.get("imported")
    if imported:
        return {"imported from": f"{imported.get('format')}, not trained further"}
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
        "started from": run.get("init"),
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
