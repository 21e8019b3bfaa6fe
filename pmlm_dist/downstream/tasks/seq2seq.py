"""Sequence-to-sequence generation: `pmlm finetune --task seq2seq`, pseudo-mask fine-tuning (Bao et al., 2020).

    row {src, tgt} --read--> texts --features--> token ids --collate--> seq2seq layout (masking/), trimmed to the batch
    loss      one forward pass over all pseudo masks: label-smoothed cross entropy of the target tokens, summed
    predict   decoding from the source alone (decoding/), and the negative log-likelihood of the reference target
    scores    ROUGE-1, 2, L (F1, stemmed) and BLEU of the generated text; the best checkpoint has the highest ROUGE-L;
              nll: negative log-likelihood of the references in nats per token, without label smoothing and noise

The language model is trained without a head. Pre-training, fine-tuning and decoding share one visibility rule.

Legend: B batch, S source slots, M target slots, T = S + 2M.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from pmlm_dist.config import ConfigError, ModelConfig, raise_if_any
from pmlm_dist.data.batch import special_ids
from pmlm_dist.decoding.batch_generation import build_search, generate_batch
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.downstream.settings import FinetuneConfig, GenerationConfig
from pmlm_dist.downstream.tasks.inputs import find_column, raise_row_problems, valid_rows
from pmlm_dist.downstream.tasks.overlap import bleu_signature, overlap_scores
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SOURCES, TARGETS = ("src", "source", "text"), ("tgt", "target", "summary")
"""Possible names of the columns."""


@dataclass(frozen=True)
class PairExample:
    """One validated row; no target if unlabeled."""

    id: Any
    source: str
    target: str | None
    location: str


class GeneratedTarget(NamedTuple):
    """The output for one source."""

    tokens: list[int]
    """Generated tokens."""
    nll: float
    """Negative log-likelihood of the reference target, its closing [SEP] included."""
    count: int
    """Tokens of the reference target after truncation, [SEP] included."""


@dataclass(frozen=True)
class PairFeature:
    """Token ids without special tokens."""

    source: np.ndarray
    target: np.ndarray


class Seq2Seq(Task[PairExample, PairFeature]):
    """Generation of a target for each source."""

    metric = "rougeL"

    def __init__(self, settings: GenerationConfig, vocabulary: Vocabulary, *, columns: tuple[str, str], too_long: str):
        self.settings, self.vocabulary, self.columns, self.too_long = settings, vocabulary, columns, too_long
        self._special = special_ids(vocabulary)
        self._num_truncated: dict[str, int] = {}
        self._model_config: ModelConfig | None = None

    @classmethod
    def make(cls, config: FinetuneConfig, rows: Sequence[Row], vocabulary: Vocabulary, model: ModelConfig) -> Self:
        inputs, origin = config.inputs, f"--task {config.task}"
        source = find_column(rows, inputs.text, SOURCES, role="text", origin=origin)
        target = find_column(rows, inputs.label, TARGETS, role="label", origin=origin)
        decoding = [f"generation.{problem}" for problem in decoding_problems(config.generation.decoding)]
        raise_if_any([*decoding, *fitting_problems(config.generation, model)])
        return cls(config.generation, vocabulary, columns=(source, target), too_long=inputs.too_long)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary) -> Self:
        settings = generation_settings(saved)
        return cls(settings, vocabulary, columns=tuple(saved["columns"]), too_long=saved["too_long"])

    def as_json(self) -> dict[str, Any]:
        return {"generation": asdict(self.settings), "columns": list(self.columns), "too_long": self.too_long}

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        return any(row.get(self.columns[1]) for row in rows)

    def read(self, rows: Sequence[Row], *, origin: str, labeled: bool = True) -> list[PairExample]:
        """Validate sources and targets of all rows; neither may be empty."""
        return [
            PairExample(row.id, row.texts[0], row.texts[1] if labeled else None, row.location)
            for row in valid_rows(rows, self.columns[: 1 + labeled], label=None, origin=origin)
        ]

    def features(self, examples: Sequence[PairExample], *, training: bool) -> list[PairFeature]:
        """Tokenize; inputs that are too long are counted and later truncated by the layout, or raise `ConfigError`."""
        sources = self.vocabulary.encode_batch([example.source for example in examples])
        targets = self.vocabulary.encode_batch([example.target or "" for example in examples])
        problems: list[str] = []
        for example, source, target in zip(examples, sources, targets, strict=True):
            lengths = {"max_source": len(source) + 2, **({"max_target": len(target) + 1} if training else {})}
            problems += self._length_problems(example.location, lengths)
            if training and not target:
                problems.append(
                    f"{example.location}: the target in column {self.columns[1]} has no token ({example.target!r})"
                )
        raise_row_problems(problems)
        return [
            PairFeature(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64))
            for source, target in zip(sources, targets, strict=True)
        ]

    def _length_problems(self, location: str, lengths: dict[str, int]) -> list[str]:
        problems = []
        for name, length in lengths.items():
            largest = getattr(self.settings, name)
            if length > largest:
                self._num_truncated[name] = self._num_truncated.get(name, 0) + 1
                problems.append(
                    f"{location}: {length} tokens, at most {largest} (generation.{name}) are allowed with "
                    "--inputs.too-long raise"
                )
        return problems if self.too_long == "raise" else []

    def notes(self) -> list[str]:
        return [
            f"{count:,} {'sources' if name == 'max_source' else 'targets'} were truncated to "
            f"{getattr(self.settings, name)} tokens (generation.{name})"
            for name, count in self._num_truncated.items()
        ]

    # ----------------------------------------------------------------------------------------------------------- model

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> PseudoMaskedLM:
        """Build the language model, without a head."""
        raise_if_any(fitting_problems(self.settings, config))
        self._model_config = config
        return build_model(config, padded_vocab_size=padded_vocab_size)

    def length(self, feature: PairFeature) -> int:
        """Return the tokens of the source; decoding does not depend on the target."""
        return feature.source.size

    def collate(self, features: Sequence[PairFeature], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Build the layout of `masking/seq2seq_layout.py`; its noise is a function of (seed, epoch, id)."""
        settings = self.settings
        layout = build_seq2seq_layout(
            [(feature.source, feature.target) for feature in features],
            sample_ids=ids,
            epochs=[epoch] * len(features),
            seed=seed,
            rule=Seq2SeqRule(settings.max_source, settings.max_target, target_mask_prob=settings.target_mask_prob),
            special=self._special,
            trim=True,
        )
        tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
        return TaskBatch(tensors, int(layout.weights_BM.sum()))

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the summed cross entropy of the target tokens with label smoothing."""
        tensors = batch.tensors
        losses_1MB, _ = engine(
            inputs=SlotInputs.of(tensors),
            targets_BM=tensors["targets_BM"],
            objectives=("par",),
            label_smoothing=self.settings.label_smoothing,
        )
        return (losses_1MB[0] * tensors["weights_BM"].t()).sum()

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[GeneratedTarget]:
        """Decode a target for each source, and score its reference."""
        nll_B, counts_B = self._reference_nll(engine, batch)
        tokens_BS, valid_BS = (_source_part(batch, name).cpu() for name in ("tokens_BT", "valid_BT"))
        sources = [row[valid].numpy() for row, valid in zip(tokens_BS, valid_BS, strict=True)]
        search = build_search(replace(self.settings.decoding, num_return_sequences=1), self._special)
        with self._decodable(engine) as model:
            hypotheses = generate_batch(model, sources, search=search, special=self._special)
        generated = [list(best_first[0].tokens) if best_first else [] for best_first in hypotheses]
        return [GeneratedTarget(*output) for output in zip(generated, nll_B, counts_B, strict=True)]

    def _reference_nll(self, engine: nn.Module, batch: TaskBatch) -> tuple[list[float], list[int]]:
        """Return the negative log-likelihood [B] of each reference, and its token count [B], from one forward pass.

        The layout is that of decoding: true tokens as originals and [MASK] at every pseudo mask, thus no noise.
        """
        tensors = batch.tensors
        targets_BM, weights_BM = tensors["targets_BM"], tensors["weights_BM"]
        masks_BM = torch.full_like(targets_BM, self._special.mask)
        tokens_BT = torch.cat([_source_part(batch, "tokens_BT"), targets_BM, masks_BM], dim=1)
        losses_1MB, _ = engine(
            inputs=SlotInputs.of({**tensors, "tokens_BT": tokens_BT}), targets_BM=targets_BM, objectives=("par",)
        )
        nll_B = (losses_1MB[0].t() * weights_BM).sum(dim=1)
        return nll_B.tolist(), weights_BM.sum(dim=1).long().tolist()

    def _decodable(self, engine: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Return a context with the module in `engine`, whose parts decoding calls one by one."""
        if isinstance(engine, PseudoMaskedLM):
            return contextlib.nullcontext(engine)
        # Imported here: it needs DeepSpeed, which only fine-tuning loads.
        from pmlm_dist.engine.deepspeed_engine import gathered_module

        config = self._model_config
        assert config is not None
        return gathered_module(engine, lambda: build_model(config, padded_vocab_size=self.vocabulary.padded_size()))

    # ----------------------------------------------------------------------------------------------------- predictions

    def predictions(
        self, examples: Sequence[PairExample], features: Sequence[PairFeature], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return `source`, `prediction`, and of labeled examples `reference`, `reference_nll`, `reference_tokens`."""
        predictions = []
        for example, output in zip(examples, outputs, strict=True):
            tokens, nll, count = output
            reference = {}
            if example.target is not None:
                reference = {"reference": example.target, "reference_nll": round(nll, 2), "reference_tokens": count}
            prediction = self.vocabulary.decode(tokens)
            predictions.append({"id": example.id, "source": example.source, **reference, "prediction": prediction})
        return predictions

    def scores(self, examples: Sequence[PairExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return ROUGE and BLEU, 0 to 100, and `nll` of the references in nats per token."""
        nll, tokens = (sum(row[f"reference_{name}"] for row in predictions) for name in ("nll", "tokens"))
        overlap = overlap_scores([prediction["prediction"] for prediction in predictions], _references(examples))
        return {**overlap, "nll": nll / tokens}

    def signatures(self, examples: Sequence[PairExample]) -> dict[str, str]:
        return {"bleu": bleu_signature(_references(examples))}

    def mean_loss(self, features: Sequence[PairFeature], outputs: Sequence[Any]) -> float:
        """Return the negative log-likelihood of the references in nats per token."""
        targets = [GeneratedTarget(*output) for output in outputs]
        return math.fsum(target.nll for target in targets) / sum(target.count for target in targets)


def _references(examples: Sequence[PairExample]) -> list[str]:
    return [example.target or "" for example in examples]


def _source_part(batch: TaskBatch, name: str) -> Tensor:
    """Return the source slots [B, S] of a tensor [B, T]; target tokens and pseudo masks follow them."""
    return batch.tensors[name][:, : -2 * batch.tensors["targets_BM"].shape[1]]


def generation_settings(saved: dict[str, Any]) -> GenerationConfig:
    """Return the settings in `Seq2Seq.as_json()`."""
    values = saved["generation"]
    return GenerationConfig(**{**values, "decoding": DecodingConfig(**values["decoding"])})


def fitting_problems(generation: GenerationConfig, model: ModelConfig) -> list[str]:
    """Return why `model` has too few positions or segments for `generation`."""
    longest = max(generation.max_target, generation.decoding.max_length)
    problems = []
    if generation.max_source + longest > model.max_positions:
        problems.append(
            f"a source of {generation.max_source} tokens (generation.max_source) and a target of {longest} (the larger "
            f"of generation.max_target and generation.decoding.max_length) do not fit the model's "
            f"{model.max_positions} positions: use at most {model.max_positions} together, or give the model more by "
            "`pmlm extend-positions`"
        )
    if model.segment_types < 2:
        problems.append(
            f"the model has {model.segment_types} segment type, source and target need 2: it cannot generate"
        )
    return problems


def raise_if_not_seq2seq(configuration: dict[str, Any], folder: Any) -> None:
    """Raise `ConfigError` if a checkpoint was fine-tuned for a task other than seq2seq."""
    task = configuration.get("task")
    if isinstance(task, dict) and task.get("kind") != "seq2seq":
        raise ConfigError(
            [f"{folder} was fine-tuned for {task.get('kind')} and cannot generate: use a model of --task seq2seq"]
        )
