"""The programs and the example in docs/data.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.preparations import config, samples, write_source

from pmlm_dist.corpus.prepare.pipeline import prepare_corpus
from pmlm_dist.corpus.verify import verify
from pmlm_dist.data.order import BatchShare, micro_batch_samples

DOCUMENT = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
FILTER, READ, WRITE = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_documented_language_filter_works():
    names: dict[str, Any] = {}
    exec(FILTER, names)
    assert names["german"]("Das ist der Satz, und nicht die Ausnahme")
    assert not names["german"]("This is the sentence and not the exception")


def test_documented_webdataset_programs_read_and_write_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In another process: `pmlm_dist` restricts webdataset to files (WDS_SECURE)."""
    prepare_corpus(config(write_source(tmp_path), tmp_path / "corpus", shards=4))
    shown = READ + "    print(ids.tolist())\n"
    program = f"{shown}\n{WRITE}\nprint([ids.tolist() for ids in samples])"
    environment = {name: value for name, value in os.environ.items() if name != "WDS_SECURE"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *read, written = map(json.loads, done.stdout.splitlines())
    assert read == samples(tmp_path / "corpus", "train")
    verify(tmp_path / "mine")
    assert "8 train samples, 8 validation samples: shards and samples are valid" in capsys.readouterr().out
    assert written == samples(tmp_path / "mine", "train")


def test_documented_elastic_example_matches_the_order():
    """Compare lane, sample and GPU of each cell of the table, for both numbers of GPUs."""
    rows = [
        re.findall(r"\| ([^|]+?)(?= \|)", line) for line in DOCUMENT.splitlines() if re.match(r"\| (elem|step 6)", line)
    ]
    samples_by_lane = [[int(t) for t in re.findall(r"\d+", cell)] for cell in rows[0][1:]]
    assert samples_by_lane == [[40 + lane, 44 + lane] for lane in range(4)]
    for gpus, row in ((2, rows[1]), (4, rows[2])):
        for rank in range(gpus):
            share = BatchShare(8, 8 // gpus, dp_rank=rank, dp_size=gpus)
            lanes = [lane for lane, cell in enumerate(row[1:]) if cell == f"GPU {rank}"]
            expected = sorted(t for lane in lanes for t in samples_by_lane[lane])
            assert sorted(micro_batch_samples(40, 0, share=share)) == expected
