"""JSON that users give: every fault is a message, never a traceback or a silent choice. Standard library only.

    text  --parse_json-->  value | InvalidJson      rows, records: the caller names file and line
    file  --read_json -->  value | ConfigError      names the file, and the line where it is known

Beyond the grammar, errors are: nesting deeper than `MAX_NESTING`, a name given twice in an object, and numbers that no
float holds (NaN, 1e999, a thousand digits). Code that walks, converts or prints a value needs no checks of its own.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError

MAX_NESTING = 64
"""SQuAD and tokenizers need 7. Far below Python's limit: what walks a value later may recurse more than the parser."""
_MAX_DIGITS = 300
"""Of an integer: the largest float has 309."""


class InvalidJson(ValueError):
    """A text that is not the JSON described above; `line` counts from 1, None where it is not known."""

    def __init__(self, message: str, *, line: int | None = None):
        self.line = line
        super().__init__(message)


def parse_json(text: str | bytes, *, any_number: bool = False) -> Any:
    """Return the value of a JSON text (bytes: UTF-8). Raises `InvalidJson`.

    `any_number`: numbers are returned as floats, with loss, and are no error: for texts whose strings alone are used.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        parse_int, parse_float = (float, float) if any_number else (_checked(int, text), _checked(float, text))
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=parse_int, parse_float=parse_float, parse_constant=parse_float
        )
    except json.JSONDecodeError as error:
        raise InvalidJson(f"{error.msg}, column {error.colno}", line=error.lineno) from error
    except UnicodeDecodeError as error:
        raise InvalidJson(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise _nested_too_deep() from error
    # Only a text with many brackets can be nested deeply; counting them is far cheaper than the walk.
    if text.count("[") + text.count("{") > MAX_NESTING:
        _check_nesting(value)
    return value


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises `ConfigError` if it cannot be read or is no JSON."""
    try:
        return parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    except InvalidJson as error:
        place = f"{path}, line {error.line}" if error.line else f"{path}"
        raise ConfigError([f"{place} is not JSON ({error}): correct it"]) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `ConfigError` as `read_json`, and for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError([f"{path} cannot be read: it must hold one JSON object"])
    return value


def is_unicode(text: str) -> bool:
    """Return False for unpaired surrogates: JSON escapes can produce them, and no tokenizer accepts them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InvalidJson(f"`{twice}` is given twice in one object: remove one")
    return fields


def _checked(kind: type[int] | type[float], text: str) -> Callable[[str], float]:
    def number(digits: str) -> float:
        value = kind(digits) if kind is float or len(digits) <= _MAX_DIGITS else math.inf
        if math.isfinite(value):
            return value
        shown = digits if len(digits) <= 20 else f"{digits[:12]}... ({len(digits)} characters)"
        raise InvalidJson(
            f"the number {shown} is not finite or too large", line=text.count("\n", 0, text.find(digits)) + 1
        )

    return number


def _check_nesting(value: Any) -> None:
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_NESTING:
            raise _nested_too_deep()
        level = [part for parent in level for part in (parent.values() if isinstance(parent, dict) else parent)]


def _nested_too_deep() -> InvalidJson:
    return InvalidJson(f"its lists and objects are nested more than {MAX_NESTING} deep")
