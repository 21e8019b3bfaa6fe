"""The shipped batch script trains over two nodes, however the model lies on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.submissions import STEPS, Submission, learned


def test_a_run_over_two_nodes_learns(straight: Path):
    losses = [scalars["train/total"] for scalars in learned(straight).values()]
    assert len(losses) == STEPS
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])
    configuration = json.loads((straight / "config.json").read_text())
    assert configuration["topology"] == {"world_size": 2, "tp": 1, "dp": 2}


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 1), (1, 2)], ids=["across nodes", "within a node"])
def test_tensor_parallel_peers_across_and_within_nodes_learn_the_same(
    submit: Submission, straight: Path, tmp_path: Path, nodes: int, tasks: int
):
    options = (f"--nodes={nodes}",)
    job = submit.pretrain(tmp_path / "run", "--train.stop-at", "10", tasks=tasks, options=options, TP="2")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    topology = json.loads((tmp_path / "run" / "config.json").read_text())["topology"]
    assert topology == {"world_size": 2, "tp": 2, "dp": 1}
    found, expected = learned(tmp_path / "run"), learned(straight)
    assert list(found)[:10] == list(range(1, 11))
    for step in range(1, 11):
        assert found[step]["train/total"] == pytest.approx(expected[step]["train/total"], rel=1e-4)
