"""Every fault of the catalogue has a test, and docs/reliability.md names the tests of every fault."""

import ast
from pathlib import Path

from support.fault_catalogue import FAULTS
from support.fault_record import DOCUMENT, table_rows

TESTS = Path(__file__).parent


def marked_faults() -> dict[str, list[str]]:
    """Return the names of the tests of each fault, from their decorators."""
    tests: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in _faults_of(node):
                    tests.setdefault(number, []).append(node.name)
    return tests


def _faults_of(function: ast.FunctionDef) -> list[str]:
    calls = [node for node in function.decorator_list if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]
    return [ast.literal_eval(argument) for mark in marks for argument in mark.args]


def test_every_fault_has_a_test_and_every_mark_a_fault():
    assert marked_faults().keys() == FAULTS.keys()


def test_document_has_a_row_for_every_fault_with_its_tests():
    rows = table_rows(DOCUMENT.read_text(encoding="utf-8"))
    assert list(rows) == list(FAULTS)
    marked = marked_faults()
    for number, row in rows.items():
        assert FAULTS[number][1] in row
        for test in marked.get(number, []):
            assert f"`{test}`" in row, f"{number}: run `make test-faults-all` to record {test}"
