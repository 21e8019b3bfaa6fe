"""What feeds the training, in samples a second on one core, beside the collators of Hugging Face's users.

one worker              reading, masking, layout, collate in a loader process, as the training receives it
masking, layout, collate    on token arrays in memory, ours: spans, factorization order, three slots a position
transformers, tokens    `DataCollatorForLanguageModeling` on the same arrays: independent tokens
transformers, words     the same with whole-word masking
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from harness import Report, interleaved
from random_text import SHARDS, random_corpus

from pmlm_dist.config import DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import Manifest, ShardReader
from pmlm_dist.data.batch import build_batch, special_ids
from pmlm_dist.data.loader import BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.vocab import Vocabulary

TOKENS_PER_S = 300_000
"""Text tokens a second of one large GPU, the goal that a worker is measured by."""


@dataclass(frozen=True)
class LoaderOptions:
    """What to load."""

    batch: int = 32
    """Sequences of a micro-batch."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    vocabulary: int = 30_528
    """Tokens of the vocabulary."""
    samples: int = 4096
    """Samples of the corpus."""
    repeats: int = 7
    """Rounds that count."""
    seconds: float = 5.0
    """How long the worker is watched."""

    def quick(self) -> LoaderOptions:
        """A smoke run."""
        return dataclasses.replace(self, sequence_length=64, vocabulary=1000, samples=256, repeats=2, seconds=0.5)


def run(options: LoaderOptions) -> Report:
    """Time the collators in turn, then one worker by itself."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = random_corpus(
            Path(folder),
            vocabulary_size=options.vocabulary,
            samples=options.samples,
            sequence_length=options.sequence_length,
        )
        seconds = interleaved(_collators(options, corpus), repeats=options.repeats)
        worker = _worker_rate(options, corpus)
    rates = {name: options.batch / statistics.median(times) for name, times in seconds.items()}
    rows = {name: {"samples/s": rate} for name, rate in {"one worker": worker, **rates}.items()}
    ours = rates["masking, layout, collate"]
    figures = {
        "vs_hf_collator": ours / rates["transformers, tokens"],
        "vs_hf_whole_word": ours / rates["transformers, words"],
        "workers_for_300k_tokens": TOKENS_PER_S / options.sequence_length / worker,
    }
    return Report("loader", dataclasses.asdict(options), rows, figures)


def _collators(options: LoaderOptions, corpus: Path) -> dict[str, Callable[[], object]]:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    vocabulary, samples = Vocabulary.load(corpus), _samples(corpus, options.batch)
    special, masking = special_ids(vocabulary), MaskingConfig()
    numbers = itertools.count()

    def ours() -> object:
        epoch = next(numbers)
        return build_batch(
            samples,
            range(len(samples)),
            [epoch] * len(samples),
            sequence_length=options.sequence_length,
            masking=masking,
            special=special,
            seed=0,
        )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(corpus / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    examples = [{"input_ids": sample.astype(np.int64)} for sample in samples]
    words = [{**example, "offset_mapping": _offsets(len(example["input_ids"]))} for example in examples]
    by_token = DataCollatorForLanguageModeling(tokenizer)
    by_word = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    return {
        "masking, layout, collate": ours,
        "transformers, tokens": lambda: by_token(examples),
        "transformers, words": lambda: by_word(words),
    }


def _offsets(length: int) -> np.ndarray:
    """Character offsets of words of four characters, every third token going on with its word."""
    starts = np.arange(length) * 5 - (np.arange(length) % 3 == 2)
    return np.stack([starts, starts + 4], axis=1)


def _samples(corpus: Path, count: int) -> list[np.ndarray]:
    manifest = Manifest.load(corpus)
    reader = ShardReader(corpus, manifest.splits["train"].shards[0], manifest.token_dtype)
    return [reader[index % len(reader)] for index in range(count)]


def _worker_rate(options: LoaderOptions, corpus: Path) -> float:
    """Samples a second of one loader process, watched for a while after it has warmed up."""
    vocabulary = Vocabulary.load(corpus)
    source = BatchSource(corpus=corpus, special=special_ids(vocabulary), masking=MaskingConfig(), seed=0)
    share = BatchShare(global_batch=options.batch, micro_batch=options.batch)
    batches = training_batches(source, lanes=SHARDS, share=share, loading=DataConfig(workers=1))
    for _ in range(2 * DataConfig().prefetch):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        next(batches)
        count += options.batch
    rate = count / (time.perf_counter() - start)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return rate
