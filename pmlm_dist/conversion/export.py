"""`pmlm export`: a checkpoint in another format, reloaded and compared before it gets its name.

checkpoint --open_pretrained--> PretrainedWeights --to_bert | to_mpnet | to_unilm--> temporary folder
                                    |                               | loaded by transformers (UniLM: by import)
                                    '-- logits, states, token ids --'  compared  --> folder, with a model card
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.bert import to_bert
from pmlm_dist.conversion.card import model_card
from pmlm_dist.conversion.files import CONFIG, OLD_WEIGHTS, write_settings
from pmlm_dist.conversion.huggingface import (
    ExportedModel,
    ModelOutputs,
    load_transformers,
    transformers_outputs,
    transformers_token_ids,
    write_folder,
)
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.mpnet import to_mpnet
from pmlm_dist.conversion.pretrained import (
    PretrainedWeights,
    build_pretrained,
    hidden_states,
    logits,
    new_folder,
    open_pretrained,
)
from pmlm_dist.conversion.unilm import to_unilm
from pmlm_dist.vocabulary.vocabulary import Vocabulary

MAX_DIFFERENCE = 1e-4
"""Between the logits of checkpoint and export, in fp32."""
Format = Literal["mpnet", "bert", "unilm"]
_FORMATS: dict[str, Callable[[PretrainedWeights], ExportedModel]]
_FORMATS = {"mpnet": to_mpnet, "bert": to_bert, "unilm": to_unilm}


@dataclass(frozen=True)
class ProbeInputs:
    """Texts that two models are compared on: token ids of the checkpoint's vocabulary, segments, validity [B, T]."""

    ids_BT: Tensor
    segments_BT: Tensor
    valid_BT: Tensor


def export(folder: Path, /, *, format: Format, output: Path | None = None, onnx: bool = False) -> None:
    """Export the newest valid checkpoint in a folder to Hugging Face `transformers` (mpnet, bert) or UniLM.

    The result is reloaded and its logits are compared with the checkpoint's before it gets its name.

    Args:
        folder: A run folder, its checkpoints, one of them, or a folder written by `pmlm import`.
        format: `mpnet` for models with relative position bias, `bert` for those without, `unilm` for both.
        output: The folder to write, which must not exist. None: RUN_DIR/export/FORMAT-STEP.
        onnx: Also write the encoder as onnx/model.onnx, checked with onnxruntime (extra `onnx`).
    """
    if onnx and format == "unilm":
        raise ConfigError(["--onnx requires a format that transformers can load, not --format unilm: use another"])
    if format != "unilm":
        load_transformers()
    pretrained = open_pretrained(folder)
    target = Path(output) if output else _default_output(pretrained, format)
    exported = _FORMATS[format](pretrained)
    with new_folder(target) as temporary:
        of_logits, of_states = _write_and_compare(pretrained, exported, temporary, onnx=onnx)
        card = model_card(pretrained, exported, difference=of_logits)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    for limitation in exported.limitations:
        print(f"note: {limitation}")
    print(
        f"written: {target} ({format}, step {pretrained.facts.get('step', 0)}); largest differences after reloading: "
        f"logits {of_logits:.1e}, last hidden states {of_states:.1e}"
    )


def _default_output(pretrained: PretrainedWeights, format: str) -> Path:
    checkpoint: Path = pretrained.facts["folder"]
    return checkpoint.parent.parent / "export" / f"{format}-{checkpoint.name.removeprefix('step-')}"


def _write_and_compare(
    pretrained: PretrainedWeights, exported: ExportedModel, folder: Path, *, onnx: bool
) -> tuple[float, float]:
    """Return the largest absolute differences of logits and last hidden states after reloading, in fp32."""
    probe = probe_inputs(pretrained)
    expected = compute_outputs(pretrained, probe, one_segment=exported.settings["model_type"] == "mpnet")
    if exported.settings["model_type"] == "unilm":
        _write_unilm(exported, folder)
        reloaded = read_pretrained(folder, format="unilm")
        if exported.vocabulary.fingerprint != reloaded.vocabulary.fingerprint:
            raise ConfigError(
                [f"the vocabulary of the export is read back as {reloaded.vocabulary.description}, not "
                 f"{exported.vocabulary.description}: nothing was written; this is a bug of pmlm export"]
            )  # fmt: skip
        actual = compute_outputs(reloaded, probe)
    else:
        write_folder(exported, folder, max_positions=pretrained.model.max_positions)
        raise_if_any(_tokenization_problems(pretrained.vocabulary, exported.vocabulary, folder))
        actual = _exported_outputs(pretrained, exported, folder, probe)
    of_logits = float((expected.logits_NV - actual.logits_NV).abs().max())
    if not of_logits <= MAX_DIFFERENCE:  # this way round, NaN fails too
        raise ConfigError(
            [f"the logits of the export differ from the checkpoint's by {of_logits:.1e}, more than rounding "
             f"errors ({MAX_DIFFERENCE:.0e}): nothing was written; this is a bug of pmlm export"]
        )  # fmt: skip
    if onnx:
        from pmlm_dist.conversion.onnx import write_onnx

        write_onnx(folder)
    return of_logits, float((expected.states_NE - actual.states_NE).abs().max())


def _write_unilm(exported: ExportedModel, folder: Path) -> None:
    # Cloned: torch.save writes the whole storage of a view.
    with (folder / OLD_WEIGHTS).open("wb") as file:  # of Python: its error of a full disk has a number
        torch.save({name: tensor.clone() for name, tensor in exported.tensors.items()}, file)
    write_settings(folder / CONFIG, exported.settings)
    exported.vocabulary.save(folder)


# ---------------------------------------------------------------------------------------------------------- comparison


def probe_inputs(pretrained: PretrainedWeights) -> ProbeInputs:
    """Return two random texts of two segments: one of maximum length and one, padded, of a third of it."""
    generator, length = torch.Generator().manual_seed(0), pretrained.model.max_positions
    vocabulary = pretrained.vocabulary
    lengths = torch.tensor([length, max(4, length // 3)])
    ids_BT = torch.randint(vocabulary.size - 1, (2, length), generator=generator)
    ids_BT += ids_BT >= vocabulary.pad_id  # any token but [PAD], which occurs in no text
    ids_BT[:, 0] = vocabulary.cls_id
    valid_BT = torch.arange(length) < lengths[:, None]
    segments_BT = (torch.arange(length) >= lengths[:, None] // 2).long() * min(1, pretrained.model.segment_types - 1)
    ids_BT[torch.arange(2), lengths - 1] = vocabulary.sep_id
    return ProbeInputs(ids_BT.where(valid_BT, torch.tensor(vocabulary.pad_id)), segments_BT, valid_BT)


def compute_outputs(pretrained: PretrainedWeights, probe: ProbeInputs, *, one_segment: bool = False) -> ModelOutputs:
    """Return the outputs of our implementation; `one_segment` sets every segment to 0."""
    model = build_pretrained(pretrained)
    segments_BT = torch.zeros_like(probe.segments_BT) if one_segment else probe.segments_BT
    states_BTE = hidden_states(model, probe.ids_BT, segments_BT=segments_BT, valid_BT=probe.valid_BT)
    return ModelOutputs(states_BTE[probe.valid_BT], logits(model, states_BTE)[probe.valid_BT])


def _exported_outputs(
    pretrained: PretrainedWeights, exported: ExportedModel, folder: Path, probe: ProbeInputs
) -> ModelOutputs:
    """Return the outputs of the export, its logits in the token order of the checkpoint."""
    exported_id_V = torch.tensor([exported.vocabulary.ids[token] for token in pretrained.vocabulary.tokens])
    outputs = transformers_outputs(
        folder, ids_BT=exported_id_V[probe.ids_BT], segments_BT=probe.segments_BT, valid_BT=probe.valid_BT
    )
    return ModelOutputs(outputs.states_NE, outputs.logits_NV[:, exported_id_V])


def _tokenization_problems(original: Vocabulary, exported: Vocabulary, folder: Path) -> list[str]:
    """Return the texts that the tokenizer of the export splits differently than the checkpoint's vocabulary."""
    words = [token for id, token in enumerate(original.tokens) if id not in original.special_ids and token.isalnum()]
    texts = [" ".join(words[start::7][:40]) for start in range(7)] + ["Ünïcödé, UPPER case; don't: 1,024 (x) 北京!", ""]
    texts += [f"a {word} {word.upper()}, {word}s" for word in original.words]
    problems = []
    exported_ids = transformers_token_ids(folder, texts)
    for text, original_ids, ids in zip(texts, original.encode_batch(texts), exported_ids, strict=True):
        expected = [original.tokens[id] for id in (original.cls_id, *original_ids, original.sep_id)]
        if [exported.tokens[id] for id in ids] != expected:
            problems.append(f"the export tokenizes {text!r} differently than the checkpoint: nothing was written")
    return problems
