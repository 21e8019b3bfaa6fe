"""DeepSpeed's JSON: shipped files load; settings that DeepSpeed would ignore or compute wrongly raise, all at once."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pmlm_dist.config import DS_CONFIGS, BatchConfig, ConfigError
from pmlm_dist.engine.deepspeed_config import EngineConfig, batch_problems, load_engine_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
VALID = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}


def load(folder: Path, raw: Any, *, has_accelerator: bool = False) -> EngineConfig:
    """Load `raw` from a file."""
    path = folder / "ds.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return load_engine_config(path, has_accelerator=has_accelerator)


def problems_of(folder: Path, raw: Any, *, has_accelerator: bool = False) -> list[str]:
    """Problems with which `raw` raises."""
    with pytest.raises(ConfigError) as caught:
        load(folder, raw, has_accelerator=has_accelerator)
    return caught.value.problems


def test_shipped_files_are_complete():
    names = ["base", "finetune", "large", "large_fp16", "tiny", "tiny_bf16", "zero3_offload"]
    assert [path.stem for path in SHIPPED] == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads(path: Path):
    raw = json.loads(path.read_text())
    engine = load_engine_config(path, has_accelerator=True)
    assert engine.raw == raw
    assert (engine.global_batch, engine.micro_batch) == (raw["train_batch_size"], raw["train_micro_batch_size_per_gpu"])
    assert engine.precision == next((name for name in ("bf16", "fp16") if name in raw), "fp32")
    assert engine.zero_stage == raw["zero_optimization"]["stage"]
    assert engine.offload_optimizer == ("offload" in path.stem)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_only_fp16_needs_an_accelerator(path: Path):
    if "fp16" not in path.stem:
        load_engine_config(path, has_accelerator=False)
        return
    with pytest.raises(ConfigError, match="fp16 needs a GPU; there is none here: use bf16 or fp32"):
        load_engine_config(path, has_accelerator=False)


@pytest.mark.parametrize(("name", "ranks"), [("base", (1, 8)), ("large", (1, 8, 16)), ("tiny", (1, 2))])
def test_shipped_batches_divide_over_their_intended_ranks(name: str, ranks: tuple[int, ...]):
    engine = load_engine_config(SHIPPED[0].parent / f"{name}.json", has_accelerator=True)
    for dp in ranks:
        assert batch_problems(engine, dp=dp) == []
        assert engine.accumulation(dp) * engine.micro_batch * dp == engine.global_batch


@pytest.mark.parametrize(
    ("section", "way_out"),
    [
        ("optimizer", "--optim."),
        ("scheduler", "--train.steps"),
        ("tensor_parallel", "--parallel.tp"),
        ("activation_checkpointing", "--model.activation-checkpointing"),
        ("checkpoint", "remove the section"),
        ("tensorboard", "RUN_DIR/tensorboard"),
        ("amp", "use bf16 or fp16"),
        ("aio", "no checkpoint can be made"),
    ],
)
def test_unsupported_section_raises_with_the_setting_to_use(tmp_path: Path, section: str, way_out: str):
    (problem,) = problems_of(tmp_path, {**VALID, section: {}})
    assert str(tmp_path / "ds.json") in problem
    assert f"`{section}`" in problem
    assert way_out in problem


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("train_batchsize", "train_batch_size"), ("bfloat16", "bf16"), ("gradient_cliping", "gradient_clipping")],
)
def test_unknown_setting_raises_with_the_closest_known_one(tmp_path: Path, wrong: str, meant: str):
    (problem,) = problems_of(tmp_path, {**VALID, wrong: 1})
    assert f"unknown setting `{wrong}`: did you mean `{meant}`?" in problem


def test_unknown_setting_without_a_close_match_raises(tmp_path: Path):
    (problem,) = problems_of(tmp_path, {**VALID, "zzz": 1})
    assert "unknown setting `zzz`: remove it" in problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, 'offload_optimizer.device ("nvme") cannot be saved'),
        ({"offload_param": {"device": "nvme"}}, 'zero_optimization.offload_param.device ("nvme") cannot be saved'),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload (true) cannot be saved"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio (0.5) must be 1"),
        ({"mics_shard_size": 2}, "zero_optimization.mics_shard_size (2) partitions weights"),
        ({"zenflow": {}}, "zero_optimization.zenflow ({}) partitions weights"),
    ],
)
def test_layout_without_checkpoint_support_raises(tmp_path: Path, changes: Any, problem: str):
    (message,) = problems_of(tmp_path, {**VALID, "zero_optimization": {"stage": 3, **changes}})
    assert problem in message


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_in_half_precision_raise(tmp_path: Path, precision: str):
    raw = {**VALID, precision: {"enabled": True, f"{precision}_master_weights_and_grads": True}}
    (message,) = problems_of(tmp_path, raw, has_accelerator=True)
    assert f"{precision}.{precision}_master_weights_and_grads (true) cannot be saved" in message


@pytest.mark.parametrize(
    ("section", "name"), [("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")]
)
def test_setting_that_hides_nonfinite_gradients_raises(tmp_path: Path, section: str, name: str):
    def stated(value: bool) -> dict[str, Any]:
        sections = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
        return {**VALID, **sections, section: {**sections[section], name: value}}

    load(tmp_path, stated(True))
    (message,) = problems_of(tmp_path, stated(False))
    assert f"{section}.{name} (false) hides a gradient that is not finite" in message


@pytest.mark.parametrize("value", [False, "banana"])
def test_immediate_grad_update_other_than_true_raises(tmp_path: Path, value: Any):
    def stated(value: Any) -> dict[str, Any]:
        return {**VALID, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True, "immediate_grad_update": value}}

    load(tmp_path, stated(True))
    (message,) = problems_of(tmp_path, stated(value))
    assert f"bf16.immediate_grad_update ({json.dumps(value)}): gradients are always accumulated" in message


def test_for_deepspeed_enables_immediate_grad_update_with_bf16(tmp_path: Path):
    bf16 = {**VALID, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    assert load(tmp_path, bf16).for_deepspeed()["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert "bf16" not in load(tmp_path, VALID).for_deepspeed()


@pytest.mark.parametrize("zero", [{"stage": 0}, {}, None])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_with_half_precision_raises(tmp_path: Path, precision: str, zero: dict[str, int] | None):
    raw = {**VALID, "zero_optimization": zero, precision: {"enabled": True}}
    if zero is None:
        del raw["zero_optimization"]
    (problem,) = problems_of(tmp_path, raw, has_accelerator=True)
    assert f"ZeRO stage 0 with {precision}" in problem
    assert "use zero_optimization.stage 1" in problem


def test_stage_0_in_fp32_is_accepted_and_disabled_sections_are_ignored(tmp_path: Path):
    engine = load(tmp_path, {**VALID, "zero_optimization": {"stage": 0}, "fp16": {"enabled": False}, "bf16": {}})
    assert (engine.zero_stage, engine.precision) == (0, "fp32")


def test_both_half_precisions_raise(tmp_path: Path):
    raw = {**VALID, "bf16": {"enabled": True}, "fp16": {"enabled": True}}
    (problem,) = problems_of(tmp_path, raw, has_accelerator=True)
    assert "choose one" in problem


@pytest.mark.parametrize("stage", [-1, 4, "1", True, None])
def test_stage_other_than_0_to_3_raises(tmp_path: Path, stage: Any):
    (problem,) = problems_of(tmp_path, {**VALID, "zero_optimization": {"stage": stage}})
    assert f"zero_optimization.stage ({stage}) must be 0, 1, 2 or 3" in problem


@pytest.mark.parametrize("size", [0, -8, 2.5, "auto", True, None])
@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu"])
def test_batch_size_that_is_no_positive_integer_raises(tmp_path: Path, key: str, size: Any):
    (problem,) = problems_of(tmp_path, {**VALID, key: size})
    assert f"`{key}` ({size}) must be a positive integer" in problem


@pytest.mark.parametrize("key", ["bf16", "fp16", "zero_optimization"])
@pytest.mark.parametrize("value", [True, 1, [], None])
def test_section_that_is_no_object_raises(tmp_path: Path, key: str, value: Any):
    (problem,) = problems_of(tmp_path, {**VALID, key: value})
    assert f"`{key}` ({value})" in problem


@pytest.mark.parametrize("value", ["false", 0, None, "auto"])
def test_enabled_other_than_true_or_false_raises(tmp_path: Path, value: Any):
    (problem,) = problems_of(tmp_path, {**VALID, "bf16": {"enabled": value}})
    assert f"bf16.enabled ({value!r}) must be true or false" in problem


@pytest.mark.parametrize("offload", [None, {}, {"device": "none"}])
def test_offload_explicitly_disabled_is_accepted(tmp_path: Path, offload: Any):
    assert not load(
        tmp_path, {**VALID, "zero_optimization": {"stage": 1, "offload_optimizer": offload}}
    ).offload_optimizer


def test_all_deepspeed_problems_are_reported_at_once(tmp_path: Path):
    raw = {"optimizer": {}, "train_batchsize": 8, "fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 0}
    problems = problems_of(tmp_path, raw)
    for expected in (
        "`optimizer`",
        "`train_batchsize`",
        "`train_batch_size`",
        "per_gpu` (0)",
        "stage 0",
        "needs a GPU",
    ):
        assert sum(expected in problem for problem in problems) >= 1, expected
    assert len(problems) == 6


@pytest.mark.parametrize("text", ["", "{", "{'train_batch_size': 8}", '{"train_batch_size": 8,}'])
def test_file_that_is_not_json_raises_with_its_path(tmp_path: Path, text: str):
    (problem,) = problems_of(tmp_path, text)
    assert f"{tmp_path / 'ds.json'}, line 1 is not JSON" in problem


def test_binary_file_raises(tmp_path: Path):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_engine_config(tmp_path / "ds.json", has_accelerator=False)


def test_json_list_raises(tmp_path: Path):
    (problem,) = problems_of(tmp_path, [VALID])
    assert "must hold one JSON object" in problem


def test_repeated_setting_raises(tmp_path: Path):
    (problem,) = problems_of(tmp_path, json.dumps(VALID)[:-1] + ', "train_batch_size": 16}')
    assert "`train_batch_size`" in problem


def test_missing_file_raises_with_the_setting_and_an_existing_file(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_engine_config(tmp_path / "nowhere.json", has_accelerator=False)
    (problem,) = caught.value.problems
    assert f"{tmp_path / 'nowhere.json'} does not exist" in problem
    assert "--ds-config" in problem
    shipped = re.search(r"ds_configs/\S+\.json", problem)
    assert shipped
    assert (SHIPPED[0].parent.parent / shipped[0]).is_file()


def test_wheel_and_checkout_have_the_same_files(tmp_path: Path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "pmlm_dist", project / "pmlm_dist", ignore=shutil.ignore_patterns("*.py[co]"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {Path(name).name: archive.read(name) for name in archive.namelist() if name.endswith(".json")}
    assert built == {path.name: path.read_bytes() for path in (ROOT / "ds_configs").glob("*.json")}
    assert (ROOT / "ds_configs").resolve() == DS_CONFIGS


def config_of(*, batch: int, micro: int, **extra: int) -> EngineConfig:
    """An engine configuration of these batch sizes."""
    raw = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, **extra}
    return EngineConfig(
        raw, batch, micro, precision="fp32", zero_stage=1, offload_optimizer=False, gradient_clipping=0.0
    )


def test_global_batch_is_accepted_exactly_when_it_divides_and_every_suggestion_divides():
    for batch, micro, dp in itertools.product(range(1, 25), range(1, 9), range(1, 7)):
        problems = batch_problems(config_of(batch=batch, micro=micro), dp=dp)
        assert bool(problems) == (batch % (micro * dp) != 0), (batch, micro, dp)
        for usable in itertools.chain.from_iterable(
            map(json.loads, re.findall(r"per_gpu one of (\[.*\])", "".join(problems)))
        ):
            assert batch_problems(config_of(batch=batch, micro=usable), dp=dp) == []


def test_batch_smaller_than_the_ranks_suggests_a_larger_one():
    (problem,) = batch_problems(config_of(batch=4, micro=1), dp=3)
    assert "use --batch.global with a multiple of 3" in problem


def test_stated_accumulation_must_agree_with_the_batch_sizes():
    assert batch_problems(config_of(batch=24, micro=2, gradient_accumulation_steps=4), dp=3) == []
    (problem,) = batch_problems(config_of(batch=24, micro=2, gradient_accumulation_steps=6), dp=3)
    assert "gradient_accumulation_steps (6) contradicts" in problem
    assert "= 4: remove it" in problem


def test_batch_overrides_replace_the_accumulation_of_the_file(tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**VALID, "gradient_accumulation_steps": 2}))
    overrides = BatchConfig(48, 6).overrides(zero=2)
    engine = load_engine_config(path, has_accelerator=False, overrides=overrides)
    assert (engine.global_batch, engine.micro_batch, engine.zero_stage) == (48, 6, 2)
    assert batch_problems(engine, dp=2) == []
    assert BatchConfig().overrides(zero=None) == {}


@pytest.mark.parametrize("value", [-1, "1", True, None])
def test_gradient_clipping_that_is_no_number_raises(tmp_path, value):
    (problem,) = problems_of(tmp_path, {**VALID, "gradient_clipping": value})
    assert "`gradient_clipping`" in problem


@pytest.mark.parametrize(("stage", "stated", "passed"), [(1, None, 0.0), (1, 0.5, 0.5), (0, None, 0.0), (0, 0.5, 0.0)])
def test_for_deepspeed_never_applies_the_default_clipping(tmp_path, stage, stated, passed):
    """DeepSpeed's default is 1; with ZeRO-0 `optimizer_step` clips."""
    raw: dict[str, Any] = {**VALID, "zero_optimization": {"stage": stage}}
    if stated is not None:
        raw["gradient_clipping"] = stated
    engine = load(tmp_path, raw)
    assert engine.for_deepspeed()["gradient_clipping"] == passed
    assert engine.gradient_clipping == (stated or 0.0)
