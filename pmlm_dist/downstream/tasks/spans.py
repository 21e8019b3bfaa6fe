"""Extractive question answering: a span of a passage answers a question, as in SQuAD 1.1 and 2.0.

    [CLS] question [SEP] window of the passage [SEP]     windows start `stride` tokens apart and overlap
      |                    |        |
      no answer          start     end                   two scores per token: start, end

*Training.* A window that does not contain the whole answer has [CLS] as the target of start and end.
*Prediction.* A span scores start + end; the best span over all windows of a question is the answer. If the training
split has unanswerable questions (SQuAD 2.0), the answer is empty where the minimum of [CLS] + [CLS] over the windows
exceeds the span's score (the rule of Devlin et al., 2019).

Legend: B batch, T tokens, P passage tokens of a window.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.config import ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks import scores
from pmlm_dist.downstream.tasks.inputs import (
    EncodedInput,
    ValidRow,
    collate,
    find_column,
    join,
    max_input_tokens,
    model_inputs,
    valid_rows,
)
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.model.task_model import TaskModel
from pmlm_dist.vocabulary.vocabulary import Vocabulary

MAX_TOKENS = 384
_NUM_CANDIDATES = 20
"""Best starts and best ends of a window that are combined."""


@dataclass(frozen=True)
class SpanSettings:
    """The saved state of the task."""

    question: str
    passage: str
    answers: str
    has_unanswerable: bool
    """True: the empty answer may be predicted, because the training split has unanswerable questions."""
    max_tokens: int
    stride: int
    max_question_tokens: int
    max_answer_tokens: int
    null_threshold: float


@dataclass(frozen=True)
class SpanExample:
    """A question, its passage and the reference answers; empty: unanswerable, None: unlabeled."""

    id: Any
    question: str
    passage: str
    answers: tuple[str, ...] | None
    starts: tuple[int, ...]
    """Offset of the first character of each answer."""


@dataclass(frozen=True)
class Window:
    """A question with a part of its passage."""

    example: int
    """Index of the example in its split."""
    encoded: EncodedInput
    first: int
    """Position of the first passage token in the input."""
    offsets: tuple[tuple[int, int], ...]
    """Character range [start, stop) in the passage of each passage token."""
    start: int
    end: int
    """Positions of the answer's first and last token in the input; 0 ([CLS]): the answer is not in this window."""


class SpanPrediction(NamedTuple):
    """The best span of a window (None: no span of an allowed length), and the score of the empty answer."""

    score: float
    span: tuple[int, int] | None
    """First and last token, relative to the window's passage."""
    null_score: float
    loss: float = 0.0


class Spans(Task[SpanExample, Window]):
    """The span that answers a question, or the empty answer."""

    def __init__(self, settings: SpanSettings, vocabulary: Vocabulary):
        self.settings, self.vocabulary, self.metric = settings, vocabulary, "f1"
        self._num_truncated = self._num_lost = 0

    @classmethod
    def make(cls, config: FinetuneConfig, rows: Sequence[Row], vocabulary: Vocabulary, model: ModelConfig) -> Self:
        inputs, origin = config.inputs, f"--task {config.task}"
        answers = find_column(rows, inputs.label, ("answers",), role="label", origin=origin)
        max_tokens = max_input_tokens(inputs.max_tokens, default=MAX_TOKENS, model=model)
        max_question = min(inputs.max_question_tokens, (max_tokens - 3) // 2)
        settings = SpanSettings(
            question=find_column(rows, inputs.text, ("question",), role="text", origin=origin),
            passage=find_column(rows, inputs.pair, ("context", "passage"), role="pair", origin=origin),
            answers=answers,
            has_unanswerable=any(not _answer_texts(row.get(answers)) for row in rows),
            max_tokens=max_tokens,
            stride=min(inputs.stride, max_tokens - max_question - 3),  # every passage token is in some window
            max_question_tokens=max_question,
            max_answer_tokens=inputs.max_answer_tokens,
            null_threshold=inputs.null_threshold,
        )
        return cls(settings, vocabulary)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary) -> Self:
        return cls(SpanSettings(**saved), vocabulary)

    def as_json(self) -> dict[str, Any]:
        return asdict(self.settings)

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Return True if any row has an answer; no answer is one if the training split has unanswerable questions."""
        answers = [row.get(self.settings.answers) for row in rows]
        return any(map(_answer_texts, answers)) or (
            self.settings.has_unanswerable and any(value not in (None, "") for value in answers)
        )

    def read(self, rows: Sequence[Row], *, origin: str, labeled: bool = True) -> list[SpanExample]:
        """Validate questions and passages, and that each answer is at its offset in the passage."""
        settings, examples = self.settings, []
        label = settings.answers if labeled else None
        for row in valid_rows(rows, (settings.question, settings.passage), label=label, origin=origin):
            question, passage = row.texts
            answers = _answers(row, settings.answers, passage) if labeled else []
            texts, starts = zip(*answers, strict=True) if answers else (() if labeled else None, ())
            if labeled and not answers and not settings.has_unanswerable:
                row.problems.append(f"{row.location}: no answer, and every question of the training split had one")
            examples.append(SpanExample(row.id, question, passage, texts, starts))
        return examples

    def features(self, examples: Sequence[SpanExample], *, training: bool) -> list[Window]:
        """Tokenize and split each passage into windows."""
        questions = self.vocabulary.encode_batch([example.question for example in examples])
        passages = self.vocabulary.encode_with_offsets([example.passage for example in examples])
        windows = []
        for number, (example, question, passage) in enumerate(zip(examples, questions, passages, strict=True)):
            self._num_truncated += len(question) > self.settings.max_question_tokens
            windows += self._windows(number, example, question[: self.settings.max_question_tokens], *passage)
        if training:
            covered = {window.example for window in windows if window.end}
            answered = {number for number, example in enumerate(examples) if example.answers}
            self._num_lost = len(answered - covered)
        return windows

    def _windows(
        self, number: int, example: SpanExample, question: list[int], ids: list[int], offsets: list[tuple[int, int]]
    ) -> Iterator[Window]:
        size, first = self.settings.max_tokens - len(question) - 3, len(question) + 2  # one [CLS] and two [SEP]
        answer = _answer_tokens(example, offsets)
        for at in range(0, max(1, len(ids) - size + self.settings.stride), self.settings.stride):
            part = ids[at : at + size]
            start = end = 0
            if answer and at <= answer[0] and answer[1] < at + len(part):
                start, end = (first + token - at for token in answer)
            encoded = join([question, part], self.vocabulary)
            yield Window(number, encoded, first, tuple(offsets[at : at + size]), start, end)

    def notes(self) -> list[str]:
        truncated, lost = self._num_truncated, self._num_lost
        limit = self.settings.max_question_tokens
        return [
            *([f"{truncated:,} questions were truncated to {limit} tokens"] if truncated else []),
            *([f"{lost:,} answers of the training split fit in no window"] if lost else []),
        ]

    # --------------------------------------------------------------------------------------------------------- model

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> TaskModel:
        """Build the model with two outputs per token: start and end."""
        return TaskModel(config, padded_vocab_size=padded_vocab_size, outputs=2, pooling="none")

    def length(self, feature: Window) -> int:
        return len(feature.encoded.ids)

    def collate(self, features: Sequence[Window], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Pad token ids; `targets_B2`: start and end, `passage_B2`: positions [first, stop) of the passage."""
        return collate(
            [window.encoded for window in features],
            self.vocabulary,
            targets_B2=[(window.start, window.end) for window in features],
            passage_B2=[(window.first, window.first + len(window.offsets)) for window in features],
        )

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Return the mean of the start and end cross entropies over the tokens, summed over windows."""
        scores_B2T, targets_B2 = self._scores(engine, batch), batch.tensors["targets_B2"]
        return F.cross_entropy(scores_B2T.flatten(0, 1), targets_B2.flatten(), reduction="sum") / 2

    def _scores(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Return scores [B, 2, T] in fp32; minus infinity at padding, which thus gets no probability."""
        scores_B2T = engine(inputs=model_inputs(batch)).float().transpose(1, 2)
        return scores_B2T.masked_fill(~batch.tensors["valid_BT"][:, None], float("-inf"))

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[SpanPrediction]:
        """Return the best span of each window, and the loss of its targets."""
        scores_B2T, targets_B2 = self._scores(engine, batch).cpu(), batch.tensors["targets_B2"].cpu()
        losses_B = F.cross_entropy(scores_B2T.transpose(1, 2), targets_B2, reduction="none").mean(dim=1).tolist()
        passages = batch.tensors["passage_B2"].tolist()
        max_length = self.settings.max_answer_tokens
        return [
            best_span(scores_2T, first=first, stop=stop, max_length=max_length)._replace(loss=loss)
            for scores_2T, (first, stop), loss in zip(scores_B2T, passages, losses_B, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------ predictions

    def predictions(
        self, examples: Sequence[SpanExample], features: Sequence[Window], outputs: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return `question`, `context`, the `answers` if known, and the `prediction`, which may be empty.

        Beside it the span's `score` and, with unanswerable questions, `no_answer_score`.
        """
        by_example: list[list[tuple[Window, SpanPrediction]]] = [[] for _ in examples]
        for window, output in zip(features, outputs, strict=True):
            by_example[window.example].append((window, SpanPrediction(*output)))
        return [self._prediction(example, pairs) for example, pairs in zip(examples, by_example, strict=True)]

    def _prediction(self, example: SpanExample, pairs: list[tuple[Window, SpanPrediction]]) -> dict[str, Any]:
        window, best = max(pairs, key=lambda pair: pair[1].score)
        null_score = min(output.null_score for _, output in pairs)
        answer = ""
        if best.span is not None:
            (start, _), (_, stop) = window.offsets[best.span[0]], window.offsets[best.span[1]]
            answer = example.passage[start:stop]
        inputs = {"id": example.id, "question": example.question, "context": example.passage}
        inputs |= {} if example.answers is None else {"answers": list(example.answers)}
        score = {"score": best.score if best.span is not None else None}
        if not self.settings.has_unanswerable:
            return {**inputs, "prediction": answer, **score}
        if best.score - null_score < self.settings.null_threshold:
            answer = ""
        return {**inputs, "prediction": answer, **score, "no_answer_score": null_score}

    def scores(self, examples: Sequence[SpanExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        references = [example.answers or () for example in examples]
        return scores.squad_scores(references, [prediction["prediction"] for prediction in predictions])

    def mean_loss(self, features: Sequence[Window], outputs: Sequence[Any]) -> float:
        return statistics.fmean(SpanPrediction(*output).loss for output in outputs)


def best_span(scores_2T: Tensor, *, first: int, stop: int, max_length: int) -> SpanPrediction:
    """Return the span of at most `max_length` tokens in [first, stop) with the maximum start + end score.

    Only the best starts and ends are combined, so that the cost does not grow with the square of the passage.
    """
    null_score = float(scores_2T[0, 0] + scores_2T[1, 0])
    passage_2P = scores_2T[:, first:stop]
    if passage_2P.shape[1] == 0:
        return SpanPrediction(float("-inf"), None, null_score)
    top = passage_2P.topk(min(_NUM_CANDIDATES, passage_2P.shape[1]), dim=1)
    sums = top.values[0][:, None] + top.values[1][None, :]
    lengths = top.indices[1][None, :] - top.indices[0][:, None] + 1
    sums = sums.masked_fill((lengths < 1) | (lengths > max_length), float("-inf"))
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    if not torch.isfinite(sums[row, column]):
        return SpanPrediction(float("-inf"), None, null_score)
    return SpanPrediction(float(sums[row, column]), (int(top.indices[0][row]), int(top.indices[1][column])), null_score)


def _answer_tokens(example: SpanExample, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first and last token that overlap the example's first answer; None without an answer."""
    if not example.answers:
        return None
    begin, end = example.starts[0], example.starts[0] + len(example.answers[0])
    inside = [number for number, (start, stop) in enumerate(offsets) if start < end and stop > begin]
    return (inside[0], inside[-1]) if inside else None


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, Sequence) and not isinstance(value, str))


def _is_at(start: Any, text: str, passage: str) -> bool:
    return isinstance(start, int) and start >= 0 and passage.startswith(text, start)


def _answer_texts(answers: Any) -> list[str]:
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    return list(texts) if texts and _is_list(texts) else []


def _answers(row: ValidRow, column: str, passage: str) -> list[tuple[str, int]]:
    """Return pairs of text and character offset; invalid ones are added to the problems of the row."""
    value = row.values.get(column)
    if not isinstance(value, Mapping) or not all(_is_list(value.get(name, "")) for name in ("text", "answer_start")):
        row.problems.append(
            f"{row.location}: answers ({value!r}) must be an object with the lists text and answer_start"
        )
        return []
    texts, starts = list(value["text"] or []), list(value["answer_start"] or [])
    if len(texts) != len(starts):
        row.problems.append(f"{row.location}: {len(texts)} answers with {len(starts)} offsets")
        return []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or not _is_at(start, text, passage):
            row.problems.append(f"{row.location}: the answer {text!r} is not at character {start} of its passage")
    return list(zip(texts, starts, strict=True))
