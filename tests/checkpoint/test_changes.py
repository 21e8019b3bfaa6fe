"""Settings that differ from a checkpoint's: each is listed once, with its effect."""

from dataclasses import replace

from pmlm_dist.checkpoint.changes import changed_settings
from pmlm_dist.config import BatchConfig, RunConfig, as_dict


def test_every_changed_setting_is_listed_with_its_effect():
    saved = {**as_dict(RunConfig()), "engine": {"train_micro_batch_size_per_gpu": 60}, "topology": {"dp": 8}}
    run = replace(RunConfig(), batch=BatchConfig(micro=30))
    run = replace(run, train=replace(run.train, steps=200, log_every=5), optim=replace(run.optim, peak_lr=1e-4))
    now = {**as_dict(run), "topology": {"dp": 4}}
    now["engine"] = {"train_micro_batch_size_per_gpu": 30, "gradient_clipping": 1.0}
    assert changed_settings(saved, now) == [
        "engine.gradient_clipping None -> 1.0: gradients of the remaining steps are clipped otherwise",
        "engine.train_micro_batch_size_per_gpu 60 -> 30: speed and memory; sums are rounded otherwise",
        "optim.peak_lr 0.0006 -> 0.0001: the remaining steps are trained with it",
        "topology.dp 8 -> 4: speed and memory; sums are rounded otherwise",
        "train.log_every 10 -> 5: none on what is learned",
        "train.steps 500000 -> 200: the learning rate of the remaining steps changes",
    ]


def test_settings_of_another_release_and_equal_ones_are_not_listed():
    saved = as_dict(RunConfig())
    assert changed_settings(saved, as_dict(RunConfig())) == []
    saved["train"] = {"steps": 500_000, "removed": 1}
    del saved["batch"]
    assert changed_settings(saved, as_dict(RunConfig())) == []
