"""Comparator: `BertForMaskedLM` of transformers, trained on a corpus of this project as a masked language model.

    python benchmarks/ablation/hf_bert.py --preset tiny --corpus data/demo --run-dir runs/hf-bert

The arguments are those of `train.py`. Samples, their order, batch, schedule, dropout and AdamW's settings are those of
the same run of `train.py`; initial weights and masks (`DataCollatorForLanguageModeling`) are those of transformers. One
process. RUN/model is the trained model, as `pmlm import` writes it; RUN/metrics.jsonl has the held-out losses.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from pmlm_dist.cli import run_config
from pmlm_dist.conversion.importing import read_pretrained
from pmlm_dist.conversion.pretrained import save_pretrained
from pmlm_dist.data.batch import Batch
from pmlm_dist.data.loader import training_batches, validation_batches
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.engine.optimizer import learning_rate
from pmlm_dist.files import open_atomically
from pmlm_dist.parallel import groups, seeding
from pmlm_dist.parallel.layers import count_parameters
from pmlm_dist.training.resolve import ResolvedRun, resolve

STATE = "state.pt"


def main(arguments: Sequence[str]) -> None:
    """Train to the last step, from the newest saved state if there is one."""
    config = run_config(arguments)
    run = resolve(config, groups.init_process_groups())
    folder, device = config.run_dir, run.topology.device
    if (folder / "model").exists():
        print(f"complete: {folder / 'model'}")
        return
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    seeding.seed_initialization(config.train.seed)
    model = build(run).to(device)
    optimizer = adamw(model, run)
    step = load(folder / STATE, model, optimizer)
    print(f"Hugging Face BERT: {count_parameters(model, run.topology):,} parameters; after step {step}", flush=True)
    collator = DataCollatorForLanguageModeling(tokenizer(run), mlm_probability=config.masking.rate)
    batches = training_batches(
        run.source,
        lanes=run.lanes,
        share=run.share,
        samples_consumed=step * run.engine.global_batch,
        loading=config.data,
    )
    while step < config.train.steps:
        step += 1
        seeding.seed_dropout(config.train.seed, micro_step=step, dp_rank=0)  # the collator draws from this generator
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=config.train.steps, optim=config.optim)
        micro_batches = [next(batches) for _ in range(run.engine.accumulation(run.topology.dp))]
        masked = [mask(batch, collator) for batch in micro_batches]
        targets = sum(int((labels_BT != -100).sum()) for _, labels_BT in masked)
        for batch, (tokens_BT, labels_BT) in zip(micro_batches, masked, strict=True):
            loss = loss_sum(model, batch.to(device), tokens_BT.to(device), labels_BT.to(device))
            (loss / max(1, targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.engine.gradient_clipping or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if step % config.train.validate_every == 0 or step == config.train.steps:
            line = {"step": step, "validation/ae": validation_loss(model, run)}
            print(json.dumps(line), flush=True)
            with (folder / "metrics.jsonl").open("a") as file:
                print(json.dumps(line), file=file)
        if step % config.train.checkpoint_every == 0 and step < config.train.steps:
            with open_atomically(folder / STATE) as file:
                torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    batches.close()
    model.save_pretrained(folder / "hugging-face")
    run.vocabulary.save(folder / "hugging-face")
    save_pretrained(read_pretrained(folder / "hugging-face"), folder / "model")


def build(run: ResolvedRun) -> Any:
    """Return a BERT of the run's shape, with the initial weights that transformers draws."""
    shape = run.config.model
    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    return BertForMaskedLM(
        BertConfig(
            vocab_size=run.vocabulary.size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.ffn_size,
            hidden_dropout_prob=shape.hidden_dropout,
            attention_probs_dropout_prob=shape.attention_dropout,
            max_position_embeddings=shape.max_positions,
            initializer_range=shape.initializer_range,
            pad_token_id=run.vocabulary.pad_id,
            **settings,
        )
    ).train()


def adamw(model: Any, run: ResolvedRun) -> torch.optim.AdamW:
    """Return AdamW with the run's settings; no weight decay on biases and LayerNorm, as in the run."""
    optim = run.config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.peak_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def load(path: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Fill model and optimizer from `path` if it exists; return the step."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def tokenizer(run: ResolvedRun) -> Any:
    """Return the corpus' tokenizer for the collator."""
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_file=str(run.own_corpus.folder / "tokenizer.json"), **named)


def mask(batch: Batch, collator: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the masks of `batch`, and mask it as transformers does: tokens, and labels (-100: not predicted)."""
    context = slice(0, batch.num_context)
    tokens_BT = batch.tokens_BT[:, context].clone()
    rows, used = torch.arange(len(tokens_BT))[:, None], batch.weights_BM > 0
    tokens_BT[rows.expand_as(used)[used], batch.predicted_BM[used]] = batch.targets_BM[used]
    tokens_BT, labels_BT = collator.torch_mask_tokens(tokens_BT)
    return tokens_BT, labels_BT


def loss_sum(model: Any, batch: Batch, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of masked `tokens_BT` in place of the batch's; the head runs on predicted slots only."""
    context = slice(0, batch.num_context)
    x_BTE = model.bert(
        input_ids=tokens_BT,
        attention_mask=batch.valid_BT[:, context].long(),
        token_type_ids=batch.segments_BT[:, context],
    ).last_hidden_state
    predicted_BT = labels_BT != -100
    logits_NV = model.cls(x_BTE[predicted_BT])
    return torch.nn.functional.cross_entropy(logits_NV, labels_BT[predicted_BT], reduction="sum")


@torch.no_grad()
def validation_loss(model: Any, run: ResolvedRun) -> float:
    """Return the AE loss on the masks that `train.py` validates on, in nats a token."""
    model.eval()
    total, count = 0.0, 0
    batches = validation_batches(run.source, samples=run.config.train.validation_samples, share=run.share)
    for batch in (batch.to(run.topology.device) for batch in batches):
        used = batch.weights_BM > 0
        tokens_BT = batch.tokens_BT[:, : batch.num_context]
        labels_BT, rows = torch.full_like(tokens_BT, -100), torch.arange(len(used))[:, None].expand_as(used)
        labels_BT[rows[used], batch.predicted_BM[used]] = batch.targets_BM[used]
        total += float(loss_sum(model, batch, tokens_BT, labels_BT))
        count += int(used.sum())
    model.train()
    return total / count


if __name__ == "__main__":
    main(sys.argv[1:])
