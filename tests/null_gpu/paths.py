"""Training paths on the null device: pre-training with a save and a resume, fine-tuning, generation.

Usage: run.sh PYTHON paths.py JSON, in the environment of a rank. No kernel runs, so numbers are whatever lay in memory:
checks of numbers are off. What remains: devices, dtypes, shapes, memory, collectives, streams, files.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch
from support.small_runs import run_config, with_model, with_train

from pmlm_dist.checkpoint import fingerprint, resume
from pmlm_dist.checkpoint.engine_state import EngineState
from pmlm_dist.decoding import batch_generation
from pmlm_dist.engine import bf16_optimizer, optimizer
from pmlm_dist.training import guards, loop, step, validation


def without_checks_of_numbers() -> None:
    """Let garbage pass where a number would stop the run, or make ranks part."""
    norm = lambda *_, **__: 1.0  # noqa: E731
    bf16_optimizer.norm_over_ranks = optimizer.norm_over_ranks = norm
    step.math = Finite
    loop.check_replicas = guards.check_replicas = lambda *_: None
    # Which sources are done is garbage: none is, so that all steps of the search run.
    batch_generation._done = lambda *_: []
    for kind in ("flash", "mem_efficient", "cudnn"):  # the null device cannot load torch's fused attention
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    counters = EngineState.counters

    def with_equal_steps(state: Any) -> dict[str, Any]:
        for of_parameter in state._adam.state.values():
            of_parameter["step"] = torch.zeros(())
        return counters(state)

    setattr(EngineState, "counters", with_equal_steps)  # noqa: B010
    validation.fill_in = lambda *_, **__: ""  # ids of tokens are garbage as well
    resume.fingerprint_differences = fingerprint.fingerprint_differences = lambda *_, **__: []
    resume.is_finite = fingerprint.is_finite = lambda *_: True


class Finite:
    """`math`, whose numbers are all finite."""

    nan = 1.0
    isfinite = staticmethod(lambda _: True)


def pretrained(settings: dict[str, Any]) -> None:
    """Two steps, a checkpoint, two more after a resume."""
    from pmlm_dist.training.run import pretrain

    config = run_config(
        Path(settings["corpus"]),
        Path(settings["run"]),
        tp=settings.get("tp", 1),
        steps=4,
        zero=settings["zero"],
        precision=settings["precision"],
        global_batch=16,
    )
    config = with_train(config, validate_every=2, checkpoint_every=2, stop_at=settings["stop_at"])
    config = with_model(config, num_heads=2, **settings.get("model", {}))  # heads of 16, which the kernels compute
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=2))
    pretrain(config)


def command(settings: dict[str, Any]) -> None:
    """A command of `pmlm`, in this process: a fork could not use the device."""
    from pmlm_dist import cli

    name, *arguments = settings["command"]
    getattr(cli, name)(arguments)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    without_checks_of_numbers()
    code = 0
    try:
        command(asked) if "command" in asked else pretrained(asked)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    sys.stdout.flush()
    os._exit(code)  # torch's own clean-up would wait for a device
