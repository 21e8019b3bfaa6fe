"""`pmlm export`: a checkpoint as a folder of another program's, which is loaded back and asked before it counts.

checkpoint --open--> Pretrained --as_bert | as_mpnet | as_unilm--> temporary folder
                         |                                              | loaded by transformers (UniLM: by import)
                         '--- logits, states, ids ----- compared with --'      --> folder, with a model card
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.conversion.card import model_card
from pmlm_dist.conversion.files import CONFIG, OLD_WEIGHTS, write_settings
from pmlm_dist.conversion.huggingface import (
    Exported,
    ModelOutputs,
    as_bert,
    as_mpnet,
    ids_of_folder,
    load_transformers,
    outputs_of_folder,
    write_folder,
)
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.pretrained import (
    PretrainedWeights,
    build_pretrained,
    hidden_states,
    logits,
    new_folder,
    open_pretrained,
)
from pmlm_dist.conversion.unilm import as_unilm
from pmlm_dist.vocab import Vocabulary

LARGEST_DIFFERENCE = 1e-4
"""Between logits of the checkpoint and of its export, in fp32."""
Format = Literal["mpnet", "bert", "unilm"]
_FORMATS: dict[str, Callable[[PretrainedWeights], Exported]] = {"mpnet": as_mpnet, "bert": as_bert, "unilm": as_unilm}


@dataclass(frozen=True)
class ProbeInputs:
    """Texts to compare two models by: ids of the checkpoint's vocabulary [B, T], segments, which are no padding."""

    ids_BT: Tensor
    segments_BT: Tensor
    valid_BT: Tensor


@dataclass(frozen=True)
class Difference:
    """The largest differences found, in fp32."""

    logits: float
    states: float


def export(
    folder: Path, /, *, format: Format, output: Path | None = None, vocabulary: Path | None = None, onnx: bool = False
) -> None:
    """Write the newest whole checkpoint in a folder for Hugging Face `transformers` (mpnet, bert), or as UniLM's.

    The result is loaded back, and its logits are compared with the checkpoint's, before it gets its name.

    Args:
        folder: A run's folder, its checkpoints, one of them, or what `pmlm import` wrote.
        format: `mpnet` for models with relative position bias, `bert` for those without, `unilm` for either.
        output: The folder to write, which must not be there yet. None: RUN_DIR/export/FORMAT-STEP.
        vocabulary: Where the vocabulary lies. None: in the run's corpus, or beside imported weights.
        onnx: Also write the encoder as onnx/model.onnx, checked with onnxruntime (extra `onnx`).
    """
    if onnx and format == "unilm":
        raise ConfigError(["--onnx is written from what transformers loads, which --format unilm is not: use another"])
    if format != "unilm":
        load_transformers()
    pretrained = open_pretrained(folder, vocabulary=vocabulary)
    target = output or _default_output(pretrained, format)
    exported = _FORMATS[format](pretrained)
    with new_folder(target) as temporary:
        found = _write_and_compare(pretrained, exported, temporary, onnx=onnx)
        card = model_card(pretrained, exported, difference=found.logits)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    for sentence in exported.lost:
        print(f"note: {sentence}")
    print(
        f"written: {target} ({format}, step {pretrained.facts.get('step', 0)}); loaded back, logits differ by at most "
        f"{found.logits:.1e}, last hidden states by {found.states:.1e}"
    )


def _default_output(pretrained: PretrainedWeights, format: str) -> Path:
    checkpoint: Path = pretrained.facts["folder"]
    return checkpoint.parent.parent / "export" / f"{format}-{checkpoint.name.removeprefix('step-')}"


def _write_and_compare(pretrained: PretrainedWeights, exported: Exported, folder: Path, *, onnx: bool) -> Difference:
    questions = compute_outputs(pretrained)
    expected = outputs_of(pretrained, questions, one_segment=exported.settings["model_type"] == "mpnet")
    if exported.settings["model_type"] == "unilm":
        _write_unilm(exported, folder)
        found = outputs_of(read_pretrained(folder, format="unilm"), questions)
    else:
        write_folder(exported, folder, max_positions=pretrained.model.max_positions)
        raise_if_any(_tokenization_differences(pretrained.vocabulary, exported.vocabulary, folder))
        found = _outputs_of_export(pretrained, exported, folder, questions)
    difference = Difference(
        logits=_largest(expected.logits_NV, found.logits_NV), states=_largest(expected.states_NE, found.states_NE)
    )
    if not difference.logits <= LARGEST_DIFFERENCE:
        raise ConfigError(
            [f"the export's logits differ by {difference.logits:.1e} from the checkpoint's, more than the "
             f"{LARGEST_DIFFERENCE:.0e} of rounding: nothing was written; this is an error of this program"]
        )  # fmt: skip
    if onnx:
        from pmlm_dist.conversion.onnx import write_onnx

        write_onnx(folder)
    return difference


def _write_unilm(exported: Exported, folder: Path) -> None:
    torch.save({name: tensor.clone() for name, tensor in exported.tensors.items()}, folder / OLD_WEIGHTS)
    write_settings(folder / CONFIG, exported.settings)
    exported.vocabulary.save(folder)


# ---------------------------------------------------------------------------------------------------------- comparing


def compute_outputs(pretrained: PretrainedWeights) -> ProbeInputs:
    """Two random texts of two segments, one as long as the model takes and one of a third of that."""
    generator, longest = torch.Generator().manual_seed(0), pretrained.model.max_positions
    words = pretrained.vocabulary
    lengths = torch.tensor([longest, max(4, longest // 3)])
    ids_BT = torch.randint(words.size - 1, (2, longest), generator=generator)
    ids_BT += ids_BT >= words.pad_id  # any token but padding, which no text contains
    ids_BT[:, 0] = words.cls_id
    valid_BT = torch.arange(longest) < lengths[:, None]
    segments_BT = (torch.arange(longest) >= lengths[:, None] // 2).long() * min(1, pretrained.model.segment_types - 1)
    ids_BT[torch.arange(2), lengths - 1] = words.sep_id
    return ProbeInputs(ids_BT.where(valid_BT, torch.tensor(words.pad_id)), segments_BT, valid_BT)


def outputs_of(pretrained: PretrainedWeights, questions: ProbeInputs, *, one_segment: bool = False) -> ModelOutputs:
    """What the model itself says to `questions`."""
    model = build_pretrained(pretrained)
    segments_BT = torch.zeros_like(questions.segments_BT) if one_segment else questions.segments_BT
    states_BTE = hidden_states(model, questions.ids_BT, segments_BT=segments_BT, valid_BT=questions.valid_BT)
    return ModelOutputs(states_BTE[questions.valid_BT], logits(model, states_BTE)[questions.valid_BT])


def _outputs_of_export(
    pretrained: PretrainedWeights, exported: Exported, folder: Path, questions: ProbeInputs
) -> ModelOutputs:
    """What the export says, its logits in the order of the checkpoint's vocabulary."""
    ids = {token: id for id, token in enumerate(exported.vocabulary.tokens)}
    moved_V = torch.tensor([ids[token] for token in pretrained.vocabulary.tokens])
    found = outputs_of_folder(
        folder, ids_BT=moved_V[questions.ids_BT], segments_BT=questions.segments_BT, valid_BT=questions.valid_BT
    )
    return ModelOutputs(found.states_NE, found.logits_NV[:, moved_V])


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _tokenization_differences(own: Vocabulary, exported: Vocabulary, folder: Path) -> list[str]:
    """Texts that the export's tokenizer cuts into other tokens than the checkpoint's vocabulary does."""
    words = [token for id, token in enumerate(own.tokens) if id not in own.special_ids and token.isalnum()]
    texts = [" ".join(words[start::7][:40]) for start in range(7)] + ["Ünïcödé, UPPER case; don't: 1,024 (x) 北京!", ""]
    found = []
    for text, expected, ids in zip(texts, own.encode_batch(texts), ids_of_folder(folder, texts), strict=True):
        wanted = [own.token(id) for id in (own.cls_id, *expected, own.sep_id)]
        if [exported.token(id) for id in ids] != wanted:
            found.append(f"the export's tokenizer reads {text!r} otherwise than the checkpoint's: nothing was written")
    return found
