"""Model card of an export: training data, settings and progress, and limitations of the format."""

from typing import Any

from pmlm_dist.conversion.huggingface import ExportedModel
from pmlm_dist.conversion.pretrained import PretrainedWeights

_FRONT_MATTER = """---
library_name: {library}
pipeline_tag: fill-mask
tags:
- {tags}
---
"""
_SUMMARY = """
# {title}

{origin} This folder holds the model as `{kind}`, a bidirectional encoder with a masked-LM head. It has no trained
pooler: for sentence vectors, use the mean of the last hidden states.
"""
_PRETRAINED = "Pre-trained with the pseudo-masked language model of UniLMv2 (arXiv 2002.12804)."


def model_card(pretrained: PretrainedWeights, exported: ExportedModel, *, difference: float) -> str:
    """Return Markdown with the front matter of a model hub; what is not known, such as the language, is left out."""
    kind, imported = exported.settings["model_type"], _configuration(pretrained).get("imported")
    library = "unilm" if kind == "unilm" else "transformers"
    tags = [kind] if imported else ["unilmv2", "pseudo-masked-language-model", kind]
    title = "Masked language model" if imported else "Pseudo-masked language model"
    origin = "Not trained by the program that wrote it." if imported else _PRETRAINED
    parts = [
        _FRONT_MATTER.format(library=library, tags="\n- ".join(tags)),
        _SUMMARY.format(title=title, origin=origin, kind=kind),
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


def _configuration(pretrained: PretrainedWeights) -> dict[str, Any]:
    return pretrained.facts.get("configuration", {})


def _training_facts(pretrained: PretrainedWeights) -> dict[str, Any]:
    """Return what the checkpoint records of a pre-training, a fine-tuning or an import; None for the rest."""
    facts, run = pretrained.facts, _configuration(pretrained)
    corpus = run.get("corpus_fingerprint")
    imported = run.get("imported")
    if imported:
        return {"converted from": f"{imported.get('format')}, without further training", "corpus (sha256)": corpus}
    task, optim = run.get("task", {}), run.get("optim", run.get("recipe", {}))
    rate, steps = run.get("masking", {}).get("rate"), run.get("train", {}).get("steps")
    identity = facts.get("identity", {})
    return {
        "fine-tuned for": task.get("kind"),
        "optimizer steps": f"{facts['step']:,}" + (f" of {steps:,}" if steps else ""),
        "sequences": f"{facts['samples_consumed']:,}",
        "tokens": f"{facts['tokens_seen']:,}" if facts["tokens_seen"] else None,
        "sequence length": run.get("sequence_length"),
        "batch (sequences)": identity.get("train_batch_size"),
        "objective": run.get("objective", {}).get("kind"),
        "masked": f"{rate} of the tokens" if rate else None,
        "AdamW": ", ".join(f"{name} {value}" for name, value in optim.items()) or None,
        "precision": identity.get("precision"),
        "corpus (sha256)": corpus,
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
