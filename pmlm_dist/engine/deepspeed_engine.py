"""The DeepSpeed engine: how it is built around a model, and one update of its weights.

Pre-training (`training/loop.py`) and fine-tuning (`downstream/finetune.py`) train with the same.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ValidationError
from torch import nn

from pmlm_dist.config import ConfigError, OptimConfig
from pmlm_dist.engine.bf16_optimizer import SummingBF16Optimizer
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.engine.extension_build import build_lock
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.engine.optimizer import clip_or_drop_gradients, gradient_norm, parameter_groups
from pmlm_dist.model.transformer import PseudoMaskedLM
from pmlm_dist.parallel.groups import ModelParallelUnit, Topology
from pmlm_dist.training.guards import check_engine


def initialize_engine(
    model: PseudoMaskedLM,
    *,
    optim: OptimConfig,
    config: EngineConfig,
    topology: Topology,
    keep_memory: bool = True,
) -> DeepSpeedEngine:
    """Optimizer and engine of `model`, whose weights are drawn; every rank must call.

    `keep_memory`: on a CPU, whether the process keeps freed memory (engine/malloc.py). Raises `ConfigError` on
    every rank when DeepSpeed does not know, or cannot read, a setting inside a section of its JSON.
    """
    # Training does not use this op; compiling it takes a lock that a killed rank leaves behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that DeepSpeed uses
    if topology.device.type == "cpu":
        keep_freed_memory(keep=keep_memory)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=lambda _: _optimizer(model, optim=optim, config=config),  # made once the JSON has been read
            config=config.for_deepspeed(),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    except ValidationError as error:
        raise ConfigError(_setting_problems(error, config.raw)) from error
    check_engine(engine.dp_world_size, topology)
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.__class__ = SummingBF16Optimizer  # DeepSpeed lets nobody name the class
    if config.zero_stage == 0 or isinstance(optimizer, SummingBF16Optimizer):
        engine.enable_backward_allreduce = topology.dp > 1  # one rank would copy all gradients to and fro for nothing
    return engine


def _setting_problems(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """What DeepSpeed says against settings inside sections, each with its whole name."""
    found = []
    for problem in error.errors():
        names = [str(part) for part in problem["loc"]]
        if not names:  # it holds of several settings together, and names them
            found.append(f"DeepSpeed's JSON (--ds-config): {problem['msg']}")
            continue
        sections = [name for name, section in raw.items() if isinstance(section, dict) and names[0] in section]
        name, value = ".".join([*sections[:1], *names]), json.dumps(problem["input"], default=str)
        unknown = problem["type"] == "extra_forbidden"
        reason = "DeepSpeed knows no such setting: correct its name or remove it" if unknown else problem["msg"]
        found.append(f"{name} ({value}) in DeepSpeed's JSON (--ds-config): {reason}")
    return found


def _optimizer(model: PseudoMaskedLM, *, optim: OptimConfig, config: EngineConfig) -> torch.optim.Optimizer:
    parameters = parameter_groups(model, weight_decay=optim.weight_decay)
    betas = (optim.beta1, optim.beta2)
    if config.offload_optimizer:
        # Unless it was installed compiled DeepSpeed does that now, with the ninja that pip put beside this interpreter.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        with nullcontext() if installed_ops.get("cpu_adam") else build_lock():
            return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, lr=optim.peak_lr, betas=betas, eps=optim.eps)
    return torch.optim.AdamW(parameters, lr=optim.peak_lr, betas=betas, eps=optim.eps, fused=True)


def optimizer_step(engine: DeepSpeedEngine, config: EngineConfig, topology: Topology, *, is_boundary: bool) -> float:
    """Let the engine step. At a boundary of accumulation weights change, unless the gradient's norm is not finite.

    Returns the norm, NaN where there is none yet.
    """
    if config.zero_stage == 0 and is_boundary:  # DeepSpeed neither knows a norm then nor looks for infinities
        _fill_gradients(module_of(engine))
        norm = gradient_norm(module_of(engine), topology)
        clip_or_drop_gradients(module_of(engine), norm=norm, largest=config.gradient_clipping)
        engine.step()
        return norm
    engine.step()
    norm = engine.get_global_grad_norm() if is_boundary else None
    overflown = is_boundary and getattr(engine.optimizer, "overflow", False)
    return math.nan if norm is None or overflown else float(norm)


def _fill_gradients(model: nn.Module) -> None:
    """Give parameters that the loss did not reach, a head not in use, gradients of zero, as ZeRO does by itself."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 matrices on `device` by more than single numbers.

    On a CPU it needs AVX-512 for that, or what came later; without, a product took 200 times as long as in fp32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def module_of(engine: DeepSpeedEngine) -> nn.Module:
    """The model in the engine."""
    assert isinstance(engine.module, nn.Module)
    return engine.module


@contextmanager
def gathered_module(engine: nn.Module, build: Callable[[], nn.Module]) -> Iterator[Any]:
    """The model in an engine, in evaluation mode and with whole weights, for calling its parts one by one.

    With ZeRO-3, which gathers weights only while the whole is called, it is a copy in a fresh module that `build`
    makes; every rank must call then.
    """
    if not isinstance(engine, DeepSpeedEngine) or engine.zero_optimization_stage() < 3:
        yield engine.module if isinstance(engine, DeepSpeedEngine) else engine
        return
    own = module_of(engine)
    copy = build().to(device=engine.device, dtype=next(own.parameters()).dtype).eval()
    for to, parameter in zip(copy.parameters(), own.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            to.data.copy_(parameter.data)
    yield copy
