"""Writing the target of a source: `pmlm finetune --task seq2seq`, the method's pseudo-mask fine-tuning.

    row {src, tgt} --read--> texts --features--> token ids --collate--> masking/seq2seq_layout.py, cut to the batch
    loss      one forward pass reads every pseudo mask: smoothed cross entropy of each target token, summed
    predict   the same network writes step by step (decoding/), from the source alone; how likely is the target
    scores    ROUGE-1, 2, L (F1, stemmed) and BLEU of what was written; the best checkpoint has the highest ROUGE-L;
              nll, the target's negative log-likelihood in nats a token, without smoothing and noise

The whole language model is trained, no head is added: pre-training, fine-tuning and decoding share one visibility rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.batch_generation import build_search, generate_batch
from pmlm_dist.decoding.beam_search import Hypothesis
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.downstream.settings import FinetuneConfig, GenerationConfig
from pmlm_dist.downstream.tasks.inputs import column, id_of, raise_row_problems, text_of
from pmlm_dist.downstream.tasks.overlap import overlap_scores
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout, source_ids
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.vocab import Vocabulary

SOURCES, TARGETS = ("src", "source", "text"), ("tgt", "target", "summary")
"""What the columns may be called."""


@dataclass(frozen=True)
class PairExample:
    """One row, checked; no target where it is not told."""

    id: Any
    source: str
    target: str | None
    where: str


@dataclass(frozen=True)
class GeneratedTarget:
    """What the network says to one source."""

    tokens: list[int]
    """What it writes."""
    nll: float
    """Negative log-likelihood of the target, its closing [SEP] included."""
    count: int
    """Tokens of the target, as far as they are read."""


@dataclass(frozen=True)
class PairFeature:
    """Token ids without special tokens."""

    source: np.ndarray
    target: np.ndarray


class Seq2Seq(Task[PairExample, PairFeature]):
    """A target to each source."""

    metric = "rougeL"

    def __init__(self, settings: GenerationConfig, vocabulary: Vocabulary, *, columns: tuple[str, str], too_long: str):
        self.settings, self.vocabulary, self.columns, self.too_long = settings, vocabulary, columns, too_long
        self._special = special_ids(vocabulary)
        self._cut: dict[str, int] = {}
        self._model: ModelConfig | None = None

    @classmethod
    def make(cls, config: FinetuneConfig, rows: Sequence[Row], vocabulary: Vocabulary, model: ModelConfig) -> Seq2Seq:
        """The task for the training `rows`. Raises `ConfigError`."""
        inputs, origin = config.inputs, f"--task {config.task}"
        source = column(rows, inputs.text, SOURCES, what="text", origin=origin)
        target = column(rows, inputs.label, TARGETS, what="label", origin=origin)
        raise_if_any([*generation_problems(config.generation), *fitting_problems(config.generation, model)])
        return cls(config.generation, vocabulary, columns=(source, target), too_long=inputs.too_long)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary) -> Seq2Seq:
        """The task that `saved` was called of."""
        settings = generation_of(saved)
        return cls(settings, vocabulary, columns=tuple(saved["columns"]), too_long=saved["too_long"])

    def saved(self) -> dict[str, Any]:
        """The settings."""
        return {"generation": asdict(self.settings), "columns": list(self.columns), "too_long": self.too_long}

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Whether rows have targets."""
        return any(row.get(self.columns[1]) for row in rows)

    def read(self, rows: Sequence[Row], *, origin: str, labelled: bool = True) -> list[PairExample]:
        """Check sources and targets of all rows: both are texts, neither is empty."""
        (source, target), problems, examples = self.columns, [], []
        missing = [name for name in (source, *([target] if labelled else [])) if name not in rows[0]]
        raise_if_any([f"{origin}: no column {name}, there are {', '.join(rows[0])}" for name in missing])
        for number, row in enumerate(rows, start=1):
            where = f"{origin}, row {number}"
            texts = [text_of(row, name, where=where, problems=problems) for name in (source, target)[: 1 + labelled]]
            examples.append(PairExample(id_of(row, number - 1), texts[0], texts[1] if labelled else None, where))
        raise_row_problems(problems)
        return examples

    def features(self, examples: Sequence[PairExample], *, training: bool) -> list[PairFeature]:
        """Token ids; what is too long is counted, and cut when it is laid out, or refused."""
        sources = self.vocabulary.encode_batch([example.source for example in examples])
        targets = self.vocabulary.encode_batch([example.target or "" for example in examples])
        problems: list[str] = []
        for example, source, target in zip(examples, sources, targets, strict=True):
            lengths = {"max_source": len(source) + 2, **({"max_target": len(target) + 1} if training else {})}
            problems += self._too_long(example.where, lengths)
            if training and not target:
                problems.append(
                    f"{example.where}: the target in column {self.columns[1]} has no token ({example.target!r})"
                )
        raise_row_problems(problems)
        return [
            PairFeature(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64))
            for source, target in zip(sources, targets, strict=True)
        ]

    def _too_long(self, where: str, lengths: dict[str, int]) -> list[str]:
        problems = []
        for name, length in lengths.items():
            largest = getattr(self.settings, name)
            if length > largest:
                self._cut[name] = self._cut.get(name, 0) + 1
                problems.append(
                    f"{where}: {length} tokens, at most {largest} (generation.{name}) are allowed with "
                    "--inputs.too-long refuse"
                )
        return problems if self.too_long == "refuse" else []

    def notes(self) -> list[str]:
        """How many sources and targets were cut."""
        return [
            f"{count:,} {'sources' if name == 'max_source' else 'targets'} were longer than "
            f"{getattr(self.settings, name)} tokens (generation.{name}) and lost their end"
            for name, count in self._cut.items()
        ]

    # --------------------------------------------------------------------------------------------------------- network

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> PseudoMaskedLM:
        """The language model itself."""
        raise_if_any(fitting_problems(self.settings, config))
        self._model = config
        return build_model(config, padded_vocab_size=padded_vocab_size)

    def length(self, feature: PairFeature) -> int:
        """Tokens of the source: what predicting depends on."""
        return feature.source.size

    def collate(self, features: Sequence[PairFeature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """The layout of `masking/seq2seq_layout.py`; its noise follows from (seed, epoch, id)."""
        layout = build_seq2seq_layout(
            [(feature.source, feature.target) for feature in features],
            sample_ids=ids,
            epochs=[epoch] * len(features),
            seed=seed,
            rule=self._rule,
            special=self._special,
            trim=True,
        )
        tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
        return TaskBatch(tensors, int(layout.weights_BM.sum()))

    @property
    def _rule(self) -> Seq2SeqRule:
        settings = self.settings
        return Seq2SeqRule(settings.max_source, settings.max_target, target_mask_prob=settings.target_mask_prob)

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Cross entropy of the target's tokens with smoothed labels, summed."""
        tensors = batch.tensors
        losses_1MB, _ = engine(
            inputs=SlotInputs.of(tensors),
            targets_BM=tensors["targets_BM"],
            objectives=("par",),
            label_smoothing=self.settings.label_smoothing,
        )
        return (losses_1MB[0] * tensors["weights_BM"].t()).sum()

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[GeneratedTarget]:
        """What is written to each source, and how likely its target is."""
        from pmlm_dist.engine.deepspeed_engine import (
            gathered_module,  # it needs DeepSpeed, which `pmlm generate` does without
        )

        nats_B, counts_B = self._target_nll(engine, batch)
        tokens_BS, valid_BS = (_of_source(batch, name).cpu() for name in ("tokens_BT", "valid_BT"))
        sources = [row[valid].numpy() for row, valid in zip(tokens_BS, valid_BS, strict=True)]
        with gathered_module(engine, self._fresh) as model:
            found = generate_batch(
                model, sources, search=build_search(self.decoding, self._special), special=self._special
            )
        written = [list(hypotheses[0].tokens) if hypotheses else [] for hypotheses in found]
        return [GeneratedTarget(*answer) for answer in zip(written, nats_B, counts_B, strict=True)]

    def _target_nll(self, engine: nn.Module, batch: TaskBatch) -> tuple[list[float], list[int]]:
        """Negative log-likelihood [B] of each target, and its tokens [B], in one pass under the layout of decoding."""
        tensors = batch.tensors
        targets_BM, weights_BM = tensors["targets_BM"], tensors["weights_BM"]
        masks_BM = torch.full_like(targets_BM, self._special.mask)
        tokens_BT = torch.cat([_of_source(batch, "tokens_BT"), targets_BM, masks_BM], dim=1)
        losses_1MB, _ = engine(
            inputs=SlotInputs.of({**tensors, "tokens_BT": tokens_BT}),
            targets_BM=targets_BM,
            objectives=("par",),
        )
        nats_B = (losses_1MB[0].t() * weights_BM).sum(dim=1)
        return nats_B.tolist(), weights_BM.sum(dim=1).long().tolist()

    def _fresh(self) -> nn.Module:
        assert self._model is not None
        return build_model(self._model, padded_vocab_size=self.vocabulary.padded_size())

    @property
    def decoding(self) -> DecodingConfig:
        """How answers are searched for."""
        return replace(self.settings.decoding, num_return_sequences=1)

    # ----------------------------------------------------------------------------------------------------- predictions

    def predictions(
        self, examples: Sequence[PairExample], features: Sequence[PairFeature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """`prediction`; where a target is told also `reference`, its `reference_nll` and `reference_tokens`."""
        found = []
        for example, answer in zip(examples, outputs, strict=True):
            reference = {}
            if example.target is not None:
                nll = round(answer.nll, 2)
                reference = {"reference": example.target, "reference_nll": nll, "reference_tokens": answer.count}
            found.append({"id": example.id, "prediction": self.vocabulary.decode(answer.tokens), **reference})
        return found

    def scores(self, examples: Sequence[PairExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """ROUGE and BLEU, 0 to 100, and nats a token of the targets."""
        references = [example.target or "" for example in examples]
        nll, tokens = (sum(row[f"reference_{what}"] for row in predictions) for what in ("nll", "tokens"))
        overlap = overlap_scores([prediction["prediction"] for prediction in predictions], references)
        return {**overlap, "nll": nll / tokens}


def _of_source(batch: TaskBatch, name: str) -> Tensor:
    """The source's slots [B, S] of a tensor [B, T]; the target's tokens and pseudo masks follow them."""
    return batch.tensors[name][:, : -2 * batch.tensors["targets_BM"].shape[1]]


def source_of(words: Sequence[int], settings: GenerationConfig, vocabulary: Vocabulary) -> np.ndarray:
    """[CLS] words [SEP], cut to the longest source."""
    rule = Seq2SeqRule(settings.max_source, settings.max_target)
    return source_ids(np.array(words, dtype=np.int64), rule=rule, special=special_ids(vocabulary))


def text_of_hypothesis(hypothesis: Hypothesis, vocabulary: Vocabulary) -> str:
    """What was written."""
    return vocabulary.decode(hypothesis.tokens)


def generation_of(saved: dict[str, Any]) -> GenerationConfig:
    """The settings in what `Seq2Seq.saved` gave."""
    plain = saved["generation"]
    return GenerationConfig(**{**plain, "decoding": DecodingConfig(**plain["decoding"])})


def generation_problems(generation: GenerationConfig) -> list[str]:
    """Everything that is wrong with `writing` by itself."""
    found = []
    for name, smallest in (("max_source", 3), ("max_target", 2)):
        if getattr(generation, name) < smallest:
            found.append(f"generation.{name} ({getattr(generation, name)}) must be at least {smallest}")
    for name in ("target_mask_prob", "label_smoothing"):
        if not 0.0 <= getattr(generation, name) <= 1.0:
            found.append(f"generation.{name} ({getattr(generation, name)}) must lie between 0 and 1")
    return [*found, *(f"generation.{problem}" for problem in decoding_problems(generation.decoding))]


def fitting_problems(generation: GenerationConfig, model: ModelConfig) -> list[str]:
    """Why `model` cannot write such answers."""
    longest = max(generation.max_target, generation.decoding.max_length)
    found = []
    if generation.max_source + longest > model.max_positions:
        found.append(
            f"a source of {generation.max_source} tokens (generation.max_source) and an answer of {longest} (the larger of "
            f"generation.max_target and generation.decoding.max_length) do not fit the model's {model.max_positions} "
            f"positions: use at most {model.max_positions} together, or give the model more by `pmlm extend-positions`"
        )
    if model.segment_types < 2:
        found.append(
            f"the model has {model.segment_types} segment type, source and answer need 2: this checkpoint cannot write"
        )
    return found


def raise_if_not_seq2seq(configuration: dict[str, Any], folder: Any) -> None:
    """Raise `ConfigError` when a checkpoint was fine-tuned for something other than writing."""
    task = configuration.get("task")
    if isinstance(task, dict) and task.get("kind") != "seq2seq":
        raise ConfigError(
            [f"{folder} was fine-tuned for {task.get('kind')} and cannot write: use a model of --task seq2seq"]
        )
