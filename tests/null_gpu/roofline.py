"""A roofline of the training step, by class of operation: what one GPU could do at best, not what it does.

Runs on the null device, in the root of a checkout: tests/null_gpu/run.sh PYTHON tests/null_gpu/roofline.py
A bound from bytes and FLOPs (`charges.py`), counted launches and host waits, and torch's memory. Never a measurement.
"""

import argparse
import collections
import ctypes
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

import deepspeed.runtime.bf16_optimizer as deepspeed_bf16
import torch
from charges import Charged, Places, Rates, Row, Table, charged_kernels
from random_text import random_corpus  # pyright: ignore[reportMissingImports]

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import DataConfig
from pmlm_dist.data.loader import training_batches
from pmlm_dist.masking.visibility import visible
from pmlm_dist.metrics.flops import training_flops
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.model.triton_attention import K_BLOCK, Q_BLOCK
from pmlm_dist.parallel import groups, seeding
from pmlm_dist.presets import PRESETS
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve
from pmlm_dist.training.step import train_step
from pmlm_dist.training.validation import forward_losses

TERA = 1e12


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--layers", type=int, help="another number of layers than the preset's")
    parser.add_argument("--micro-batch", type=int, default=60)
    parser.add_argument("--accumulation", type=int, default=16, help="micro-batches that share one update")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--attention-dropout", type=float)
    parser.add_argument("--bandwidth", type=float, default=2.7, help="TB/s attained: 2.7 for an H100, 4.0 for an H200")
    parser.add_argument("--matrix-rate", type=float, default=600, help="TFLOP/s attained by large bf16 products")
    parser.add_argument("--batched-rate", type=float, default=300, help="TFLOP/s attained by batched products")
    parser.add_argument("--attention-forward", type=float, default=250, help="TFLOP/s assumed of the kernel")
    parser.add_argument("--attention-backward", type=float, default=150, help="TFLOP/s assumed of its backward kernels")
    parser.add_argument("--peak", type=float, default=989.4, help="TFLOP/s that MFU is of")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="also list the N dearest operations")
    parser.add_argument("--syncs", action="store_true", help="also list where the host waits for the device")
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser.parse_args()


class Counter:
    """Kernels, copies and waits that the null device has counted."""

    def __init__(self, scratch: Path):
        self.device, self.file = ctypes.CDLL(os.environ["NULLCUDA_LIBRARY"]), scratch / "counts.tsv"
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self._hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._told)  # kept: the device calls it

    def start(self, *, with_places: bool = False) -> None:
        self.device.null_hook(self._hook if with_places else None)
        self.device.null_reset()
        self.device.null_record(1)

    def stop(self) -> dict[str, int]:
        self.device.null_record(0)
        self.device.null_hook(None)
        self.device.null_dump(str(self.file).encode())
        lines = (line.split("\t", 1) for line in self.file.read_text().splitlines())
        return {name: int(count) for count, name in lines}

    def _told(self, what: bytes) -> None:
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith("roofline.py")]
        shown = [f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}" for frame in frames[::-1]]
        self.waits[what.decode(), " < ".join(shown[:5])] += 1


def configured(options: argparse.Namespace, scratch: Path) -> Any:
    """Run of the preset on random text."""
    corpus = scratch / "corpus"
    corpus.mkdir()
    samples = max(64, 4 * options.micro_batch)
    random_corpus(corpus, vocabulary_size=30522, samples=samples, sequence_length=options.sequence_length)
    config = PRESETS[options.preset]()
    engine = json.loads(config.ds_config.read_text())
    engine |= {"train_batch_size": 2 * options.micro_batch, "train_micro_batch_size_per_gpu": options.micro_batch}
    (scratch / "ds.json").write_text(json.dumps(engine))
    changes: dict[str, Any] = {"attention": options.attention}
    if options.attention_dropout is not None:
        changes["attention_dropout"] = options.attention_dropout
    if options.layers:
        changes["num_layers"] = options.layers
    return dataclasses.replace(
        config,
        corpus=corpus,
        run_dir=scratch / "run",
        ds_config=scratch / "ds.json",
        model=dataclasses.replace(config.model, **changes),
        data=DataConfig(workers=0),
    )


def computed_pairs(batch: Any) -> dict[int, int]:
    """Pairs of the blocks that hold a visible one, by number of queries: of all slots, and of the predicted ones."""
    found, order, valid = {}, batch.order_BT, batch.valid_BT
    pseudo = torch.arange(batch.num_context + batch.num_predictions, order.shape[1])
    for rows in (None, torch.cat([batch.predicted_BM, pseudo.expand(len(order), -1)], dim=1)):
        q_order = order if rows is None else order.gather(1, rows)
        seen = visible(q_order[:, :, None], order[:, None, :]) & valid[:, None, :]
        padded = torch.nn.functional.pad(seen, (0, -seen.shape[2] % K_BLOCK, 0, -seen.shape[1] % Q_BLOCK))
        blocks = padded.unflatten(2, (-1, K_BLOCK)).unflatten(1, (-1, Q_BLOCK)).any(dim=4).any(dim=2)
        found[q_order.shape[1]] = int(blocks.sum()) * Q_BLOCK * K_BLOCK
    return found


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Count a step and a micro-batch; charge a micro-batch and an update."""
    deepspeed_bf16.is_invalid_grad_norm = lambda _norm: False  # no kernel ran: norms are whatever lay in memory
    config = configured(options, scratch)
    topology = groups.init_process_groups()
    run = resolve(config, topology)
    engine = build_engine(run)
    module: Any = engine.module
    places, job = Places(module), PretrainJob(run)
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=config.data, pin_memory=True)
    state, watch, counter = RunState(), Stopwatch(topology.device), Counter(scratch)
    # Whole steps of two micro-batches on the real path. The fourth is counted: all is warm then.
    for number in range(4):
        if number == 3:
            counter.start(with_places=options.syncs)
        train_step(job, engine, [next(batches), next(batches)], state, watch)
    step = counter.stop()
    on_host = next(batches)
    batch = on_host.to(topology.device)
    engine.gradient_accumulation_steps = lambda: 10**9  # from here on no update comes in between

    def micro_batch() -> None:
        seeding.seed_dropout(0, micro_step=0, dp_rank=0)
        places.begin()
        sums = forward_losses(engine, batch, config.objective)
        places.note()
        engine.backward(sums.nll_K.sum())

    micro_batch()
    counter.start()
    micro_batch()
    micro = counter.stop()
    rates = Rates(
        options.bandwidth * TERA,
        options.matrix_rate * TERA,
        options.batched_rate * TERA,
        options.attention_forward * TERA,
        options.attention_backward * TERA,
    )
    table, update = Table(rates), Table(rates)
    with charged_kernels(table, places, computed_pairs(on_host)), Charged(table, places):
        micro_batch()
    with Charged(update, None, "update"):
        optimizer: Any = engine.optimizer
        optimizer.step()
    by_class = {**table.by_class, "update": update.total.scaled(1 / options.accumulation)}
    total = sum(by_class.values(), Row())
    flops = options.micro_batch * training_flops(
        config.model,
        context=options.sequence_length,
        predictions=run.num_predictions,
        vocab_rows=run.vocabulary.padded_size(),
    )
    dearest = sorted(table.by_operation.items(), key=lambda item: -item[1].seconds)[: options.operations]
    return {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "attention": config.model.attention_on(accelerator=True),
        "classes": {name: vars(row) for name, row in by_class.items()},
        "operations": [[*names, vars(row)] for names, row in dearest],
        "ms": 1e3 * total.seconds,
        "gigabytes": total.bytes / 1e9,
        "mfu": flops / total.seconds / (options.peak * TERA),
        "tokens_per_s": options.micro_batch * options.sequence_length / total.seconds,
        "launches_of_micro_batch": micro.get("KERNELS", 0),
        "launches_of_step": step.get("KERNELS", 0),
        "waits_of_step": sum(count for name, count in step.items() if name.startswith("SYNC")),
        "waits": [[what, where, count] for (what, where), count in counter.waits.most_common()],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def report(found: dict[str, Any]) -> None:
    settings = found["settings"]
    print(
        f"{settings['preset']}, micro-batch {settings['micro_batch']} x {settings['sequence_length']}, "
        f"{found['attention']}; one micro-batch and 1/{settings['accumulation']} update"
    )
    print(f"{'class':24}{'operations':>11}{'GB':>9}{'TFLOP':>8}{'ms':>9}{'share':>7}")
    for name, row in sorted(found["classes"].items(), key=lambda item: -item[1]["seconds"]):
        ms = 1e3 * row["seconds"]
        print(
            f"{name:24}{row['operations']:11.0f}{row['bytes'] / 1e9:9.2f}{row['flops'] / TERA:8.2f}{ms:9.2f}"
            f"{ms / found['ms']:7.1%}"
        )
    print(f"{'sum':24}{'':11}{found['gigabytes']:9.2f}{'':8}{found['ms']:9.2f}")
    print(f"roofline: MFU {found['mfu']:.1%}, {found['tokens_per_s']:,.0f} text tokens/s: a bound, not a measurement")
    print(
        f"launches: {found['launches_of_micro_batch']} a micro-batch, {found['launches_of_step']} a step of two; "
        f"waits in that step: {found['waits_of_step']}; memory at its highest: {found['peak_gib']:.1f} GiB"
    )
    for kind, name, row in found["operations"]:
        print(
            f"  {kind:24}{name[:40]:41}{row['operations']:5}{row['bytes'] / 1e9:9.2f} GB{1e3 * row['seconds']:9.2f} ms"
        )
    for what, where, count in found["waits"]:
        print(f"  {count:4} {what}\n       {where}")


if __name__ == "__main__":
    if "NULLCUDA_LIBRARY" not in os.environ:
        sys.exit("start this through run.sh: on a real GPU its figures would mean nothing")
    scratch_folder = Path(tempfile.mkdtemp(prefix="roofline-"))
    arguments = parsed()
    figures = measure(arguments, scratch_folder)
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    sys.stdout.flush()
    shutil.rmtree(scratch_folder, ignore_errors=True)
    os._exit(0)  # torch's own clean-up would wait for a device
