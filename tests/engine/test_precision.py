"""Two hundred steps in bf16 give the losses of fp32."""

import numpy as np
import pytest
from support.small_runs import run_config, train
from support.worlds import run_world

pytestmark = pytest.mark.distributed


@pytest.mark.full  # bf16 on ranks: training/test_topologies.py
def test_bf16_losses_are_within_one_percent_of_fp32(small_corpus, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = run_config(small_corpus, tmp_path / precision, steps=200, precision=precision)
        losses[precision] = np.array(run_world(train, 1, config)[0].losses)
    assert losses["fp32"][-10:].mean() < 0.97 * losses["fp32"][:10].mean()  # the loss decreases
    assert not np.array_equal(losses["bf16"], losses["fp32"])
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.01)
