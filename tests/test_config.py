"""Settings: every mistake is reported, all of them at once, and every fix that a message suggests is valid."""

import ast
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, get_args, get_type_hints

import pytest
from support.worlds import run_world

from pmlm_dist import config as config_module
from pmlm_dist.config import (
    ConfigError,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
    as_dict,
    raise_if_any,
)
from pmlm_dist.presets import PRESETS, base, large, tiny
from pmlm_dist.relations import problems


def changed(config: Any, name: str, value: Any) -> Any:
    """`config` with the setting of dotted name `name` replaced."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def leaves(config: Any, types: tuple[type, ...]) -> list[str]:
    """Dotted names of all settings that may hold one of `types`."""
    hints = get_type_hints(type(config))
    names = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            names += [f"{item.name}.{name}" for name in leaves(value, types)]
        elif not isinstance(value, Mapping) and {*get_args(hints[item.name]), hints[item.name]} & set(types):
            names.append(item.name)
    return names


NUMBERS = leaves(RunConfig(), (int, float))
REALS = leaves(RunConfig(), (float,))


def test_lists_of_settings_are_not_empty():
    assert "train.stop_at" in NUMBERS
    assert "optim.beta2" in REALS
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_number_is_reported(name: str):
    reported = problems(changed(RunConfig(), name, -1))
    assert any(problem.count(f"{name.rstrip('_')} (-1)") for problem in reported), reported


@pytest.mark.parametrize("name", REALS)
def test_nan_is_reported(name: str):
    reported = problems(changed(RunConfig(), name, float("nan")))
    assert any(problem.startswith(f"{name} (nan)") for problem in reported), reported


@pytest.mark.parametrize(
    ("name", "value", "constraint"),
    [
        ("model.num_heads", 7, "must divide model.hidden_size (768)"),
        ("model.relative_buckets", 30, "multiple of 4: use 32"),
        ("model.relative_max_distance", 8, "must exceed a quarter of model.relative_buckets (8): use 128"),
        ("model.hidden_dropout", 1.0, "below 1"),
        ("masking.rate", 0.0, "above 0 and at most 0.5"),
        ("masking.rate", 0.51, "above 0 and at most 0.5"),
        ("masking.min_span", 1, "2 <= min_span <= max_span: the paper uses 2 and 6"),
        ("masking.max_span", 1, "2 <= min_span <= max_span: the paper uses 2 and 6"),
        ("masking.span_probability", 1.5, "between 0 and 1"),
        ("masking.prefix_share", -0.1, "between 0 and 1"),
        ("optim.warmup_steps", 500_000, "must be below train.steps (500000)"),
        ("optim.beta2", 1.0, "below 1"),
        ("optim.peak_lr", 0.0, "positive"),
        ("data.sources", {"a": 0.0, "b": 1.0}, "weights must be positive"),
        ("data.sources", {"a": 1e-4, "b": 1.0}, "at least a thousandth of their sum"),
        ("data.sources", {"a": float("inf")}, "weights must be positive"),
        ("data.lanes", 0, "must be positive, or None"),
        ("train.stop_at", 0, "must be positive, or None"),
        ("parallel.tp", 5, "must divide model.num_heads (12): use one of"),
        ("parallel.tp", 3, "must divide 128"),
    ],
)
def test_problem_names_setting_value_and_constraint(name: str, value: float, constraint: str):
    (problem, *_) = problems(changed(RunConfig(), name, value))
    assert f"{name} ({value})" in problem
    assert constraint in problem


@pytest.mark.parametrize(
    ("name", "value"), [("masking.rate", 0.5), ("optim.warmup_steps", 0), ("train.stop_at", None), ("data.workers", 0)]
)
def test_edge_of_a_range_is_valid(name: str, value: float | None):
    assert problems(changed(RunConfig(), name, value)) == []


@pytest.mark.parametrize(
    ("kind", "ae_weight", "par_weight", "reported"),
    [
        ("ae", 0.0, 1.0, {"ae"}),
        ("par", 1.0, 0.0, {"par"}),
        ("ar", 1.0, 0.0, {"par"}),
        ("ae+par", 0.0, 0.0, {"ae", "par"}),
        ("ae+ar", 0.0, 0.0, {"ae", "par"}),
        ("ae+par", 0.0, 1.0, set()),
        ("ae+ar", 1.0, 0.0, set()),
        ("ar", 0.0, 0.5, set()),
    ],
)
def test_objective_without_weight_is_reported(kind: Any, ae_weight: float, par_weight: float, reported: set[str]):
    objective = ObjectiveConfig(kind=kind, ae_weight=ae_weight, par_weight=par_weight)
    messages = problems(replace(RunConfig(), objective=objective))
    assert len(messages) == bool(reported)
    assert set(re.findall(r"objective\.(\w+)_weight \(0.0\)", "".join(messages))) == reported


def test_prefix_samples_need_an_objective_that_predicts_them():
    masking = replace(RunConfig().masking, prefix_share=0.5)
    config = replace(RunConfig(), masking=masking, objective=ObjectiveConfig(kind="ae"))
    (problem,) = problems(config)
    assert "masking.prefix_share (0.5)" in problem
    assert "objective.kind" in problem
    assert problems(replace(config, objective=ObjectiveConfig(kind="par"))) == []


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "value"), [("parallel.tp", 5), ("parallel.tp", 7), ("model.num_heads", 7)])
def test_every_value_that_a_message_suggests_is_valid(preset: str, name: str, value: int):
    invalid = changed(PRESETS[preset](), name, value)
    lists = [json.loads(text) for problem in problems(invalid) for text in re.findall(r"use one of (\[.*?\])", problem)]
    for usable in set.intersection(*(set(numbers) for numbers in lists)):
        assert problems(changed(invalid, name, usable)) == []


def test_all_problems_are_raised_at_once_one_a_line():
    invalid = RunConfig(
        model=ModelConfig(num_heads=7, relative_buckets=30, hidden_dropout=2.0),
        masking=MaskingConfig(rate=0.9, min_span=1),
        parallel=ParallelConfig(tp=3),
    )
    invalid = changed(changed(invalid, "train.steps", 10), "data.prefetch", 0)
    reported = problems(invalid)
    expected = [
        "model.num_heads (7)",
        "model.relative_buckets (30)",
        "model.hidden_dropout (2.0)",
        "masking.rate (0.9)",
        "masking.min_span (1)",
        "parallel.tp (3) must divide model.num_heads",
        "parallel.tp (3) must divide 128",
        "optim.warmup_steps (24000)",
        "data.prefetch (0)",
    ]
    assert len(reported) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in reported) == 1, start
    with pytest.raises(ConfigError) as caught:
        raise_if_any(reported)
    assert caught.value.problems == reported
    assert len(str(caught.value).splitlines()) == len(reported)


def test_no_problems_raise_nothing():
    raise_if_any([])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_its_engine_json_exists(name: str):
    preset = PRESETS[name]()
    assert problems(preset) == []
    assert preset.ds_config.is_absolute()  # a run starts in any folder
    assert preset.ds_config.is_file()


def test_base_preset_equals_the_published_recipe():
    """UniLMv2, section 4.1 of the paper."""
    published = {
        "model.num_layers": 12,
        "model.hidden_size": 768,
        "model.num_heads": 12,
        "model.ffn_size": 3072,
        "model.hidden_dropout": 0.1,
        "model.relative_buckets": 32,
        "masking.rate": 0.15,
        "masking.span_probability": 0.4,
        "masking.min_span": 2,
        "masking.max_span": 6,
        "optim.peak_lr": 6e-4,
        "optim.warmup_steps": 24_000,
        "optim.beta1": 0.9,
        "optim.beta2": 0.98,
        "optim.eps": 1e-6,
        "optim.weight_decay": 0.01,
        "train.steps": 500_000,
    }
    assert {name: attrgetter(name)(base()) for name in published} == published


def test_as_dict_is_json_and_has_every_setting():
    plain = json.loads(json.dumps(as_dict(tiny())))
    for name in leaves(tiny(), (int, float, str, bool)):
        value = plain
        for part in name.split("."):
            value = value[part]
        assert value == attrgetter(name)(tiny())
    assert plain["corpus"] == "data/demo"


def test_every_setting_has_a_help_text():
    """A string literal below each annotated field: it is the command line's help."""
    tree = ast.parse(inspect.getsource(config_module))
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for item, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation).endswith("Config"):
                continue
            assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(item.target)}"
            assert isinstance(following.value, ast.Constant)


def parameter_counts() -> dict[str, int]:
    """Parameters of each preset with the size of its usual vocabulary; runs in a world of one rank."""
    import torch

    from pmlm_dist.model.transformer import build_model
    from pmlm_dist.parallel import groups

    groups.init_process_groups()
    counts = {}
    for preset, vocabulary in ((base(), 30_522), (large(), 30_522), (tiny(), 8_192)):
        with torch.device("meta"):
            padded = -(-vocabulary // 128) * 128
            model = build_model(replace(preset.model, vocab_size=vocabulary), padded_vocab_size=padded)
        counts[preset.ds_config.stem] = sum(parameter.numel() for parameter in model.parameters())
    return counts


def bert_parameters(model: ModelConfig, *, vocabulary: int) -> int:
    """Parameters of Hugging Face's BERT with a masked-LM head and the shape of `model`."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    with torch.device("meta"):
        bert = BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=model.hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                intermediate_size=model.ffn_size,
                max_position_embeddings=model.max_positions,
            )
        )
    return sum(parameter.numel() for parameter in bert.parameters())


def test_parameter_count_equals_bert_plus_padding_and_relative_positions():
    (counts,) = run_world(parameter_counts, 1)
    for preset, vocabulary in ((base(), 30_522), (large(), 30_522), (tiny(), 8_192)):
        model = preset.model
        padding = (-vocabulary % 128) * (model.hidden_size + 1)  # rows of the embedding and of the head's bias
        relative = model.num_heads * model.relative_buckets
        assert counts[preset.ds_config.stem] == bert_parameters(model, vocabulary=vocabulary) + padding + relative
    assert counts["base"] == pytest.approx(109.5e6, rel=1e-3)
    assert counts["large"] == pytest.approx(335e6, rel=2e-3)
    assert 5e6 < counts["tiny"] < 6e6
