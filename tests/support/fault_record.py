"""Records the results of the fault tests for the table of docs/reliability.md.

    PYTHONPATH=tests pytest -p support.fault_record --record-faults build/faults.json -m fault    adds time and result
    PYTHONPATH=tests python -m support.fault_record build/faults.json                             writes the table

Runs with the same file accumulate (`make test-faults-all` has one for SLURM). A test adds a result to its row by
`record_property("lost", "2 steps repeated")`.
"""

import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.fault_catalogue import FAULTS

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
_BEGIN, _END = "<!-- table: tests/support/fault_record.py -->\n", "<!-- end -->\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-faults", type=Path, help="JSON file that results of `fault` tests are added to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record-faults")
    if path is not None:
        config.pluginmanager.register(_Record(path), "record of faults")


class _Record:
    """Collects the results of one session."""

    def __init__(self, path: Path):
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        faults = [number for mark in item.iter_markers("fault") for number in mark.args]
        if faults:
            facts = self._tests.setdefault(item.nodeid, {"faults": faults, "seconds": 0.0, "outcome": "passed"})
            facts["seconds"] += report.duration if report.when == "call" else 0.0
            facts["outcome"] = facts["outcome"] if report.passed else report.outcome
            facts["lost"] = [value for name, value in report.user_properties if name == "lost"]
        return report

    def pytest_sessionfinish(self) -> None:
        before = json.loads(self._path.read_text()) if self._path.exists() else {"tests": {}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
        facts = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "tests": {**before["tests"], **self._tests}}
        self._path.write_text(json.dumps(facts, indent=1) + "\n")


def table_rows(text: str) -> dict[str, str]:
    """Return the rows of the table in `text` by fault number."""
    rows = re.findall(r"^\| (F\d\d) \|.*$", text, flags=re.MULTILINE)
    return dict(zip(rows, (line for line in text.splitlines() if re.match(r"\| F\d\d \|", line)), strict=True))


def table(record: dict[str, Any]) -> str:
    """Return the table in Markdown, with a line on the date and machine of the run."""
    tests = record["tests"].values()
    outcomes = [test["outcome"] for test in tests]
    lines = [
        f"Last full run: {record['date']}, {record['machine']}: {outcomes.count('passed')} tests passed, "
        f"{outcomes.count('failed')} failed, {outcomes.count('skipped')} skipped, in "
        f"{sum(test['seconds'] for test in tests):.0f} s.\n",
        "| | tier | fault | injection | tests | time | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (tier, fault, injection) in FAULTS.items():
        results = {node: test for node, test in record["tests"].items() if number in test["faults"]}
        cells = _cells(results) if results else "none | | not run"
        lines.append(f"| {number} | {tier} | {fault} | {injection} | {cells} |")
    return "\n".join(lines) + "\n"


def _cells(results: dict[str, dict[str, Any]]) -> str:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for node, test in results.items():
        by_name.setdefault(node.partition("::")[2].partition("[")[0], []).append(test)
    unsuccessful = [test["outcome"] for test in results.values() if test["outcome"] != "passed"]
    lost = [text for test in results.values() for text in test.get("lost", [])]
    seconds = sum(test["seconds"] for test in results.values())
    failed = [f"{unsuccessful.count(outcome)} {outcome}" for outcome in sorted(set(unsuccessful))]
    result = "; ".join([*dict.fromkeys(lost), *failed])
    return f"{' '.join(f'`{name}`' for name in by_name)} | {seconds:.1f} s | {result or 'passed'}"


def main(path: Path) -> None:
    """Write the table into docs/reliability.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    DOCUMENT.write_text(f"{head}{_BEGIN}{table(json.loads(path.read_text()))}{_END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
