"""Data loading in samples a second on one core, compared with the collators of Hugging Face.

one worker              reading, masking, layout, collation in one loader process
disk|http, W workers    an epoch from W loader processes, from its first batch on: from files that are not in the page
                        cache (cold; omitted where they cannot be dropped from it) or are (warm), and from a web server
                        on this machine with an empty cache folder
masking, layout, collate    ours on token arrays in memory: spans, factorization order, three slots a position
transformers, tokens    `DataCollatorForLanguageModeling` on the same arrays: independent tokens
transformers, words     the same with whole-word masking

`data_wait_share`: fraction of a training step of the demo that is spent waiting for its batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from harness import Report, interleaved, synchronize
from random_text import SHARDS, random_corpus

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig, MaskingConfig
from pmlm_dist.corpus.shards import MANIFEST, Manifest, ShardReader
from pmlm_dist.data.batch import build_batch, special_ids
from pmlm_dist.data.loader import BatchLoader, BatchSource, training_batches
from pmlm_dist.data.order import BatchShare
from pmlm_dist.data.stream import CorpusSource
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.parallel import groups
from pmlm_dist.presets import tiny
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve
from pmlm_dist.training.step import train_step
from pmlm_dist.vocabulary.vocabulary import Vocabulary

TOKENS_PER_S = 300_000
"""Text tokens a second of one large GPU, the goal for the loader."""


@dataclass(frozen=True)
class LoaderOptions:
    """Shapes, sources and numbers of loader processes."""

    batch: int = 32
    """Sequences of a micro-batch."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    samples: int = 4096
    """Samples of the corpus."""
    repeats: int = 7
    """Measured rounds."""
    seconds: float = 5.0
    """Seconds for which one worker is measured."""
    workers: tuple[int, ...] = (1, 2, 4)
    """Numbers of loader processes for an epoch."""
    steps: int = 30
    """Training steps whose waiting time is measured."""
    demo: Path | None = Path("data/demo")
    """Corpus of these training steps, made by `make corpus`. None: a random one."""

    def quick(self) -> LoaderOptions:
        """A smoke run."""
        small = dataclasses.replace(self, sequence_length=64, vocabulary=1000, samples=256, repeats=2)
        return dataclasses.replace(small, seconds=0.5, workers=(1,), steps=3, demo=None)


def run(options: LoaderOptions) -> Report:
    """Time the collators in interleaved rounds, then one worker, then epochs, then the waiting time."""
    torch.set_num_threads(1)
    if options.demo is not None and not (options.demo / MANIFEST).is_file():
        sys.exit(f"--demo ({options.demo}) has no corpus: run `make corpus`, or set --demo to another corpus")
    with tempfile.TemporaryDirectory() as folder:
        corpus = random_corpus(
            Path(folder),
            vocabulary_size=options.vocabulary,
            samples=options.samples,
            sequence_length=options.sequence_length,
        )
        seconds = interleaved(_collators(options, corpus), repeats=options.repeats)
        worker = _worker_rate(options, corpus)
        epochs = _epoch_rates(options, corpus)
    waiting = _data_wait_share(options)
    rates = {name: options.batch / statistics.median(times) for name, times in seconds.items()}
    rows = {name: {"samples/s": rate} for name, rate in {"one worker": worker, **epochs, **rates}.items()}
    ours = rates["masking, layout, collate"]
    figures = {
        "vs_hf_collator": ours / rates["transformers, tokens"],
        "vs_hf_whole_word": ours / rates["transformers, words"],
        "workers_for_300k_tokens": TOKENS_PER_S / options.sequence_length / worker,
        "data_wait_share": waiting,
    }
    return Report("loader", {**dataclasses.asdict(options), "demo": str(options.demo)}, rows, figures)


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
    """Character offsets of tokens of four characters; every third token continues the word before it."""
    starts = np.arange(length) * 5 - (np.arange(length) % 3 == 2)
    return np.stack([starts, starts + 4], axis=1)


def _samples(corpus: Path, count: int) -> list[np.ndarray]:
    manifest = Manifest.load(corpus)
    reader = ShardReader(corpus, manifest.splits["train"].shards[0], manifest.token_dtype)
    return [reader[index % len(reader)] for index in range(count)]


def _worker_rate(options: LoaderOptions, corpus: Path) -> float:
    """Samples a second of one loader process after a warm-up."""
    batches = _batches(options, CorpusSource(corpus), DataConfig(workers=1))
    for _ in range(2 * DataConfig().prefetch):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        next(batches)
        count += options.batch
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


def _batches(options: LoaderOptions, source: CorpusSource, loading: DataConfig, *, lanes: int = SHARDS) -> BatchLoader:
    vocabulary = Vocabulary.load(source.folder)
    special = special_ids(vocabulary)
    batches = BatchSource(source, special, masking=MaskingConfig(), seed=0)
    share = BatchShare(global_batch=options.batch, micro_batch=options.batch)
    return training_batches(batches, lanes=lanes, share=share, loading=loading)


def _epoch_rates(options: LoaderOptions, corpus: Path) -> dict[str, float]:
    """Samples a second of an epoch for each source and number of workers."""
    rates = {}
    with served(corpus) as address:
        for workers in options.workers:
            disk = DataConfig(workers=workers)
            if _drop_from_page_cache(corpus):
                rates[f"disk, cold, {workers} workers"] = _epoch_rate(options, CorpusSource(corpus), disk)
            rates[f"disk, warm, {workers} workers"] = _epoch_rate(options, CorpusSource(corpus), disk)
            with tempfile.TemporaryDirectory() as cache:
                remote = DataConfig(workers=workers, cache=cache)
                rates[f"http, {workers} workers"] = _epoch_rate(options, CorpusSource.open(address, remote), remote)
    return rates


def _epoch_rate(options: LoaderOptions, source: CorpusSource, loading: DataConfig) -> float:
    """Samples a second from the first batch of an epoch to the last."""
    count = Manifest.load(source.folder).splits["train"].samples // options.batch - 1
    batches = _batches(
        options, source, loading, lanes=SHARDS // 4
    )  # fewer lanes than shards: most shards are opened below
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    rate = count * options.batch / (time.perf_counter() - start)
    batches.close()
    return rate


def _drop_from_page_cache(corpus: Path) -> bool:
    """Drop the shards from the kernel's page cache (Linux). Return True if none of them is in it afterwards."""
    dropped = [_drop_file(path) for path in corpus.rglob("*.tar")]
    return all(dropped)


def _drop_file(path: Path) -> bool:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True  # the first byte is not cached
        except OSError:
            pass  # the file system does not support RWF_NOWAIT
    return False


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Run a web server for `folder` in a process of its own; yield its address."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            port = re.search(r"port (\d+)", server.stdout.readline())
            assert port is not None, "http.server prints its port"
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            server.kill()


def _data_wait_share(options: LoaderOptions) -> float:
    """Fraction of the time of the tiny preset's steps that is spent waiting for batches."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = options.demo or random_corpus(
            Path(folder), vocabulary_size=1000, samples=512, sequence_length=options.sequence_length
        )
        topology = groups.init_process_groups()
        run = resolve(dataclasses.replace(tiny(), corpus=corpus, run_dir=Path(folder) / "run"), topology)
        engine = build_engine(run)
        batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=run.config.data)
        stopwatch, state, accumulation = Stopwatch(topology.device), RunState(), run.engine.accumulation(topology.dp)
        job = PretrainJob(run)
        waited = started = 0.0
        for step in range(options.steps + 2):
            if step == 2:  # the workers have started
                waited, started = 0.0, time.perf_counter()
            before = time.perf_counter()
            micro_batches = [next(batches) for _ in range(accumulation)]
            waited += time.perf_counter() - before
            train_step(job, engine, micro_batches, state, stopwatch)
            state = job.advance(state)
        synchronize()
        share = waited / (time.perf_counter() - started)
        batches.close()
    return share
