"""Ranges of settings, declared on the fields of a dataclass and checked in one place. Standard library only.

    @dataclass(frozen=True)
    class TrainConfig:
        steps: Annotated[int, Positive] = 1000
        stop_at: Annotated[int | None, Positive] = None     # None always passes

    range_problems(RunConfig(train=TrainConfig(steps=0)))    ["train.steps (0) must be positive"]

A constraint between two settings is no range: it is checked by a function beside the dataclass (`config.py`).
"""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """A condition on the value of one setting."""

    constraint: str
    """The condition in words, to follow "must": "be positive"."""
    holds: Callable[[Any], bool]


Positive = Range("be positive", lambda value: value > 0)
NotNegative = Range("not be negative", lambda value: value >= 0)
Probability = Range("lie between 0 and 1", lambda value: 0 <= value <= 1)
BelowOne = Range("be at least 0 and below 1", lambda value: 0 <= value < 1)


def range_problems(config: Any, *, prefix: str = "") -> list[str]:
    """One sentence for each out-of-range field of the dataclass `config` and of the dataclasses nested in it.

    `prefix`: dotted path of `config` itself, "train." for example. NaN is out of every range.
    """
    problems: list[str] = []
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name.rstrip('_')}"
        if dataclasses.is_dataclass(value):
            problems += range_problems(value, prefix=f"{name}.")
            continue
        hint = hints[field.name]
        for declared in getattr(hint, "__metadata__", ()):
            if isinstance(declared, Range) and value is not None and not declared.holds(value):
                optional = ", or None" if type(None) in typing.get_args(hint.__origin__) else ""
                problems.append(f"{name} ({value}) must {declared.constraint}{optional}")
    return problems
