"""Imported once by the fork server of a test session: all that a rank would otherwise load or compile at its start.

    pytest --starts once--> fork server --imports--> this module
                                 `-- forks --> rank, rank, ...      each with modules, numba's code and probes in place

Nothing here may start a thread or a process group: neither survives a fork.
"""

import gc
from importlib import import_module

import cpuinfo
import torch

from support.batches import random_batch

# DeepSpeed and megatron-core import some of these only when an engine is built.
MODULES = (
    "pytest",  # by every module of tests that a function comes from
    "hypothesis",
    "pmlm_dist.training.run",
    "pmlm_dist.downstream.finetune",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._subclasses.schema_check_mode",
    "torch.profiler",
)


def warm_up() -> None:
    """Load what ranks share; afterwards the collector passes over it, so that forks neither scan nor copy it."""
    torch.set_num_threads(1)
    for name in MODULES:
        import_module(name)
    import deepspeed.ops

    _ = deepspeed.ops.__compatible_ops__  # runs a compiler to see which extensions could be built
    # DeepSpeed asks three times for each rank with CPU Adam, for a second each: a process and its subprocesses.
    cpu = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: cpu
    random_batch()  # loads the masking's machine code from numba's cache
    gc.collect()
    gc.freeze()


warm_up()
