"""Malformed and huge text: counted or read in bounded memory, without a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.preparations import config, samples

from pmlm_dist.corpus.input.documents import read_unit
from pmlm_dist.corpus.input.records import PART_BYTES, SkippedRecords
from pmlm_dist.corpus.input.sources import local_file
from pmlm_dist.corpus.input.units import list_units
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.shards import Manifest
from pmlm_dist.corpus.verify import verify
from pmlm_dist.vocabulary.vocabulary import Vocabulary

WORD = "understandably"
WORDS = 200_000_000 // (len(WORD) + 1)
PREPARE = r"""
import re, sys
from pathlib import Path
from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.prepare.settings import PrepareConfig

source, folder = sys.argv[1:]
prepare_corpus(PrepareConfig((source,), Path(folder, "corpus"), vocabulary=Path(folder), shards=2, deduplicate=False))
# Not getrusage: its maximum includes the memory of the parent process before exec.
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


def write_long_line(path: Path) -> None:
    """Write 200 MB without a line feed."""
    with path.open("w") as out:
        for start in range(0, WORDS, 100_000):
            out.write(f"{WORD} " * min(100_000, WORDS - start))


@pytest.mark.full
def test_line_of_200_mb_is_prepared_in_bounded_memory(tmp_path: Path):
    """All words are in the corpus; the process uses much less memory than the whole text would."""
    write_long_line(tmp_path / "a.txt")
    Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", WORD]).save(tmp_path)
    program = [sys.executable, "-c", PREPARE, str(tmp_path / "a.txt"), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counts = Manifest.load(tmp_path / "corpus").counts
    assert sum(counts["content_tokens"].values()) == WORDS
    assert counts["documents"]["train"] == counts["records"] >= 200_000_000 // PART_BYTES
    assert counts["documents"]["validation"]  # parts of them: each is longer than the held-out share
    assert int(done.stdout.splitlines()[-1]) < 900


def test_json_text_of_200_mb_is_cut_into_parts(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"{WORD} " * WORDS}))
    (unit, *rest) = list_units([local_file(tmp_path / "a.jsonl")])
    skipped = SkippedRecords()
    lengths = [len(document.text) for document in read_unit(unit, skipped=skipped)]
    assert max(lengths) <= PART_BYTES
    assert sum(lengths) == WORDS * (len(WORD) + 1) - 1
    assert len(rest) > 20
    assert not [document for later in rest for document in read_unit(later, skipped=skipped)]


def test_invalid_bytes_are_counted_and_valid_text_is_kept(tmp_path: Path):
    """Invalid UTF-8, NUL bytes, byte order mark, carriage returns, literal special tokens, an empty file."""
    good = [f"a good text number {number} with some words" for number in range(60)]
    odd = ["\0\0\0", "words \0 with \0 nothing", "[CLS] [SEP] [MASK] spelt out", "\u202e turned \u200b round \ufeff"]
    blocks = [*(text.encode() for text in good + odd), b"caf\xe9 au lait", b"\xff\xfe\x00", b"\xed\xa0\x80 surrogate"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(blocks))
    (tmp_path / "b.txt").touch()
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([b"\0", b"{", b'{"text": "one more \\u0000 text"}', b"\xff"]))
    manifest = prepare_corpus(config(tmp_path, tmp_path / "corpus", shards=2))
    assert manifest.counts["skipped"] == {"invalid JSON": 2, "fewer than two tokens": 1, "not UTF-8": 4}
    assert sum(manifest.counts["documents"].values()) == len(good) + 3 + 1
    verify(tmp_path / "corpus")
    vocabulary = Vocabulary.load(tmp_path / "corpus")
    special = [vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id, vocabulary.pad_id]
    stored = [ids for split in ("train", "validation") for ids in samples(tmp_path / "corpus", split)]
    assert all(sum(ids.count(id) for id in special) == 3 for ids in stored)
