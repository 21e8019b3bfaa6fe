"""Single options that are read before the others: --preset, which gives their defaults, --task, --local_rank."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from pmlm_dist.config import ConfigError


def preset_of(arguments: Sequence[str], presets: Mapping[str, Any], *, default: str) -> str:
    """Return the value of `--preset`. Raises `ConfigError` if there is no such preset."""
    preset = option_value("preset", arguments) or default
    if preset not in presets:
        raise ConfigError([f"--preset ({preset}) must be one of {', '.join(sorted(presets))}"])
    return preset


def option_value(name: str, arguments: Sequence[str]) -> str | None:
    """Return the value of the option `name` in `arguments`, None without it."""
    return getattr(_option_parser(name).parse_known_args(arguments)[0], name)


def without_option(name: str, arguments: Sequence[str]) -> list[str]:
    """Return `arguments` without the option `name` and its value."""
    return _option_parser(name).parse_known_args(arguments)[1]


def _option_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser
