"""Pack phase of a preparation: documents to samples, in sorted runs on disk. See pipeline.py and shuffle.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np

from pmlm_dist.corpus.arrays import save_array
from pmlm_dist.corpus.filters.cleaning import normalize
from pmlm_dist.corpus.hashing import FOR_PACKING
from pmlm_dist.corpus.input.documents import Document, read_unit
from pmlm_dist.corpus.input.records import SkippedRecords
from pmlm_dist.corpus.input.units import Unit, unit_stem
from pmlm_dist.corpus.packing.packer import MIN_CONTENT, Packer, PackingConfig
from pmlm_dist.corpus.packing.shuffle import BUFFER_BYTES, RunWriter
from pmlm_dist.corpus.packing.stream_digest import StreamDigest, order_key
from pmlm_dist.corpus.packing.tokenization import CachedEncoder, TokenizedDocument, tokenize
from pmlm_dist.corpus.prepare.counts import UnitCounts
from pmlm_dist.corpus.prepare.journal import RUNS
from pmlm_dist.corpus.prepare.sampling import Segment, ValidationSample
from pmlm_dist.corpus.prepare.scan import EXACT, NEAR, Scan
from pmlm_dist.corpus.shards import IN_BOTH_SPLITS, SPLITS, TRAIN, token_dtype
from pmlm_dist.vocabulary.vocabulary import Vocabulary

TOO_FEW_TOKENS = "fewer than two tokens"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"


class RunPacker:
    """Pack units on one rank. Units are committed to the journal together, once the buffer is full."""

    def __init__(
        self, scan: Scan, vocabulary: Vocabulary, *, held_out: ValidationSample, buffer_bytes: int = BUFFER_BYTES
    ):
        self.scan, self.config, self.vocabulary = scan, scan.config, vocabulary
        self._encoder = CachedEncoder(vocabulary)
        self._held_out = held_out
        self._splits: set[str] = set()
        """Splits with text of the current document."""
        self._buffer_bytes = buffer_bytes
        self._packing = PackingConfig(
            self.config.sequence_length, cls_id=vocabulary.cls_id, sep_id=vocabulary.sep_id, joined=self.config.joined
        )
        folder, dtype = scan.journal.path(RUNS, ""), token_dtype(vocabulary.size)
        self._writers = {split: RunWriter(folder, split, dtype) for split in SPLITS}
        self._reset()

    def _reset(self) -> None:
        self._units: dict[int, list[int]] = {}
        """Packed unit -> number of samples of each split."""
        self._runs: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._counts = UnitCounts()
        self._token_counts = np.zeros(self.vocabulary.size, np.int64)

    def add(self, unit: Unit) -> None:
        streams = {split: self._stream(split, unit) for split in SPLITS}
        segments = itertools.chain.from_iterable(map(self._held_out.segments, self._documents(unit)))
        for tokenized in tokenize(segments, self._encoder):
            segment = cast(Segment, tokenized.document)
            if self._count(segment, tokens=len(tokenized.ids)):
                streams[segment.split].add(tokenized)
                self._flush_if_full(unit)
        self._finish(unit, streams)
        if self._buffered_bytes() >= self._buffer_bytes or any(self._runs.values()):
            self.commit()

    def commit(self) -> None:
        """Write the buffer and record the units added since the last call in the journal."""
        if not self._units:
            return
        name = unit_stem(min(self._units))
        self._flush(name)
        save_array(self.scan.journal.path(RUNS, f"{name}.npy"), self._token_counts)
        record = {"units": self._units, "runs": self._runs, "counts": self._counts.as_json()}
        self.scan.journal.commit(RUNS, name, record)
        self._reset()

    def _stream(self, split: str, unit: Unit) -> _Stream:
        stream_id = {"seed": self.config.seed, "split": SPLITS.index(split), "unit": unit.number}
        packer = Packer(self._packing, seed=(FOR_PACKING, *stream_id.values()))
        return _Stream(stream_id, packer, self._writers[split], StreamDigest(self.vocabulary.size, **stream_id))

    def _documents(self, unit: Unit) -> Iterator[Document]:
        """Yield the kept documents of a unit; count the duplicates."""
        scanned = set(self.scan.rows(unit.number)["number"].tolist())
        exact, near = self.scan.duplicates(unit, EXACT), self.scan.duplicates(unit, NEAR)
        for document in read_unit(unit, text_field=self.config.text_field, skipped=SkippedRecords()):
            if document.number in exact:
                self._skip(document, DUPLICATE)
            elif document.number in near:
                self._skip(document, NEAR_DUPLICATE)
            elif document.number in scanned:
                yield normalize(document, self.config.unicode)

    def _count(self, segment: Segment, *, tokens: int) -> bool:
        """Count a segment; return False if it has too few tokens to be packed."""
        is_packed = tokens >= MIN_CONTENT
        if is_packed:
            self._splits.add(segment.split)
            self._counts.content_tokens[segment.split] += tokens
            self._counts.characters += len(segment.text)
        if segment.is_last:
            if not self._splits:
                self._skip(segment, TOO_FEW_TOKENS)
            self._counts.documents.update(self._splits)
            self._counts.changed[IN_BOTH_SPLITS] += len(self._splits) == len(SPLITS)
            self._splits.clear()
        return is_packed

    def _skip(self, document: Document, reason: str) -> None:
        self._counts.skipped.add(reason, unit=document.unit, location=document.location)

    def _finish(self, unit: Unit, streams: dict[str, _Stream]) -> None:
        for split, stream in streams.items():
            stream.finish()
            self._counts.samples[split] += stream.samples
            self._counts.digests[split] += stream.digest.digest
            self._counts.unknown_tokens[split] += int(stream.digest.counts[self.vocabulary.unk_id])
        self._token_counts += streams[TRAIN].digest.counts
        self._units[unit.number] = [streams[split].samples for split in SPLITS]

    def _buffered_bytes(self) -> int:
        return sum(writer.buffered_bytes for writer in self._writers.values())

    def _flush_if_full(self, unit: Unit) -> None:
        """Write runs in the middle of a unit. They become part of the corpus only when the unit is committed."""
        if self._buffered_bytes() >= self._buffer_bytes:
            self._flush(f"{unit_stem(unit.number)}-{sum(map(len, self._runs.values())):06d}")

    def _flush(self, name: str) -> None:
        for split, writer in self._writers.items():
            self._runs[split] += writer.flush(name)


@dataclass
class _Stream:
    """Documents of one unit and split: through a packer into a run writer, and into the digest."""

    stream_id: dict[str, int]
    packer: Packer
    writer: RunWriter
    digest: StreamDigest
    samples: int = 0

    def add(self, document: TokenizedDocument) -> None:
        self.digest.add(document.ids)
        self._write(self.packer.add(document.ids, sentence_starts=document.sentence_starts))

    def finish(self) -> None:
        self.digest.finish()
        self._write(self.packer.finish())

    def _write(self, samples: Iterator[np.ndarray]) -> None:
        for ids in samples:
            key = order_key(**self.stream_id, number=self.samples)
            self.writer.add(ids, key=key, unit=self.stream_id["unit"], number=self.samples)
            self.samples += 1
