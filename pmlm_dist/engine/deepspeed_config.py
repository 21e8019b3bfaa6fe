"""DeepSpeed's JSON, read and checked before an engine is built. Standard library only.

The file sets batch sizes, precision, ZeRO stage, clipping and offload, in DeepSpeed's own schema. Settings that
DeepSpeed would ignore silently or compute wrongly raise `ConfigError`.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmlm_dist.config import DS_CONFIGS, ConfigError, raise_if_any
from pmlm_dist.json_input import read_json_object
from pmlm_dist.relations import divisors

_ALLOWED = {
    "train_batch_size": "sequences of one optimizer step over all ranks",
    "train_micro_batch_size_per_gpu": "sequences of one forward pass on one rank",
    "gradient_accumulation_steps": "derived from the two batch sizes when absent",
    "gradient_clipping": "maximum gradient norm; absent: no clipping, as in the paper",
    "zero_optimization": "ZeRO",
    "bf16": "bfloat16 weights with fp32 master copies",
    "fp16": "half precision with loss scaling",
    "data_types": "dtype of accumulated gradients",
    "communication_data_type": "dtype of gradient reduction",
    "prescale_gradients": "divide before reducing",
    "gradient_predivide_factor": "with prescale_gradients",
    "steps_per_print": "DeepSpeed's own console lines",
    "wall_clock_breakdown": "DeepSpeed's own timers",
    "dump_state": "print DeepSpeed's state",
    "comms_logger": "log of collectives",
    "flops_profiler": "DeepSpeed's profiler",
    "zero_allow_untested_optimizer": "ZeRO with other optimizers",
    "zero_force_ds_cpu_optimizer": "offload with other optimizers",
}
_SECTIONS = ("zero_optimization", "bf16", "fp16")
_UNSUPPORTED = {
    "optimizer": "the optimizer is AdamW with the settings `--optim.*`: remove the section",
    "scheduler": "the schedule is set by `--optim.warmup-steps` and `--train.steps`: remove the section",
    "tensor_parallel": "tensor parallelism is set by `--parallel.tp`; AutoTP would replace it: remove the section",
    "activation_checkpointing": "it is set by `--model.activation-checkpointing`: remove the section",
    "checkpoint": "checkpoints are written and reshaped by this program: remove the section",
    "tensorboard": "TensorBoard files are written to RUN_DIR/tensorboard: remove the section",
    "amp": "use bf16 or fp16: remove the section",
    "aio": "it configures offload to NVMe, from which no checkpoint can be made: remove the section",
}
_NOT_CHECKPOINTABLE = {
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.offload_optimizer.super_offload": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "fp16.fp16_master_weights_and_grads": True,
}
"""Values with which masters or moments are not fp32 tensors in memory, as checkpoints need them."""
_HIDES_NONFINITE = {"zero_optimization.compute_grad_norm": False, "bf16.check_grad_overflow": False}
"""Values with which DeepSpeed does not detect gradients that are not finite, or does not skip their step."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of DeepSpeed's JSON that other modules use."""

    raw: dict[str, Any]
    """The file as written."""
    global_batch: int
    micro_batch: int
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    offload_optimizer: bool
    gradient_clipping: float
    """Maximum gradient norm; 0: no clipping."""

    def for_deepspeed(self) -> dict[str, Any]:
        """Return the JSON for DeepSpeed: the file without console output and without DeepSpeed's default clipping."""
        # With ZeRO-0 `optimizer_step` clips, since it needs the norm anyway. With bf16, gradients are accumulated as
        # soon as they are ready, as engine/bf16_optimizer.py expects.
        clipping = self.gradient_clipping if self.zero_stage else 0.0
        settings = {"steps_per_print": 2**31, **self.raw, "gradient_clipping": clipping}
        settings["timers"] = {"throughput": {"enabled": False}}  # it synchronizes the device twice a micro-batch
        if self.precision == "bf16":
            settings["bf16"] = {**self.raw["bf16"], "immediate_grad_update": True}
        return settings

    def accumulation(self, dp: int) -> int:
        """Return the gradient accumulation steps on `dp` data-parallel ranks."""
        return self.global_batch // (self.micro_batch * dp)


def load_engine_config(
    path: Path, *, has_accelerator: bool, overrides: Mapping[str, Any] | None = None
) -> EngineConfig:
    """Read and check DeepSpeed's JSON at `path`.

    `overrides` replace settings of the file; sections are merged. Raises `ConfigError` with all problems.
    """
    raw = _read(path)
    if overrides and {"train_batch_size", "train_micro_batch_size_per_gpu"} & overrides.keys():
        raw.pop("gradient_accumulation_steps", None)  # the file's follows from the file's batch sizes
    for name, value in (overrides or {}).items():
        raw[name] = {**_section(raw, name), **value} if isinstance(value, dict) else value
    raise_if_any([f"{path}: {problem}" for problem in _problems(raw, has_accelerator=has_accelerator)])
    zero = _section(raw, "zero_optimization")
    return EngineConfig(
        raw=raw,
        global_batch=raw["train_batch_size"],
        micro_batch=raw["train_micro_batch_size_per_gpu"],
        precision=_precision(raw),
        zero_stage=zero.get("stage", 0),
        offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        gradient_clipping=float(raw.get("gradient_clipping", 0.0)),
    )


def batch_problems(engine: EngineConfig, *, dp: int) -> list[str]:
    """Return why the global batch does not divide over `dp` data-parallel ranks; empty when it does."""
    if engine.global_batch % (engine.micro_batch * dp):
        usable = [
            d
            for d in divisors(engine.global_batch)
            if d * dp <= engine.global_batch and engine.global_batch % (d * dp) == 0
        ]
        way_out = f"--batch.micro with one of {usable}" if usable else f"--batch.global with a multiple of {dp}"
        return [
            f"train_batch_size ({engine.global_batch}) must be a multiple of train_micro_batch_size_per_gpu "
            f"({engine.micro_batch}) x data-parallel ranks ({dp}): use {way_out}"
        ]
    stated = engine.raw.get("gradient_accumulation_steps")
    derived = engine.accumulation(dp)
    if stated is not None and stated != derived:
        return [
            f"gradient_accumulation_steps ({stated}) contradicts train_batch_size / (micro-batch x data-parallel "
            f"ranks) = {derived}: remove it, it is derived"
        ]
    return []


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            [f"{path} does not exist: pass DeepSpeed's JSON with --ds-config, for example {DS_CONFIGS / 'base.json'}"]
        )
    return read_json_object(path)


def _problems(raw: dict[str, Any], *, has_accelerator: bool) -> list[str]:
    return [
        *_key_problems(raw),
        *_batch_size_problems(raw),
        *_clipping_problems(raw),
        *_section_problems(raw),
        *_precision_problems(raw, has_accelerator=has_accelerator),
        *_checkpoint_problems(raw),
        *_nonfinite_problems(raw),
        *_accumulation_problems(raw),
    ]


def _key_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    for key in raw:
        if key in _UNSUPPORTED:
            problems.append(f"section `{key}` is not supported: {_UNSUPPORTED[key]}")
        elif key not in _ALLOWED:
            close = difflib.get_close_matches(key, _ALLOWED, n=1)
            problems.append(f"unknown setting `{key}`" + (f": did you mean `{close[0]}`?" if close else ": remove it"))
    return problems


def _batch_size_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if type(raw.get(key)) is not int or raw[key] < 1:  # `true` is an int to isinstance
            problems.append(f"`{key}` ({raw.get(key)}) must be a positive integer: {_ALLOWED[key]}")
    return problems


def _clipping_problems(raw: dict[str, Any]) -> list[str]:
    max_norm = raw.get("gradient_clipping", 0.0)
    if type(max_norm) in (int, float) and max_norm >= 0:  # `true` is an int to isinstance
        return []
    return [f"`gradient_clipping` ({max_norm!r}) must be a number, 0 (no clipping) or more"]


def _section_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    for name in _SECTIONS:
        section = raw.get(name, {})
        if not isinstance(section, dict):
            problems.append(f"`{name}` ({section}) must be an object: {_ALLOWED[name]}")
        elif not isinstance(section.get("enabled", False), bool):
            problems.append(f"{name}.enabled ({section['enabled']!r}) must be true or false")
    return problems


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name, {})
    return section if isinstance(section, dict) else {}


def _precision_problems(raw: dict[str, Any], *, has_accelerator: bool) -> list[str]:
    enabled = [name for name in ("bf16", "fp16") if _section(raw, name).get("enabled", False)]
    stage = _section(raw, "zero_optimization").get("stage", 0)
    problems = []
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage ({stage}) must be 0, 1, 2 or 3")
    if len(enabled) == 2:
        problems.append("bf16 and fp16 are both enabled: choose one")
    elif enabled and stage == 0:
        problems.append(
            f"ZeRO stage 0 with {enabled[0]} trains wrongly in DeepSpeed: use zero_optimization.stage 1 "
            "(with one data-parallel rank it costs nothing)"
        )
    if "fp16" in enabled and not has_accelerator:
        problems.append("fp16 needs a GPU; there is none here: use bf16 or fp32")
    return problems


def _checkpoint_problems(raw: dict[str, Any]) -> list[str]:
    """Layouts of weights and moments that a checkpoint cannot be made from, or loaded into."""
    problems = [
        f"{name} ({json.dumps(value)}) cannot be saved to a checkpoint: remove it"
        for name, value in _NOT_CHECKPOINTABLE.items()
        if _setting(raw, name) == value
    ]
    ratio = _setting(raw, "zero_optimization.offload_optimizer.ratio")
    if ratio not in (None, 1):
        problems.append(f"zero_optimization.offload_optimizer.ratio ({ratio}) must be 1: offload all of it or nothing")
    for name in ("mics_shard_size", "zenflow"):
        value = _setting(raw, f"zero_optimization.{name}")
        if value not in (None, -1):
            problems.append(
                f"zero_optimization.{name} ({value}) partitions weights as no checkpoint supports: remove it"
            )
    return problems


def _nonfinite_problems(raw: dict[str, Any]) -> list[str]:
    return [
        f"{name} ({json.dumps(value)}) hides a gradient that is not finite, whose step must be skipped: remove it"
        for name, value in _HIDES_NONFINITE.items()
        if _setting(raw, name) == value
    ]


def _accumulation_problems(raw: dict[str, Any]) -> list[str]:
    name = "bf16.immediate_grad_update"
    value = _setting(raw, name)
    if value is None or value is True:
        return []
    return [f"{name} ({json.dumps(value)}): gradients are always accumulated as soon as they are ready: remove it"]


def _setting(raw: dict[str, Any], name: str) -> Any:
    """Return the value of a setting by its dotted name; None if it is not set."""
    value: Any = raw
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _precision(raw: dict[str, Any]) -> Literal["fp32", "bf16", "fp16"]:
    if _section(raw, "bf16").get("enabled", False):
        return "bf16"
    return "fp16" if _section(raw, "fp16").get("enabled", False) else "fp32"
