"""The batch script trains over two nodes, with tensor parallelism within and across them."""

import json
from pathlib import Path

import pytest
from support.submissions import STEPS, Submission, step_scalars


def test_loss_decreases_over_two_nodes(uninterrupted: Path):
    losses = [scalars["train/total"] for scalars in step_scalars(uninterrupted).values()]
    assert len(losses) == STEPS
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])
    configuration = json.loads((uninterrupted / "config.json").read_text())
    assert configuration["topology"] == {"world_size": 2, "tp": 1, "dp": 2}


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 1), (1, 2)], ids=["across nodes", "within a node"])
def test_tensor_parallel_losses_are_equal_across_and_within_nodes(
    submit: Submission, uninterrupted: Path, tmp_path: Path, nodes: int, tasks: int
):
    options = (f"--nodes={nodes}",)
    job = submit.pretrain(tmp_path / "run", "--train.stop-at", "10", tasks=tasks, options=options, TP="2")
    assert job.wait_for_end() == "COMPLETED", job.printed()
    topology = json.loads((tmp_path / "run" / "config.json").read_text())["topology"]
    assert topology == {"world_size": 2, "tp": 2, "dp": 1}
    actual, expected = step_scalars(tmp_path / "run"), step_scalars(uninterrupted)
    assert list(actual)[:10] == list(range(1, 11))
    for step in range(1, 11):
        assert actual[step]["train/total"] == pytest.approx(expected[step]["train/total"], rel=1e-4)
