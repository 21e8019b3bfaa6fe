"""JSON of users: what the parser of Python accepts or raises otherwise is one message."""

import math
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.json_input import MAX_NESTING, InvalidJson, parse_json, read_json, read_json_object

DEEPEST = "[" * MAX_NESTING + "]" * MAX_NESTING


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, -1e300, "x"], "b": null}', "9" * 300, DEEPEST, "[" + "[]," * 500 + "[]]"]
)
def test_valid_json_is_read(text: str):
    assert parse_json(text) == parse_json(text.encode()) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 64 deep"),
        (f"[{DEEPEST}]", "nested more than 64 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than 64 deep"),
        ("9" * 5000, r"999999999999... \(5000 characters\)"),
        ("-" + "9" * 400, "too large"),
        ("1e999", "1e999 is not finite"),
        ("[NaN]", "NaN is not finite"),
        ("-Infinity", "not finite"),
        ('{"a": {"b": 1, "b": 1}}', "`b` is given twice"),
        ("{'a': 1}", "column 2"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        ("", "column 1"),
    ],
)
def test_invalid_json_raises_one_short_message(text: str | bytes, message: str):
    with pytest.raises(InvalidJson, match=message) as error:
        parse_json(text)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("text", ["9" * 5000, "1e999"])
def test_any_number_is_read_where_only_strings_count(text: str):
    assert parse_json(text, any_number=True) == math.inf


def test_error_of_a_file_names_the_line(tmp_path: Path):
    file = tmp_path / "settings.json"
    file.write_text('\ufeff{"a": 1,\n"b": 1e999}')
    with pytest.raises(ConfigError, match=r"settings.json, line 2 is not JSON \(the number 1e999"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold one JSON object"):
        read_json_object(file)
    with pytest.raises(ConfigError, match=r"missing.json cannot be read"):
        read_json(tmp_path / "missing.json")
