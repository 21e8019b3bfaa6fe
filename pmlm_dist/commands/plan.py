"""`pmlm plan`: make the plan, with `--device measure` from this machine's rates; print it and write it as JSON.

pmlm plan --preset large --nodes 8 --gpus-per-node 8 --device h100-80gb --parallel.tp 2 --zero 1 --batch.micro 60
torchrun --nproc_per_node 2 --no-python pmlm plan --preset tiny --device measure
"""

import dataclasses
import json
import os

import torch

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.devices import Device
from pmlm_dist.engine.deepspeed_config import load_engine_config
from pmlm_dist.files import raise_if_foreign, write_atomically
from pmlm_dist.launch_environment import threads_per_rank
from pmlm_dist.parallel import groups
from pmlm_dist.parallel.groups import Topology
from pmlm_dist.planning import report
from pmlm_dist.planning.measure import measure_device
from pmlm_dist.planning.plan import Plan, make_plan
from pmlm_dist.planning.settings import MEASURE, PlanConfig


def run(config: PlanConfig) -> None:
    """Plan `config`; print the plan and write it to `config.json`. Raises `ConfigError` for invalid settings."""
    if config.device != MEASURE:
        _output(make_plan(config))
        return
    topology = groups.init_process_groups()
    if config.gpus_per_node is None:
        config = dataclasses.replace(config, gpus_per_node=topology.world_size)
    raise_if_any(config.problems())
    plan = make_plan(config, measured=_measured(config, topology))
    if topology.is_rank_zero:
        _output(plan)


def _output(plan: Plan) -> None:
    report.show(plan)
    if plan.config.json:
        text = json.dumps(plan.as_dict(), indent=2) + "\n"
        raise_if_foreign(plan.config.json, mark=text.partition(":")[0].encode())
        plan.config.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(plan.config.json, text, durable=False)


def _measured(config: PlanConfig, topology: Topology) -> Device:
    """This machine's device, measured with as many threads per rank as the training uses."""
    if topology.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(os.environ, cores=len(os.sched_getaffinity(0))))
    has_accelerator = topology.device.type != "cpu"
    overrides = config.batch.overrides(zero=config.zero)
    engine = load_engine_config(config.ds_config, has_accelerator=has_accelerator, overrides=overrides)
    tokens = engine.micro_batch * config.context
    device = measure_device(engine.precision, topology, model=config.model, tokens=tokens)
    if config.gpus > 1 and topology.world_size == 1:
        if config.assume.link_gb_per_s is None:
            raise ConfigError(
                [
                    f"device measure cannot measure a link with one rank, and {config.gpus} ranks are planned: start "
                    "as many with torchrun --nproc_per_node N --no-python pmlm plan ..., or set --assume.link-gb-per-s"
                ]
            )
        device = dataclasses.replace(device, network=config.assume.link_gb_per_s * 1e9)
    return device
