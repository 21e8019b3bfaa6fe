"""Spans of a passage that answer a question, as in SQuAD 1.1 and 2.0.

    [CLS] question [SEP] window of the passage [SEP]     windows start `stride` tokens apart and overlap
      |                    |        |
      no answer          start     end                   a score each for every token

A window without the (whole) answer is trained towards [CLS] at both ends. Predicting, a span scores start + end; the
best span over all windows of a question is the answer, unless [CLS] + [CLS] beats it in the window where it does so
least, and some question of the training split had no answer (SQuAD 2.0; the rule of Devlin et al., 2019).

Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmlm_dist.config import ConfigError, ModelConfig
from pmlm_dist.downstream.settings import FinetuneConfig
from pmlm_dist.downstream.tasks import scores
from pmlm_dist.downstream.tasks.inputs import (
    Encoded,
    collate,
    column,
    id_of,
    join,
    longest_input,
    network_inputs,
    raise_row_problems,
    text_of,
)
from pmlm_dist.downstream.tasks.task import Row, Task, TaskBatch
from pmlm_dist.model.task_model import TaskModel
from pmlm_dist.vocab import Vocabulary

MAX_TOKENS = 384
_CANDIDATES = 20
"""Best starts and best ends of a window that are combined."""


@dataclass(frozen=True)
class Settings:
    """What is saved of the task with its model."""

    question: str
    passage: str
    answers: str
    has_unanswerable: bool
    """Whether "no answer" may be predicted: some question of the training split had none."""
    max_tokens: int
    stride: int
    max_question_tokens: int
    max_answer_tokens: int
    null_threshold: float


@dataclass(frozen=True)
class SpanExample:
    """A question, its passage and the right answers; none: it has no answer, or that is not told."""

    id: Any
    question: str
    passage: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    """First character of each answer."""


@dataclass(frozen=True)
class Window:
    """A question with a part of its passage."""

    example: int
    """Number of the example in its split."""
    encoded: Encoded
    first: int
    """Place of the first passage token in the input."""
    places: tuple[tuple[int, int], ...]
    """Characters [start, stop) of the passage that each passage token stands for."""
    start: int
    end: int
    """Places of the answer's first and last token in the input; 0, [CLS]: the window does not hold it."""


@dataclass(frozen=True)
class Candidate:
    """What a window says: its best span (None: there is none of a fair length) and how [CLS] scores."""

    score: float
    span: tuple[int, int] | None
    """First and last passage token, counted in the window's passage."""
    null: float


class Spans(Task[SpanExample, Window]):
    """The span that answers a question, or that there is none."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary):
        self.settings, self.vocabulary, self.metric = settings, vocabulary, "f1"
        self._cut_questions = self._lost_answers = 0

    @classmethod
    def make(cls, config: FinetuneConfig, rows: Sequence[Row], vocabulary: Vocabulary, model: ModelConfig) -> Spans:
        """The task for the training `rows`. Raises `ConfigError`."""
        inputs, origin = config.inputs, f"--task {config.task}"
        answers = column(rows, inputs.label, ("answers",), what="label", origin=origin)
        max_tokens = longest_input(inputs.max_tokens, default=MAX_TOKENS, model=model)
        max_question = min(inputs.max_question_tokens, (max_tokens - 3) // 2)
        settings = Settings(
            question=column(rows, inputs.text, ("question",), what="text", origin=origin),
            passage=column(rows, inputs.pair, ("context", "passage"), what="pair", origin=origin),
            answers=answers,
            has_unanswerable=any(not _texts(row.get(answers)) for row in rows),
            max_tokens=max_tokens,
            stride=min(inputs.stride, max_tokens - max_question - 3),  # no token between two windows
            max_question_tokens=max_question,
            max_answer_tokens=inputs.max_answer_tokens,
            null_threshold=inputs.null_threshold,
        )
        return cls(settings, vocabulary)

    @classmethod
    def restore(cls, saved: dict[str, Any], vocabulary: Vocabulary) -> Spans:
        """The task that `saved` was called of."""
        return cls(Settings(**saved), vocabulary)

    def saved(self) -> dict[str, Any]:
        """The settings."""
        return asdict(self.settings)

    # -------------------------------------------------------------------------------------------------------- examples

    def has_labels(self, rows: Sequence[Row]) -> bool:
        """Whether any row has an answer."""
        return any(_texts(row.get(self.settings.answers)) for row in rows)

    def read(self, rows: Sequence[Row], *, origin: str, labelled: bool = True) -> list[SpanExample]:
        """Check that answers stand in their passages."""
        settings, problems, examples = self.settings, [], []
        wanted = [settings.question, settings.passage, *([settings.answers] if labelled else [])]
        missing = [name for name in wanted if name not in rows[0]]
        if missing:
            raise ConfigError([f"{origin}: no column {name}, there are {', '.join(rows[0])}" for name in missing])
        for number, row in enumerate(rows, start=1):
            where = f"{origin}, row {number}"
            question = text_of(row, settings.question, where=where, problems=problems)
            passage = text_of(row, settings.passage, where=where, problems=problems)
            answers = _answers(row.get(settings.answers), passage, where=where, problems=problems) if labelled else []
            texts, starts = zip(*answers, strict=True) if answers else ((), ())
            if labelled and not answers and not settings.has_unanswerable:
                problems.append(f"{where}: no answer, and every question of the training split had one")
            examples.append(SpanExample(id_of(row, number - 1), question, passage, texts, starts))
        raise_row_problems(problems)
        return examples

    def features(self, examples: Sequence[SpanExample], *, training: bool) -> list[Window]:
        """The windows of every example."""
        questions = self.vocabulary.encode_batch([example.question for example in examples])
        passages = self.vocabulary.encode_with_offsets([example.passage for example in examples])
        windows = []
        for number, (example, question, passage) in enumerate(zip(examples, questions, passages, strict=True)):
            self._cut_questions += len(question) > self.settings.max_question_tokens
            windows += self._windows(number, example, question[: self.settings.max_question_tokens], *passage)
        if training:
            found = {window.example for window in windows if window.end}
            answered = {number for number, example in enumerate(examples) if example.answers}
            self._lost_answers = len(answered - found)
        return windows

    def _windows(
        self, number: int, example: SpanExample, question: list[int], ids: list[int], places: list[tuple[int, int]]
    ) -> Iterator[Window]:
        size, first = self.settings.max_tokens - len(question) - 3, len(question) + 2
        answer = _tokens_of(example, places)
        for at in range(0, max(1, len(ids) - size + self.settings.stride), self.settings.stride):
            part = ids[at : at + size]
            start = end = 0
            if answer and at <= answer[0] and answer[1] < at + len(part):
                start, end = (first + token - at for token in answer)
            encoded = join([question, part], self.vocabulary)
            yield Window(number, encoded, first, tuple(places[at : at + size]), start, end)

    def notes(self) -> list[str]:
        """What was cut or lost."""
        cut, lost = self._cut_questions, self._lost_answers
        return [
            *([f"{cut:,} questions lost what came after {self.settings.max_question_tokens} tokens"] if cut else []),
            *([f"{lost:,} answers of the training split fit in no window"] if lost else []),
        ]

    # --------------------------------------------------------------------------------------------------------- network

    def build_model(self, config: ModelConfig, *, padded_vocab_size: int) -> TaskModel:
        """A score as start and one as end for every token."""
        return TaskModel(config, padded_vocab_size=padded_vocab_size, outputs=2, pooling="none")

    def length(self, feature: Window) -> int:
        """Tokens."""
        return len(feature.encoded.ids)

    def collate(self, features: Sequence[Window], *, ids: Sequence[int], epoch: int, seed: int) -> TaskBatch:
        """Padded token ids with `targets_B2` (start, end) and `passage_B2`, the places [first, stop) of the passage."""
        return collate(
            [window.encoded for window in features],
            self.vocabulary,
            targets_B2=[(window.start, window.end) for window in features],
            passage_B2=[(window.first, window.first + len(window.places)) for window in features],
        )

    def loss(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """Mean of the cross entropies of start and end over the tokens, summed over windows."""
        scores_B2T, targets_B2 = self._scores(engine, batch), batch.tensors["targets_B2"]
        return F.cross_entropy(scores_B2T.flatten(0, 1), targets_B2.flatten(), reduction="sum") / 2

    def _scores(self, engine: nn.Module, batch: TaskBatch) -> Tensor:
        """[B, 2, T], minus infinity at padding."""
        scores_B2T = engine(inputs=network_inputs(batch)).float().transpose(1, 2)
        return scores_B2T.masked_fill(~batch.tensors["valid_BT"][:, None], float("-inf"))

    def predict(self, engine: nn.Module, batch: TaskBatch) -> list[Candidate]:
        """The best span of each window."""
        scores_B2T = self._scores(engine, batch).cpu()
        passages = batch.tensors["passage_B2"].tolist()
        longest = self.settings.max_answer_tokens
        return [
            best_span(scores_2T, first=first, stop=stop, longest=longest)
            for scores_2T, (first, stop) in zip(scores_B2T, passages, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------------ predictions

    def predictions(
        self, examples: Sequence[SpanExample], features: Sequence[Window], outputs: Sequence[Candidate]
    ) -> list[dict[str, Any]]:
        """`answer` (empty: none), the `score` of its span and, where that is asked, `no_answer_score`."""
        by_example: list[list[tuple[Window, Candidate]]] = [[] for _ in examples]
        for window, candidate in zip(features, outputs, strict=True):
            by_example[window.example].append((window, candidate))
        return [self._prediction(example, said) for example, said in zip(examples, by_example, strict=True)]

    def _prediction(self, example: SpanExample, said: list[tuple[Window, Candidate]]) -> dict[str, Any]:
        window, best = max(said, key=lambda pair: pair[1].score)
        null = min(candidate.null for _, candidate in said)
        answer = ""
        if best.span is not None:
            (start, _), (_, stop) = window.places[best.span[0]], window.places[best.span[1]]
            answer = example.passage[start:stop]
        score = {"score": best.score if best.span is not None else None}
        if not self.settings.has_unanswerable:
            return {"id": example.id, "answer": answer, **score}
        if best.score - null < self.settings.null_threshold:
            answer = ""
        return {"id": example.id, "answer": answer, **score, "no_answer_score": null}

    def scores(self, examples: Sequence[SpanExample], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Exact match and F1, in percent."""
        right = [example.answers for example in examples]
        return scores.squad_scores(right, [prediction["answer"] for prediction in predictions])


def best_span(scores_2T: Tensor, *, first: int, stop: int, longest: int) -> Candidate:
    """The span of at most `longest` tokens in [first, stop) with the largest start + end, among the best of each."""
    null = float(scores_2T[0, 0] + scores_2T[1, 0])
    passage_2P = scores_2T[:, first:stop]
    if passage_2P.shape[1] == 0:
        return Candidate(float("-inf"), None, null)
    top = passage_2P.topk(min(_CANDIDATES, passage_2P.shape[1]), dim=1)
    sums = top.values[0][:, None] + top.values[1][None, :]
    lengths = top.indices[1][None, :] - top.indices[0][:, None] + 1
    sums = sums.masked_fill((lengths < 1) | (lengths > longest), float("-inf"))
    row, place = divmod(int(sums.argmax()), sums.shape[1])
    if not torch.isfinite(sums[row, place]):
        return Candidate(float("-inf"), None, null)
    return Candidate(float(sums[row, place]), (int(top.indices[0][row]), int(top.indices[1][place])), null)


def _tokens_of(example: SpanExample, places: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token that touch the example's first answer; None without an answer."""
    if not example.answers:
        return None
    begin, end = example.starts[0], example.starts[0] + len(example.answers[0])
    inside = [number for number, (start, stop) in enumerate(places) if start < end and stop > begin]
    return (inside[0], inside[-1]) if inside else None


def _is_list(value: Any) -> bool:
    return value is None or (isinstance(value, Sequence) and not isinstance(value, str))


def _stands_at(start: Any, text: str, passage: str) -> bool:
    return isinstance(start, int) and start >= 0 and passage.startswith(text, start)


def _texts(answers: Any) -> list[str]:
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    return list(texts) if texts and _is_list(texts) else []


def _answers(value: Any, passage: str, *, where: str, problems: list[str]) -> list[tuple[str, int]]:
    """Pairs of text and first character; what does not stand there goes to `problems`."""
    if not isinstance(value, Mapping) or not all(_is_list(value.get(name, "")) for name in ("text", "answer_start")):
        problems.append(f"{where}: answers ({value!r}) must be an object with the lists text and answer_start")
        return []
    texts, starts = list(value["text"] or []), list(value["answer_start"] or [])
    if len(texts) != len(starts):
        problems.append(f"{where}: {len(texts)} answers with {len(starts)} places")
        return []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or not _stands_at(start, text, passage):
            problems.append(f"{where}: the answer {text!r} does not stand at character {start} of its passage")
    return list(zip(texts, starts, strict=True))
