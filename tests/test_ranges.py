"""Ranges declared on the fields: how they are checked, and that no numeric setting lacks one."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from pmlm_dist.config import RunConfig
from pmlm_dist.planning.settings import PlanConfig
from pmlm_dist.ranges import BelowOne, NotNegative, Positive, Probability, Range, range_problems

CHECKED_ELSEWHERE = {
    "data.sources": "weights bounded by their sum",
    "masking.min_span": "bounded by masking.max_span",
    "masking.max_span": "bounded by masking.min_span",
    "model.relative_max_distance": "bounded by model.relative_buckets",
}
"""Numeric settings without a range of their own, and why; tests/test_config.py covers their checks."""


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, BelowOne] = 0.5
    probability: Annotated[float, Probability] = 0.5


@dataclass(frozen=True)
class Outer:
    steps: Annotated[int, Positive] = 1
    limit: Annotated[int | None, Positive] = None
    retries: Annotated[int, NotNegative] = 0
    free: int = 0
    name: str = "a"
    inner: Inner = field(default_factory=Inner)


def numeric_fields(config: Any, *, prefix: str = "") -> dict[str, bool]:
    """Dotted names of all settings that may hold a number, and whether each declares a range."""
    hints = get_type_hints(type(config), include_extras=True)
    names: dict[str, bool] = {}
    for item in fields(config):
        value, hint, name = getattr(config, item.name), hints[item.name], f"{prefix}{item.name}"
        if is_dataclass(value):
            names |= numeric_fields(value, prefix=f"{name}.")
            continue
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if {plain, *get_args(plain)} & {int, float}:
            names[name] = any(isinstance(declared, Range) for declared in getattr(hint, "__metadata__", ()))
    return names


def test_every_numeric_setting_declares_a_range_or_is_listed_above():
    settings = numeric_fields(RunConfig()) | numeric_fields(PlanConfig())
    assert {"train.stop_at", "parallel.tp", "assume.link_gb_per_s"} <= settings.keys()
    assert {name for name, declares_range in settings.items() if not declares_range} == set(CHECKED_ELSEWHERE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Outer(), []),
        (Outer(steps=0), ["steps (0) must be positive"]),
        (Outer(limit=0), ["limit (0) must be positive, or None"]),
        (Outer(retries=-1), ["retries (-1) must not be negative"]),
        (Outer(inner=Inner(share=1.0)), ["inner.share (1.0) must be at least 0 and below 1"]),
        (Outer(inner=Inner(probability=1.0)), []),
        (Outer(inner=Inner(probability=1.1)), ["inner.probability (1.1) must lie between 0 and 1"]),
        (Outer(free=-1, name=""), []),
    ],
)
def test_message_has_setting_value_and_constraint(config: Outer, expected: list[str]):
    assert range_problems(config) == expected


def test_all_problems_are_listed_in_the_order_of_the_fields():
    listed = range_problems(Outer(steps=-1, retries=-2, inner=Inner(share=-3.0)))
    assert [problem.split()[0] for problem in listed] == ["steps", "retries", "inner.share"]


def test_prefix_precedes_the_name():
    assert range_problems(Inner(share=2.0), prefix="train.") == ["train.share (2.0) must be at least 0 and below 1"]


@pytest.mark.parametrize("declared", [Positive, NotNegative, Probability, BelowOne])
def test_nan_is_out_of_every_range(declared: Range):
    assert not declared.holds(float("nan"))
