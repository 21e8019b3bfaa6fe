"""A checkpoint opens on any topology: every pair of topologies up to 4 ranks, bit for bit, and training continues."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import run_config, start_run, take_steps, train, whole_weights
from support.worlds import run_world

from pmlm_dist.checkpoint.files import KINDS, CheckpointReader, read_state, read_weights
from pmlm_dist.config import RunConfig

pytestmark = [pytest.mark.distributed, pytest.mark.full]  # every test needs checkpoints of all topologies

BEFORE, AFTER = 2, 3
ROW_PARALLEL = ("attention.output.weight", "ffn_out.weight")  # split along their input
WORLDS = [(tp, dp) for tp, dp in itertools.product((1, 2, 4), (1, 2, 4)) if tp * dp <= 4]


@dataclass(frozen=True)
class Topology:
    """Parallelism and precision of a run."""

    tp: int
    dp: int
    zero: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.precision}-tp{self.tp}-dp{self.dp}-zero{self.zero}"


FP32 = [Topology(tp, dp, zero) for tp, dp in WORLDS for zero in (1, 2, 3)] + [Topology(1, 2, 0), Topology(2, 2, 0)]
BF16 = [Topology(tp, 2, zero, "bf16") for tp in (1, 2) for zero in (1, 2, 3)]


def config_of(topology: Topology, corpus: Path, folder: Path) -> RunConfig:
    """A run of 5 steps on `topology`; the global batch is 8 everywhere."""
    config = run_config(
        corpus,
        folder / str(topology),
        steps=BEFORE + AFTER,
        tp=topology.tp,
        zero=topology.zero,
        precision=topology.precision,
        micro_batch=8 // topology.dp,
    )
    return replace(config, data=replace(config.data, lanes=8))


def whole_state(engine: Any) -> dict[str, np.ndarray]:
    """Masters, moments and model weights of this rank's slices, gathered by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(
        engine.optimizer, "_lazy_init_hp_params_optimizer_state"
    ):  # DeepSpeed links only the first group by itself
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            state = engine.optimizer.state[parameter]
            parts = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
        else:
            moments = [safe_get_full_optimizer_state(parameter, kind) for kind in KINDS[1:]]
            parts = [safe_get_full_fp32_param(parameter), *moments]
        for kind, part in zip(KINDS, parts, strict=True):
            assert part is not None, (kind, name)
            tensors[f"{kind}/{name}"] = part.clone()
    tensors |= {f"model/{name}": weight for name, weight in whole_weights(engine.module).items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def check_filled(engine_state: Any, expected: Any, *, where: str) -> None:
    """Check that this rank holds its part of `expected` (full tensors as of `whole_state`) bit for bit."""
    tp, tp_rank = engine_state.topology.tp, engine_state.topology.tp_rank
    for owned in engine_state.owned_fragments():
        fragment = owned.fragment
        for kind, tensor in owned.tensors.items():
            whole = expected[f"{kind}/{fragment.name}"]
            own = slice_of(whole, fragment.name, not fragment.spans_dim, tp=tp, tp_rank=tp_rank)
            assert np.array_equal(tensor.numpy(), own.reshape(-1)[fragment.start : fragment.stop]), (
                where,
                kind,
                fragment.name,
            )
    for name, weight in whole_weights(engine_state.model).items():
        whole = expected[f"model/{name}"]
        own = slice_of(whole, name, weight.shape != whole.shape, tp=tp, tp_rank=tp_rank)
        assert np.array_equal(weight.numpy(), own), (where, "model", name)


def slice_of(whole: np.ndarray, name: str, is_sliced: bool, *, tp: int, tp_rank: int) -> np.ndarray:
    """The slice of a full tensor that tensor-parallel rank `tp_rank` holds."""
    return np.split(whole, tp, axis=1 if name.endswith(ROW_PARALLEL) else 0)[tp_rank] if is_sliced else whole


def assemble(answers: list[dict[str, np.ndarray]], *, tp: int) -> dict[str, np.ndarray]:
    """Full tensors from the slices of the first `tp` ranks."""
    sharded = {name for name, part in answers[0].items() if tp > 1 and is_sharded(name)}
    return {
        name: np.concatenate([answer[name] for answer in answers[:tp]], axis=1 if name.endswith(ROW_PARALLEL) else 0)
        if name in sharded
        else part
        for name, part in answers[0].items()
    }


def is_sharded(name: str) -> bool:
    column = ("query.weight", "query.bias", "key_value.weight", "key_value.bias", "ffn_in.weight", "ffn_in.bias")
    return name.endswith((*column, *ROW_PARALLEL, "token.weight", "head.bias")) or "relative_bias" in name


def checkpointer_of(run: Any, engine: Any) -> tuple[Any, Any]:
    """Return the engine's state and a checkpointer into the run's folder."""
    from pmlm_dist.checkpoint.async_save import AsyncCheckpointer
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.folder import CheckpointFolder
    from pmlm_dist.metrics.run_log import RunLog

    state = EngineState(engine, run.topology)
    log = RunLog(run.config.run_dir, enabled=False, first_step=0)
    metadata = {"identity": run.identity(), "configuration": run.configuration()}
    return state, AsyncCheckpointer(
        state, CheckpointFolder(run.checkpoints, keep=9), log, metadata=metadata, timeout_s=60
    )


def train_and_save(configs: list[RunConfig]) -> list[dict[str, np.ndarray]]:
    """Train each of `configs` for `BEFORE` steps and save it; return the state of its engine on this rank."""
    from pmlm_dist.checkpoint.resume import RunState
    from pmlm_dist.training.pretraining import build_engine

    answers = []
    for config in configs:
        run = start_run(config)
        engine = build_engine(run)
        state, _, _ = take_steps(run, engine, RunState(), steps=BEFORE)
        _, checkpointer = checkpointer_of(run, engine)
        checkpointer.save(state)
        checkpointer.close()
        answers.append(whole_state(engine))
    return answers


@dataclass(frozen=True)
class Source:
    """A checkpoint, and a file with the engine's full tensors at the time of the save."""

    topology: Topology
    path: Path
    expected: Path


def write_sources(corpus: Path, folder: Path, topologies: list[Topology]) -> dict[Topology, Source]:
    """Write a checkpoint of step `BEFORE` with each of `topologies`."""
    sources = {}
    for tp, dp in sorted({(topology.tp, topology.dp) for topology in topologies}):
        here = [topology for topology in topologies if (topology.tp, topology.dp) == (tp, dp)]
        configs = [config_of(topology, corpus, folder) for topology in here]
        answers = run_world(train_and_save, tp * dp, configs)
        for number, (topology, config) in enumerate(zip(here, configs, strict=True)):
            expected = folder / f"{topology}.npz"
            whole: dict[str, Any] = assemble([answer[number] for answer in answers], tp=tp)
            np.savez(expected, **whole)
            sources[topology] = Source(topology, config.run_dir / "checkpoints" / f"step-{BEFORE:08d}", expected)
    return sources


@pytest.fixture(scope="module")
def sources(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Topology, Source]:
    """Written by separate processes: stage 3 replaces `torch.nn.functional.linear` for the rest of a process."""
    folder = tmp_path_factory.mktemp("sources")
    return write_sources(small_corpus, folder, FP32) | write_sources(small_corpus, folder, BF16)


def open_all(configs: list[RunConfig], sources: list[Source], continued: list[list[bool]]) -> list[list[Any]]:
    """Load every source into one engine for each configuration, compare all tensors, continue where `continued`.

    Returns losses and norms of the later steps, by configuration.
    """
    from pmlm_dist.checkpoint.engine_state import EngineState
    from pmlm_dist.checkpoint.resume import load_checkpoint
    from pmlm_dist.training.pretraining import build_engine

    answers: list[list[Any]] = []
    for config, trained in zip(configs, continued, strict=True):
        run = start_run(config)
        engine = build_engine(run)
        engine_state, of_target = EngineState(engine, run.topology), []
        for source, on in zip(sources, trained, strict=True):
            with CheckpointReader(source.path) as reader:
                engine_state.restore(reader, read_state(source.path)["counters"])
            with np.load(source.expected) as expected:
                check_filled(engine_state, expected, where=f"{source.topology} on {config.run_dir.name}")
            assert engine_state.counters()["adam_step"] == engine.global_steps == BEFORE
            if not on:
                continue
            state = load_checkpoint(engine_state, source.path)  # compares fingerprints too
            assert state.samples_consumed == 8 * BEFORE
            of_target.append(take_steps(run, engine, state, steps=AFTER)[1:])
        answers.append(of_target)
    return answers


def is_continued(source: Topology, target: Topology, topologies: list[Topology]) -> bool:
    """Whether a pair also continues training: each source and target once, and some that DeepSpeed cannot load."""
    number, count = topologies.index(source), len(topologies)
    is_sampled = topologies.index(target) == (7 * number + 3) % count
    cannot = (source.zero, target.zero) == (1, 3) or (source.zero == 3 and target.tp == 2)
    return is_sampled or (cannot and (number + topologies.index(target)) % 5 == 0)


def open_everywhere(
    world: tuple[int, int], topologies: list[Topology], sources: dict[Topology, Source], corpus: Path, folder: Path
) -> list[tuple[list[float], list[float]]]:
    """Open every source on every topology of `world`; return losses and norms of the continued ones."""
    here = [topology for topology in topologies if (topology.tp, topology.dp) == world]
    plan = [[is_continued(source, target, topologies) for source in topologies] for target in here]
    configs = [config_of(topology, corpus, folder) for topology in here]
    chosen = [sources[topology] for topology in topologies]
    answers = run_world(open_all, world[0] * world[1], configs, chosen, plan, timeout_s=300)
    assert all(answer == answers[0] for answer in answers), "ranks disagree"
    return [outcome for of_target in answers[0] for outcome in of_target]


@pytest.fixture(scope="module")
def uninterrupted(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run without interruption, on one rank, by precision."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        topology.precision: run_world(train, 1, config_of(topology, small_corpus, folder))[0]
        for topology in (Topology(1, 1, 1), Topology(1, 1, 1, "bf16"))
    }


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"tp{world[0]}-dp{world[1]}")
@pytest.mark.fault("F35", "F36", "F37")
def test_every_fp32_topology_opens_checkpoints_of_every_other(small_corpus, tmp_path, sources, uninterrupted, world):
    outcomes = open_everywhere(world, FP32, sources, small_corpus, tmp_path)
    assert len(outcomes) >= 4
    reference = uninterrupted["fp32"]
    for losses, norms in outcomes:
        np.testing.assert_allclose(losses, reference.losses[BEFORE:], rtol=5e-6)
        np.testing.assert_allclose(norms, reference.norms[BEFORE:], rtol=1e-5)


@pytest.mark.parametrize("world", [(1, 2), (2, 2)], ids=lambda world: f"tp{world[0]}-dp{world[1]}")
def test_every_bf16_topology_opens_checkpoints_of_every_other(small_corpus, tmp_path, sources, uninterrupted, world):
    """bf16 rounds to 8 bits, so sums in another order differ; loaded tensors are equal bit for bit."""
    reference = uninterrupted["bf16"]
    for losses, norms in open_everywhere(world, BF16, sources, small_corpus, tmp_path):
        np.testing.assert_allclose(losses, reference.losses[BEFORE:], rtol=1e-3)
        np.testing.assert_allclose(norms, reference.norms[BEFORE:], rtol=2e-2)


def test_read_weights_returns_the_full_weights_of_any_topology(sources):
    for topology, source in sources.items():
        with np.load(source.expected) as expected:
            weights = read_weights(source.path)
            assert {f"weight/{name}" for name in weights} == {name for name in expected if name.startswith("weight/")}
            for name, weight in weights.items():
                assert np.array_equal(weight, expected[f"weight/{name}"][: len(weight)]), (str(topology), name)
            assert (
                len(weights["embeddings.token.weight"]) == len(weights["head.bias"]) == 125
            )  # not the 128 padded rows


def test_rank_files_hold_each_element_once_and_are_of_even_size(sources):
    for topology, source in sources.items():
        files = sorted(source.path.glob("*.safetensors"))
        with np.load(source.expected) as expected:
            needed = 4 * sum(expected[name].size for name in expected if not name.startswith("model/"))
        headers = [8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files]
        sizes = [file.stat().st_size - header for file, header in zip(files, headers, strict=True)]
        assert sum(sizes) == needed
        assert len(files) == topology.tp * topology.dp
        assert max(sizes) < 1.25 * needed / len(files), (str(topology), sizes)
