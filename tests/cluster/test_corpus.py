"""The batch script prepares a corpus over two nodes, equal byte for byte to that of one process."""

import hashlib
import subprocess
import sys
from pathlib import Path

from support.slurm_cluster import Cluster
from support.submissions import ROOT

SETTINGS = ("--sequence-length", "32", "--shards", "4")


def write_texts(folder: Path) -> str:
    """Write documents into several files and return their glob."""
    for number in range(4):
        documents = [
            " ".join(f"word{(number * 7 + document * 3 + i) % 90}" for i in range(60 + document))
            for document in range(25)
        ]
        (folder / f"{number}.txt").write_text("\n\n".join(documents))
    return f"{folder}/*.txt"


def digests(corpus: Path) -> dict[str, str]:
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_corpus_of_two_nodes_equals_that_of_one_process(cluster: Cluster, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    source = write_texts(tmp_path / "texts")
    command = ["-m", "pmlm_dist.cli", "prepare-corpus", "--source", source, "--vocabulary-size", "200", *SETTINGS]
    alone = subprocess.run(
        [sys.executable, *command, "--output", tmp_path / "alone"], cwd=ROOT, check=False, timeout=120
    )
    assert alone.returncode == 0
    job = cluster.submit(
        ROOT / "slurm" / "prepare_corpus.sh",
        *SETTINGS,
        options=["--nodes=2", "--ntasks-per-node=1"],
        environ={
            "PROJECT": str(ROOT),
            "VENV": sys.prefix,
            "SOURCE": source,
            "OUTPUT": str(tmp_path / "corpus"),
            "VOCABULARY_SIZE": "200",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
    )
    assert job.wait_for_end() == "COMPLETED", job.printed()
    expected = digests(tmp_path / "alone")
    assert len(expected) >= 6
    assert digests(tmp_path / "corpus") == expected
