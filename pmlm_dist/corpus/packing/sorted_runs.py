"""The packing phase of a preparation: documents to samples, in sorted runs on disk. See prepare.py and shuffle.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pmlm_dist.corpus.filters.cleaning import normalized
from pmlm_dist.corpus.input.documents import Document, Skips, Unit, read_unit
from pmlm_dist.corpus.packing.packer import MIN_CONTENT, Packer, PackingConfig, draw
from pmlm_dist.corpus.packing.shuffle import BUFFER_BYTES, Spill
from pmlm_dist.corpus.packing.stream_digest import StreamDigest, order_key
from pmlm_dist.corpus.packing.tokenization import Encoder, Tokenized, tokenized
from pmlm_dist.corpus.prepare.counts import UnitCounts
from pmlm_dist.corpus.prepare.journal import RUNS
from pmlm_dist.corpus.prepare.sampling import FOR_PACKING, FOR_SPLIT
from pmlm_dist.corpus.prepare.scan import EQUAL, NEAR, Scan
from pmlm_dist.corpus.shards import SPLITS, TRAIN, VALIDATION, token_dtype
from pmlm_dist.vocab import Vocabulary

TOO_SHORT = "fewer than two tokens"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"


class RunPacker:
    """One rank's packing. A few units, until the buffer is full, make a piece of work that is finished by itself."""

    def __init__(self, scan: Scan, vocabulary: Vocabulary, *, held_out_below: int, buffer_bytes: int = BUFFER_BYTES):
        self.scan, self.config, self.vocabulary = scan, scan.config, vocabulary
        self._encoder = Encoder(vocabulary)
        self._held_out_below = held_out_below
        self._buffer_bytes = buffer_bytes
        self._packing = PackingConfig(
            self.config.sequence_length, cls_id=vocabulary.cls_id, sep_id=vocabulary.sep_id, joined=self.config.joined
        )
        folder, dtype = scan.work.path(RUNS, ""), token_dtype(vocabulary.size)
        self._spills = {split: Spill(folder, split, dtype) for split in SPLITS}
        self._begin()

    def _begin(self) -> None:
        self._units: dict[int, list[int]] = {}
        """Finished units -> samples of each split."""
        self._runs: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._tally = UnitCounts()
        self._token_counts = np.zeros(self.vocabulary.size, np.int64)

    def add(self, unit: Unit) -> None:
        """Pack all documents of a unit."""
        streams = {split: self._stream(split, unit) for split in SPLITS}
        for document in tokenized(self._documents(unit), self._encoder):
            split = self._split(document.document)
            if self._count(document, split=split):
                streams[split].add(document)
                self._make_room(unit)
        self._close(unit, streams)
        if self._buffered() >= self._buffer_bytes or any(self._runs.values()):
            self.finish()

    def finish(self) -> None:
        """Make what was added count."""
        if not self._units:
            return
        name = f"{min(self._units):08d}"
        self._flush(name)
        np.save(self.scan.work.path(RUNS, f"{name}.npy"), self._token_counts)
        record = {"units": self._units, "runs": self._runs, "tally": self._tally.as_json()}
        self.scan.work.finish(RUNS, name, record)
        self._begin()

    def _stream(self, split: str, unit: Unit) -> _Stream:
        place = {"seed": self.config.seed, "split": SPLITS.index(split), "unit": unit.number}
        packer = Packer(self._packing, seed=(FOR_PACKING, *place.values()))
        return _Stream(place, packer, self._spills[split], StreamDigest(self.vocabulary.size, **place))

    def _documents(self, unit: Unit) -> Iterator[Document]:
        """The kept documents of a unit; duplicates are counted."""
        scanned = set(self.scan.rows(unit)["number"].tolist())
        equal, near = self.scan.dropped(unit, EQUAL), self.scan.dropped(unit, NEAR)
        for document in read_unit(unit, text_field=self.config.text_field, skips=Skips()):
            if document.number in equal:
                self._skip(document, DUPLICATE)
            elif document.number in near:
                self._skip(document, NEAR_DUPLICATE)
            elif document.number in scanned:
                yield normalized(document, self.config.unicode)

    def _split(self, document: Document) -> str:
        drawn = draw(FOR_SPLIT, self.config.seed, document.unit, document.number)
        return VALIDATION if drawn < self._held_out_below else TRAIN

    def _count(self, document: Tokenized, *, split: str) -> bool:
        """Whether the document is long enough to be packed."""
        if len(document.ids) < MIN_CONTENT:
            self._skip(document.document, TOO_SHORT)
            return False
        self._tally.documents[split] += 1
        self._tally.content_tokens[split] += len(document.ids)
        self._tally.characters += len(document.document.text)
        return True

    def _skip(self, document: Document, reason: str) -> None:
        self._tally.skips.add(reason, unit=document.unit, place=document.place)

    def _close(self, unit: Unit, streams: dict[str, _Stream]) -> None:
        for split, stream in streams.items():
            stream.finish()
            self._tally.samples[split] += stream.samples
            self._tally.digests[split] += stream.digest.digest
        self._token_counts += streams[TRAIN].digest.counts
        self._units[unit.number] = [streams[split].samples for split in SPLITS]

    def _buffered(self) -> int:
        return sum(spill.bytes for spill in self._spills.values())

    def _make_room(self, unit: Unit) -> None:
        """In the middle of a unit: what is written counts only when the unit is finished."""
        if self._buffered() >= self._buffer_bytes:
            self._flush(f"{unit.number:08d}-{sum(map(len, self._runs.values())):06d}")

    def _flush(self, name: str) -> None:
        for split, spill in self._spills.items():
            self._runs[split] += spill.flush(name)


@dataclass
class _Stream:
    """One unit's documents of one split: through a packer into a spill, and into the digest."""

    place: dict[str, int]
    packer: Packer
    spill: Spill
    digest: StreamDigest
    samples: int = 0

    def add(self, document: Tokenized) -> None:
        self.digest.add(document.ids)
        self._spill(self.packer.add(document.ids, sentences=document.sentences))

    def finish(self) -> None:
        """Spill what is left."""
        self.digest.finish()
        self._spill(self.packer.finish())

    def _spill(self, samples: Iterator[np.ndarray]) -> None:
        for ids in samples:
            key = order_key(**self.place, number=self.samples)
            self.spill.add(ids, key=key, unit=self.place["unit"], number=self.samples)
            self.samples += 1
