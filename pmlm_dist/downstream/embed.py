"""`pmlm embed`: a vector for each text; `pmlm linear-probe`: what a linear classifier reads from the vectors.

texts --token ids--> last hidden states --mean of the slots | [CLS]--> vectors [N, E]
vectors of the training split --standardized, logistic regression--> accuracy on another split

The probe needs no fine-tuning: it shows what pre-training has put into the states. Beside it stand the same network
untrained, TF-IDF with the same classifier, and the majority class.

Legend: N texts, B texts of a forward pass, T tokens, E hidden size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.console import print_safely
from pmlm_dist.conversion.pretrained import (
    Precision,
    PretrainedWeights,
    build_untrained,
    hidden_states,
    load_model,
    open_pretrained,
)
from pmlm_dist.decoding.batch_generation import batches_by_length
from pmlm_dist.downstream.results import compute_batches
from pmlm_dist.downstream.rows import read_rows
from pmlm_dist.downstream.tasks.inputs import find_column, join, raise_row_problems, row_text
from pmlm_dist.downstream.texts import COLUMNS, encode_texts, read_texts
from pmlm_dist.files import open_atomically
from pmlm_dist.folder_lock import FolderLock
from pmlm_dist.model.task_model import mean_of_valid
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel import groups
from pmlm_dist.ranges import NotNegative, Positive, range_problems
from pmlm_dist.vocabulary.vocabulary import Vocabulary

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Settings of `pmlm embed`."""

    model: Path
    """A pre-trained or fine-tuned model: a run folder, one of its checkpoints, or the output of `pmlm import`."""
    output: Path
    """.npy file to write: float32 [texts, hidden size], in the order of the texts. It must not exist."""
    pooling: Pooling = "mean"
    """`mean` of the last hidden states of all tokens, or the state of [CLS]."""
    column: str | None = None
    """Column of the text. None: text or sentence."""
    batch: Annotated[int, Positive] = 64
    """Texts of a forward pass on a rank."""
    precision: Precision = "fp32"
    """Data type of weights and activations."""


def embed_file(file: Path, /, config: EmbedConfig) -> None:
    """Write a vector for every text of a file; the ranks of a launcher share the texts.

    Args:
        file: .txt with a text a line, or .jsonl, .csv or .tsv.
        config: Settings.
    """
    topology = groups.init_process_groups()

    def prepare() -> tuple[PretrainedWeights, list[list[int]]]:
        raise_if_any(range_problems(config, prefix="--"))
        if config.output.exists():
            raise ConfigError([f"--output ({config.output}) exists already, and nothing is overwritten: name another"])
        pretrained = open_pretrained(config.model)
        return pretrained, encode_texts(read_texts(file, config.column)[1], pretrained, origin=str(file))

    pretrained, texts = groups.run_on_all_ranks(topology, prepare)
    model = load_model(pretrained, config.precision)
    vectors_NE = embed(model, texts, pretrained.vocabulary, pooling=config.pooling, batch=config.batch)
    if topology.is_rank_zero:
        with FolderLock.acquire(config.output, beside=True), open_atomically(config.output, replace=False) as out:
            np.save(out, vectors_NE)
        print_safely(f"written: {config.output}, {len(vectors_NE):,} vectors of {vectors_NE.shape[1]:,} numbers")


def embed(
    model: PseudoMaskedLM, texts: Sequence[Sequence[int]], vocabulary: Vocabulary, *, pooling: Pooling, batch: int
) -> np.ndarray:
    """Return the vectors of `texts` (token ids without special tokens): float32 [N, E], on every rank."""
    device = next(model.parameters()).device

    def of_batch(numbers: Sequence[int]) -> list[np.ndarray]:
        encoded = [join([texts[number]], vocabulary).ids for number in numbers]
        lengths_B = torch.tensor([len(ids) for ids in encoded])
        ids_BT = torch.full((len(encoded), int(lengths_B.max())), vocabulary.pad_id)
        for row, ids in enumerate(encoded):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        valid_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
        tensors = {"segments_BT": torch.zeros_like(ids_BT).to(device), "valid_BT": valid_BT.to(device)}
        states_TBE = hidden_states(model, ids_BT.to(device), **tensors).float().cpu().transpose(0, 1)
        return list((states_TBE[0] if pooling == "cls" else mean_of_valid(states_TBE, valid_BT)).numpy())

    batches = list(batches_by_length([len(text) for text in texts], batch=batch))
    return np.stack(compute_batches(batches, of_batch, groups.init_process_groups()))


# --------------------------------------------------------------------------------------------------------- linear probe


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """Settings of `pmlm linear-probe`."""

    model: Path
    """A pre-trained model: a run folder, one of its checkpoints, or the output of `pmlm import`."""
    data: str
    """Classification data as for `pmlm finetune`: texts and labels, `train` and another split."""
    split: str = "validation"
    """Split on which the accuracy is measured."""
    pooling: Pooling = "mean"
    """`mean` of the last hidden states of all tokens, or the state of [CLS]."""
    max_tokens: Annotated[int, Positive] = 128
    """Tokens of a text; later ones are cut off."""
    seed: Annotated[int, NotNegative] = 0
    """Seed of the untrained network's weights."""
    batch: Annotated[int, Positive] = 64
    """Texts of a forward pass on a rank."""


@dataclass(frozen=True)
class _Labeled:
    texts: list[str]
    labels: list[str]


def linear_probe(config: LinearProbeConfig) -> dict[str, float]:
    """Print the accuracies of logistic regression on the model's frozen vectors and on those of its comparators."""
    topology = groups.init_process_groups()

    def prepare() -> tuple[PretrainedWeights, _Labeled, _Labeled]:
        raise_if_any(range_problems(config, prefix="--"))
        return open_pretrained(config.model), _read(config.data, "train"), _read(config.data, config.split)

    pretrained, train, held_out = groups.run_on_all_ranks(topology, prepare)
    room = min(config.max_tokens, pretrained.model.max_positions - 2)
    texts = [ids[:room] for ids in pretrained.vocabulary.encode_batch(train.texts + held_out.texts)]
    networks = {
        "pre-trained": load_model(pretrained, "fp32"),
        "untrained": build_untrained(pretrained, seed=config.seed),
    }
    accuracies = {}
    for name, model in networks.items():
        vectors_NE = embed(model, texts, pretrained.vocabulary, pooling=config.pooling, batch=config.batch)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        classifier.fit(vectors_NE[: len(train.texts)], train.labels)
        accuracies[name] = float(classifier.score(vectors_NE[len(train.texts) :], held_out.labels))
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10.0, max_iter=2000)).fit(train.texts, train.labels)
    majority, _ = Counter(train.labels).most_common(1)[0]
    accuracies["TF-IDF"] = float(words.score(held_out.texts, held_out.labels))
    accuracies["majority class"] = held_out.labels.count(majority) / len(held_out.labels)
    if topology.is_rank_zero:
        for name, accuracy in accuracies.items():
            error = (accuracy * (1 - accuracy) / len(held_out.labels)) ** 0.5
            print_safely(f"{name:16} {accuracy:7.2%} (standard error {error:.2%})")
    return accuracies


def _read(data: str, split: str) -> _Labeled:
    rows = read_rows(data, split)
    origin, problems = f"split {split}", []
    column = find_column(rows, None, COLUMNS, role="text", origin=origin)
    label = find_column(rows, None, ("label",), role="label", origin=origin)
    texts = [row_text(row, column, location=f"{origin}, row {n}", problems=problems) for n, row in enumerate(rows, 1)]
    labels: list[Any] = [row.get(label) for row in rows]
    problems += [f"{origin}, row {n}: it has no label" for n, value in enumerate(labels, 1) if value is None]
    raise_row_problems(problems)
    return _Labeled(texts, [str(value) for value in labels])
