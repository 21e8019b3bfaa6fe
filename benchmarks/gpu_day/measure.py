"""Times steps of a preset on a GPU through the project's own training path, beside what roofline.py charges.

python benchmarks/gpu_day/measure.py --preset base --micro-batch 60 --json FILE
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent.parent), str(Path(__file__).parent.parent)]

import torch
from random_text import random_corpus

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig
from pmlm_dist.data.loader import training_batches
from pmlm_dist.metrics.flops import training_flops
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.parallel import groups
from pmlm_dist.presets import PRESETS
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve
from pmlm_dist.training.step import train_step

SETTINGS = {
    "default": {},
    "dropout": {"attention_dropout": 0.1},
    "no relative bias": {"relative_bias": False},
    "fused": {"attention": "fused"},
}
PEAK = 989.4e12
"""FLOP/s of dense bf16 products of an H100 and an H200, from their data sheets."""


def main() -> None:
    """Measure one setting and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="default")
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--layers", type=int, help="another number of layers than the preset's")
    parser.add_argument("--micro-batch", type=int, default=60)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps that count, after three that do not")
    parser.add_argument("--no-profile", action="store_true", help="no times of kernels: a null device has no profiler")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options, Path(folder))
    print(json.dumps({name: value for name, value in found.items() if name != "kernels"}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    os._exit(0)  # process groups of one rank need no goodbye, and a null device would wait for ever


def measured(options: argparse.Namespace, scratch: Path) -> dict:
    """Median time of a micro-batch, what follows from it, and the kernels of one step by time."""
    random_corpus(scratch, vocabulary_size=30522, samples=16 * options.micro_batch, sequence_length=512)
    config = PRESETS[options.preset]()
    engine_json = json.loads(config.ds_config.read_text())
    engine_json |= {
        "train_batch_size": options.micro_batch * options.accumulation,
        "train_micro_batch_size_per_gpu": options.micro_batch,
    }
    (scratch / "ds.json").write_text(json.dumps(engine_json))
    changes = SETTINGS[options.setting] | ({"num_layers": options.layers} if options.layers else {})
    model = dataclasses.replace(config.model, **changes)
    config = dataclasses.replace(
        config,
        corpus=scratch,
        run_dir=scratch / "run",
        ds_config=scratch / "ds.json",
        model=model,
        data=DataConfig(workers=2),
    )
    run = resolve(config, groups.init_process_groups())
    engine, job = build_engine(run), PretrainJob(run)
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=config.data, pin_memory=True)
    state, watch = RunState(), Stopwatch(run.topology.device)

    def step() -> float:
        micro_batches = [next(batches) for _ in range(options.accumulation)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step(job, engine, micro_batches, state, watch)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    warm = [step() for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(options.steps)]
    typical, samples = statistics.median(seconds), options.micro_batch * options.accumulation
    flops = samples * training_flops(
        model, context=512, predictions=run.num_predictions, vocab_rows=run.vocabulary.padded_size()
    )
    found = {
        "setting": options.setting,
        "preset": options.preset,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "micro_batch": options.micro_batch,
        "ms_of_micro_batch": 1e3 * typical / options.accumulation,
        "mfu": flops / typical / PEAK,
        "tokens_per_s": samples * 512 / typical,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "warm_up_s": warm,
        "steps_s": seconds,
        "kernels": [],
    }
    if options.no_profile:
        return found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        step()
    rows = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)[:30]
    found["kernels"] = [
        [event.key[:100], event.count, event.self_device_time_total / 1e3 / options.accumulation] for event in rows
    ]
    return found


if __name__ == "__main__":
    main()
