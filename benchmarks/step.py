"""Training steps (forward, backward, optimizer) compared, each in a process of its own, in interleaved rounds.

ours                    the real training path: corpus, loader, DeepSpeed engine, `train_step`
ours, triton              the same with the Triton kernel, on a GPU only
two passes              an AE pass and a PAR pass with nothing shared, one optimizer step
one pass                the same loop with both objectives in one pass: ours without DeepSpeed
naive                   one dense mask over all T slots, the head on every slot
Hugging Face            `BertForMaskedLM` and `MPNetForMaskedLM` (relative bias), sdpa
.. memory kept          the same with freed memory kept, as our training does on a CPU (engine/malloc.py)
limit                   only matrix products of the fastest shape on this device: the model FLOPs of our step

All rows but ours are loops of plain torch: forward, backward, fused AdamW (in bf16 on fp32 masters, like ours). Freed
memory is handled by the C library's default.
"""

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from harness import Report, best_product, device, interleaved, memory_of, pretrain_step, ratio, synchronize
from random_text import random_corpus
from ranks import World

from pmlm_dist.checkpoint.resume import RunState
from pmlm_dist.config import (
    DataConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.loader import training_batches
from pmlm_dist.engine.deepspeed_engine import has_fast_bf16
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.metrics.flops import training_flops
from pmlm_dist.metrics.meter import Stopwatch
from pmlm_dist.model.transformer import PseudoMaskedLM, build_model
from pmlm_dist.objectives import OBJECTIVES, loss_scales
from pmlm_dist.parallel import groups
from pmlm_dist.presets import PRESETS
from pmlm_dist.training.pretraining import PretrainJob, build_engine
from pmlm_dist.training.resolve import resolve
from pmlm_dist.training.validation import forward_losses, weights_of
from pmlm_dist.vocabulary.vocabulary import Vocabulary

OURS = {"ours, AE+PAR": "ae+par", "ours, AE only": "ae", "ours, PAR only": "par"}
TRITON = "ours, AE+PAR, triton"
KEPT = ", memory kept"
LIMIT = "limit"


@dataclass(frozen=True)
class StepOptions:
    """Model, data type and batch of the steps."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of weights and activations."""
    preset: Literal["bench", "tiny", "base", "large"] = "bench"
    """Shape of the model; `bench`: hidden size 512."""
    layers: int = 4
    """Layers of preset `bench`."""
    batch: int = 4
    """Sequences of a step."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    vocabulary: int = 30_528
    """Size of the vocabulary."""
    threads: int = 2
    """Torch threads."""
    repeats: int = 5
    """Measured rounds."""

    def quick(self) -> Self:
        """A smoke run."""
        return dataclasses.replace(self, layers=1, batch=2, sequence_length=64, vocabulary=1000, threads=1, repeats=1)

    @property
    def model(self) -> ModelConfig:
        """The shape of the model, without dropout."""
        if self.preset == "bench":
            shape = ModelConfig(hidden_size=512, num_layers=self.layers, num_heads=8, ffn_size=2048)
        else:
            shape = PRESETS[self.preset]().model
        return dataclasses.replace(shape, vocab_size=self.vocabulary, hidden_dropout=0.0, attention_dropout=0.0)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def engine(self) -> dict[str, Any]:
        """DeepSpeed's JSON: in bf16 as in `ds_configs/`."""
        engine: dict[str, Any] = {
            "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        }
        if self.dtype == "bf16":
            engine["bf16"] = {"enabled": True}
            engine["data_types"] = {"grad_accum_dtype": "fp32"}
            engine["zero_optimization"] = {"stage": 1, "reduce_bucket_size": 10_000_000}
        return engine


def run(options: StepOptions) -> Report:
    """Measure the memory of ours and of naive; then time all rows in interleaved rounds."""
    if options.dtype == "bf16" and not has_fast_bf16(device()):
        raise SystemExit(
            "--dtype bf16: this CPU has no bf16 instructions, so a step takes many minutes and measures torch's "
            "fallback; `run.py update` times the optimizer step in bf16 instead"
        )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        corpus = random_corpus(
            Path(folder),
            vocabulary_size=options.vocabulary,
            samples=4 * options.batch,
            sequence_length=options.sequence_length,
        )
        # Memory first, while no other process uses the accelerator.
        memory = {name: memory_of(_prepare_for_memory, name, options, corpus) for name in ("ours, AE+PAR", "naive")}
        skipped = KEPT if device().type == "cuda" else TRITON
        worlds = {
            name: stack.enter_context(World(prepare, name, options, corpus, ranks=1, threads=options.threads))
            for name in ROWS
            if not name.endswith(skipped)
        }
        seconds = interleaved({name: world.call for name, world in worlds.items()}, repeats=options.repeats)
    return _report(options, seconds, memory)


def _report(options: StepOptions, seconds: dict[str, list[float]], memory: dict[str, float]) -> Report:
    ours, ae, par = OURS
    flops = {name: options.batch * _flops(options, _kind(name)) for name in (*OURS, TRITON) if name in seconds}
    rows: dict[str, dict[str, float]] = {name: {"seconds": statistics.median(s)} for name, s in seconds.items()}
    for name, count in {**flops, LIMIT: flops[ours]}.items():
        rows[name] |= {"TFLOP": count / 1e12, "mfu": count / flops[ours] * ratio(seconds, LIMIT, name)}
    for name, peak in memory.items():
        rows[name]["step MiB"] = peak / 2**20
    baselines = {"hf_bert": "Hugging Face BERT", "hf_mpnet": "Hugging Face MPNet"}
    baselines |= {"two_passes": "two passes", "naive": "naive"}
    pairs = {f"vs_{short}": (ours, name) for short, name in baselines.items()}
    pairs |= {f"vs_{short}_memory_kept": (ours, name + KEPT) for short, name in baselines.items()}
    pairs |= {"one_pass_vs_two": ("one pass", "two passes")}
    pairs |= {"one_pass_vs_two_memory_kept": ("one pass" + KEPT, "two passes" + KEPT)}
    pairs |= {"vs_ae_only": (ours, ae), "vs_triton": (ours, TRITON)}
    figures = {name: ratio(seconds, *pair) for name, pair in pairs.items() if seconds.keys() >= set(pair)}
    figures["flops_vs_ae_only"] = flops[ours] / flops[ae]
    figures["flops_vs_two_passes"] = flops[ours] / (flops[ae] + flops[par])
    figures["mfu"] = rows[ours]["mfu"]
    figures["peak_memory_vs_naive"] = memory[ours] / memory["naive"]
    return Report("step", _shapes(options), rows, figures)


def prepare(row: str, options: StepOptions, corpus: Path) -> Callable[[], None]:
    """Prepare the step of a row; the returned function waits for the accelerator."""
    torch.set_num_threads(options.threads)
    groups.init_process_groups()
    if row.endswith(KEPT):
        keep_freed_memory()
    step = ROWS[row](options, corpus, row)

    def synchronized_step() -> None:
        step()
        synchronize()

    return synchronized_step


def _prepare_for_memory(row: str, options: StepOptions, corpus: Path) -> Callable[[], None]:
    """Prepare the step of a row in a process that releases freed memory, so that only its tensors are measured."""
    step = prepare(row, options, corpus)
    if device().type == "cpu":
        keep_freed_memory(keep=False)
    return step


def _ours(options: StepOptions, corpus: Path, row: str) -> Callable[[], object]:
    topology = groups.init_process_groups()
    attention = "triton" if row == TRITON else "fused"
    run = resolve(_run_config(options, corpus, _kind(row), attention=attention), topology)
    engine = build_engine(run)
    batches = training_batches(
        run.source, lanes=run.lanes, share=run.share, loading=run.config.data, pin_memory=topology.device.type == "cuda"
    )
    job, state, stopwatch = PretrainJob(run), RunState(), Stopwatch(topology.device)

    def step() -> None:
        nonlocal state
        state = pretrain_step(job, engine, batches, state, stopwatch)

    return step


def _passes(options: StepOptions, corpus: Path, row: str) -> Callable[[], object]:
    model, update, batch = _plain_torch(options, corpus, options.model)
    kinds: tuple[Any, ...] = ("ae", "par") if row.startswith("two") else ("ae+par",)

    def step() -> None:
        for kind in kinds:
            objective = ObjectiveConfig(kind=kind)
            targets_K = weights_of(batch, objective).sum(dim=(1, 2))
            (forward_losses(model, batch, objective).nll_K * loss_scales(objective, targets_K)).sum().backward()
        update()

    return step


def adamw_on_masters(model: torch.nn.Module) -> Callable[[], None]:
    """AdamW on fp32 masters, with gradients clipped at 1 (the default of Hugging Face's Trainer, and ours)."""
    weights = list(model.parameters())
    masters = [
        weight.float().detach().requires_grad_() if weight.dtype != torch.float32 else weight for weight in weights
    ]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    @torch.no_grad()
    def update() -> None:
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                assert weight.grad is not None
                master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for weight, master in zip(weights, masters, strict=True):
            if master is not weight:
                weight.copy_(master)
                weight.grad = None
        optimizer.zero_grad()

    return update


def _naive(options: StepOptions, corpus: Path, _: str) -> Callable[[], object]:
    model, update, batch = _plain_torch(options, corpus, dataclasses.replace(options.model, attention="reference"))
    inputs = batch.inputs._replace(predicted_BM=None)
    rows = torch.arange(len(batch.tokens_BT), device=batch.tokens_BT.device)[:, None]
    pseudo = slice(batch.num_context + batch.num_predictions, None)

    def step() -> None:
        hidden_TBE = model.encode(inputs)
        logits_BTV = model.head(hidden_TBE, model.embeddings.token.weight).transpose(0, 1)
        predicted = [logits_BTV[rows, batch.predicted_BM], logits_BTV[:, pseudo]]
        losses = [F.cross_entropy(logits.flatten(0, 1).float(), batch.targets_BM.flatten()) for logits in predicted]
        torch.stack(losses).sum().backward()
        update()

    return step


def _hugging_face(options: StepOptions, corpus: Path, row: str) -> Callable[[], object]:
    from transformers import BertConfig, BertForMaskedLM, MPNetConfig, MPNetForMaskedLM

    shape = options.model
    settings = {
        "vocab_size": options.vocabulary,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.ffn_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": shape.max_positions + 2,
    }
    if row.startswith("Hugging Face BERT"):
        model: Any = BertForMaskedLM(BertConfig(**{**settings, "attn_implementation": "sdpa"}))
    else:
        model = MPNetForMaskedLM(MPNetConfig(**settings))
    model = model.to(device(), options.torch_dtype).train()
    update = adamw_on_masters(model)
    batch = _batch(options, corpus)
    context = slice(0, batch.num_context)
    labels = torch.full_like(batch.tokens_BT[:, context], -100).scatter(1, batch.predicted_BM, batch.targets_BM)

    def step() -> None:
        valid = batch.valid_BT[:, context].long()
        model(input_ids=batch.tokens_BT[:, context], attention_mask=valid, labels=labels).loss.backward()
        update()

    return step


def _products(options: StepOptions, *_: object) -> Callable[[], object]:
    """Matrix products with as many FLOPs as the model FLOPs of our step."""
    product = best_product(options.torch_dtype, device())
    times = round(options.batch * _flops(options, "ae+par") / product.flops)

    def step() -> None:
        for _ in range(times):
            product()

    return step


ROWS: dict[str, Callable[[StepOptions, Path, str], Callable[[], object]]] = {
    **dict.fromkeys((*OURS, TRITON), _ours),
    **dict.fromkeys(("two passes", "two passes" + KEPT, "one pass", "one pass" + KEPT), _passes),
    **dict.fromkeys(("naive", "naive" + KEPT), _naive),
    **dict.fromkeys(("Hugging Face BERT", "Hugging Face BERT" + KEPT, "Hugging Face MPNet"), _hugging_face),
    LIMIT: _products,
}


def _kind(row: str) -> str:
    return OURS[row.removesuffix(", triton")]


def _run_config(options: StepOptions, corpus: Path, kind: Any, *, attention: Any = "fused") -> RunConfig:
    path = corpus / f"engine-{os.getpid()}.json"
    path.write_text(json.dumps(options.engine))
    return RunConfig(
        corpus=corpus,
        run_dir=corpus / "run",
        ds_config=path,
        model=dataclasses.replace(options.model, vocab_size=None, attention=attention),
        masking=MaskingConfig(),
        objective=ObjectiveConfig(kind=kind),
        data=DataConfig(workers=0),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=10),
        train=TrainConfig(steps=10_000),
    )


def _batch(options: StepOptions, corpus: Path) -> Batch:
    run = resolve(_run_config(options, corpus, "ae+par"), groups.init_process_groups())
    batches = training_batches(run.source, lanes=run.lanes, share=run.share, loading=run.config.data)
    return next(batches).to(device())


def _plain_torch(
    options: StepOptions, corpus: Path, shape: ModelConfig
) -> tuple[PseudoMaskedLM, Callable[[], None], Batch]:
    padded = Vocabulary.load(corpus).padded_size()
    model = build_model(shape, padded_vocab_size=padded).to(device(), options.torch_dtype).train()
    return model, adamw_on_masters(model), _batch(options, corpus)


def _flops(options: StepOptions, kind: str) -> float:
    predictions = -(-15 * options.sequence_length // 100)
    return training_flops(
        options.model,
        context=options.sequence_length,
        predictions=predictions,
        vocab_rows=options.vocabulary,
        objectives=OBJECTIVES[kind],
    )


def _shapes(options: StepOptions) -> dict[str, Any]:
    shape = options.model
    names = ("num_layers", "hidden_size", "num_heads", "ffn_size")
    return {**dataclasses.asdict(options), **{name: getattr(shape, name) for name in names}}
