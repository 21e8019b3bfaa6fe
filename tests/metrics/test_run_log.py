"""The log of a run can be read again, also after a kill in the middle of a line."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from pmlm_dist.commands.plot import PlotConfig, plot_losses
from pmlm_dist.config import ConfigError
from pmlm_dist.metrics.run_log import Progress, RunLog, format_duration, read_metrics
from pmlm_dist.objectives import LossMeans


def progress(step: int, *, ae: float = 5.0) -> Progress:
    return Progress(
        step=step,
        steps=10,
        losses=LossMeans(
            total=2 * ae,
            ae=ae,
            par=ae,
            ae_accuracy=0.1,
            par_accuracy=0.1,
            par_masked=None,
            par_masked_accuracy=None,
            prefix=None,
            prefix_accuracy=None,
        ),
        learning_rate=0.1,
        gradient_norm=1.0,
        loss_scale=None,
        skipped_steps=0,
        tokens_per_s=1.0,
        slots_per_s=1.0,
        mfu=None,
        seconds={"data": 0.0},
        eta_s=0.0,
    )


def write(run_dir: Path, *entries: Progress) -> None:
    log = RunLog(run_dir, enabled=True, first_step=0)
    for entry in entries:
        log.progress(entry, torch.device("cpu"))
    log.close()


@pytest.mark.fault("F45")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_of_tensorboard_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    """Its thread ends with one line in place of a traceback; metrics.jsonl is complete."""
    log = RunLog(tmp_path, enabled=True, first_step=0)
    assert threading.excepthook is not threading.__excepthook__
    report = threading.excepthook
    written = threading.Event()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reported(failure: threading.ExceptHookArgs) -> None:
        report(failure)
        written.set()

    monkeypatch.setattr(threading, "excepthook", reported)
    monkeypatch.setattr(RecordWriter, "write", full)
    log.progress(progress(1), torch.device("cpu"))
    assert written.wait(20)
    log.progress(progress(2), torch.device("cpu"))
    assert log.lost_lines
    log.close()
    assert list(read_metrics(tmp_path)) == [1, 2]
    errors = capsys.readouterr().err
    assert "warning: no more events for TensorBoard are written: [Errno 28] No space left on device" in errors
    assert "Traceback" not in errors


def test_partial_line_of_a_killed_run_is_skipped(tmp_path):
    write(tmp_path, progress(1), progress(2))
    lines = tmp_path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    write(tmp_path, progress(2, ae=4.0), progress(3))
    metrics = read_metrics(tmp_path)
    assert list(metrics) == [1, 2, 3]
    assert metrics[2]["train/ae"] == 4.0


def test_unknown_scalars_are_not_written(tmp_path):
    write(tmp_path, progress(1))
    assert {"train/par_masked", "speed/mfu", "train/loss_scale"}.isdisjoint(read_metrics(tmp_path)[1])


def test_plot_losses_writes_a_picture_and_raises_without_metrics(tmp_path):
    write(tmp_path / "run", progress(1), progress(2))
    plot_losses(PlotConfig(run_dir=tmp_path / "run", png=tmp_path / "losses.png"))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    plot_losses(PlotConfig(run_dir=tmp_path / "run", png=tmp_path / "losses.png"))  # again: its own picture
    (tmp_path / "photo.png").write_bytes(b"foreign")
    with pytest.raises(ConfigError, match=r"photo\.png exists, and this command has not written it"):
        plot_losses(PlotConfig(run_dir=tmp_path / "run", png=tmp_path / "photo.png"))
    assert (tmp_path / "photo.png").read_bytes() == b"foreign"
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        plot_losses(PlotConfig(run_dir=tmp_path / "empty", png=tmp_path / "losses.png"))


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
