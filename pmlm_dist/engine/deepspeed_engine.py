"""DeepSpeed engine: construction around a model, and one optimizer step. Pre-training and fine-tuning share it."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from pydantic import ValidationError
from torch import nn

from pmlm_dist.config import ConfigError, OptimConfig
from pmlm_dist.engine.bf16_optimizer import SummingBF16Optimizer
from pmlm_dist.engine.deepspeed_config import EngineConfig
from pmlm_dist.engine.extension_build import build_lock
from pmlm_dist.engine.malloc import keep_freed_memory
from pmlm_dist.engine.optimizer import parameter_groups
from pmlm_dist.model.transformer import Layer, PseudoMaskedLM
from pmlm_dist.parallel.groups import ModelParallelUnit, Topology


def initialize_engine(
    model: PseudoMaskedLM, *, optim: OptimConfig, config: EngineConfig, topology: Topology, keep_memory: bool = True
) -> DeepSpeedEngine:
    """Return the engine of an initialized `model`, with its optimizer; every rank must call.

    `keep_memory`: on a CPU, whether the process keeps freed memory (engine/malloc.py). Raises `ConfigError` on every
    rank when a setting inside a section of DeepSpeed's JSON is unknown or invalid.
    """
    # Training does not use this op. Compiling it takes a lock file that a killed rank would leave behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names used by DeepSpeed
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # prints 18 lines at every start; there is no setting
    if topology.device.type == "cpu":
        keep_freed_memory(keep=keep_memory)
    if config.zero_stage == 3:
        # A layer is gathered as a whole: its kernels take parameters of several of its modules at once.
        deepspeed.utils.set_z3_leaf_modules(model, [Layer])
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=lambda _: _optimizer(model, optim=optim, config=config),  # called after the JSON is validated
            config=config.for_deepspeed(),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    except ValidationError as error:
        raise ConfigError(_setting_problems(error, config.raw)) from error
    if config.zero_stage == 3:
        # Used outside of their modules. DeepSpeed notices that only while they are partitioned: a run that resumes with
        # them gathered would record another order of gathers than it needs afterwards, and end.
        outside = [model.embeddings.token, *([] if model.relative_bias is None else [model.relative_bias])]
        for module in outside:
            deepspeed.zero.register_external_parameter(model, module.weight)
    _check_groups(engine, topology)
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        SummingBF16Optimizer.replace(engine, topology)
    if config.zero_stage == 0 or isinstance(optimizer, SummingBF16Optimizer):
        engine.enable_backward_allreduce = topology.dp > 1  # a single rank would only copy its gradients
    return engine


def _check_groups(engine: DeepSpeedEngine, topology: Topology) -> None:
    """Check that the engine averages gradients over the data-parallel ranks, by their number."""
    if engine.dp_world_size != topology.dp:
        raise RuntimeError(
            f"DeepSpeed averages gradients over {engine.dp_world_size} ranks, but {topology.dp} are data-parallel "
            f"(tensor-parallel size {topology.tp}): it was not given the groups (mpu) of this topology"
        )


def _setting_problems(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """Return DeepSpeed's complaints about settings inside sections, each with the dotted name of the setting."""
    problems = []
    for problem in error.errors():
        names = [str(part) for part in problem["loc"]]
        if not names:  # a constraint on several settings, named in the message
            problems.append(f"DeepSpeed's JSON (--ds-config): {problem['msg']}")
            continue
        sections = [name for name, section in raw.items() if isinstance(section, dict) and names[0] in section]
        name, value = ".".join([*sections[:1], *names]), json.dumps(problem["input"], default=str)
        unknown = problem["type"] == "extra_forbidden"
        reason = "DeepSpeed has no such setting: correct its name or remove it" if unknown else problem["msg"]
        problems.append(f"{name} ({value}) in DeepSpeed's JSON (--ds-config): {reason}")
    return problems


def _optimizer(model: PseudoMaskedLM, *, optim: OptimConfig, config: EngineConfig) -> torch.optim.Optimizer:
    parameters = parameter_groups(model, weight_decay=optim.weight_decay)
    betas = (optim.beta1, optim.beta2)
    if config.offload_optimizer:
        # DeepSpeed compiles CPU Adam now unless it was installed precompiled. Pip puts ninja beside this interpreter.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        with nullcontext() if installed_ops.get("cpu_adam") else build_lock():
            return deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, lr=optim.peak_lr, betas=betas, eps=optim.eps)
    return torch.optim.AdamW(parameters, lr=optim.peak_lr, betas=betas, eps=optim.eps, fused=True)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether torch has vectorized bf16 matrix products on `device`.

    On a CPU this needs AVX-512 or newer; without it a product took 200 times as long as in fp32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def module_of(engine: DeepSpeedEngine) -> nn.Module:
    """Return the model in the engine."""
    assert isinstance(engine.module, nn.Module)
    return engine.module


@contextmanager
def gathered_module(engine: nn.Module, build: Callable[[], nn.Module]) -> Iterator[Any]:
    """Yield the model in an engine with full weights, so that its submodules can be called one by one.

    ZeRO-3 gathers weights only while the whole model is called. Then a copy in a new module from `build` is yielded, in
    evaluation mode, and every rank must call.
    """
    if not isinstance(engine, DeepSpeedEngine) or engine.zero_optimization_stage() < 3:
        yield engine.module if isinstance(engine, DeepSpeedEngine) else engine
        return
    own = module_of(engine)
    copy = build().to(device=engine.device, dtype=next(own.parameters()).dtype).eval()
    for target, parameter in zip(copy.parameters(), own.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):  # one at a time: a full second model may not fit
            target.data.copy_(parameter.data)
    yield copy
