"""What the fault suite found, for docs/reliability.md.

    pytest -p fault_record --record-faults build/faults.json -m fault      adds what each test took and measured
    python tests/support/fault_record.py build/faults.json                         writes the document's table from it

Several runs with the same file add up (`make test-faults-all` has one for SLURM). A test measures something by
`record_property("lost", "what a reader should know")`.
"""

from __future__ import annotations

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

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"
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
    """The rows of the document's table by number of the fault."""
    rows = re.findall(r"^\| (F\d\d) \|.*$", text, flags=re.MULTILINE)
    return dict(zip(rows, (line for line in text.splitlines() if re.match(r"\| F\d\d \|", line)), strict=True))


def table(record: dict[str, Any]) -> str:
    """The table in Markdown, with the sentence that says which run it is of."""
    tests = record["tests"].values()
    outcomes = [test["outcome"] for test in tests]
    lines = [
        f"Last full run: {record['date']}, {record['machine']}: {outcomes.count('passed')} tests passed, "
        f"{outcomes.count('failed')} failed, {outcomes.count('skipped')} skipped, in "
        f"{sum(test['seconds'] for test in tests):.0f} s.\n",
        "| | tier | fault | injected | tests | time | found |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (tier, what, how) in FAULTS.items():
        found = {node: test for node, test in record["tests"].items() if number in test["faults"]}
        result = _result(found) if found else "none | | not run"
        lines.append(f"| {number} | {tier} | {what} | {how} | {result} |")
    return "\n".join(lines) + "\n"


def _result(found: dict[str, dict[str, Any]]) -> str:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for node, test in found.items():
        by_name.setdefault(node.partition("::")[2].partition("[")[0], []).append(test)
    bad = [test["outcome"] for test in found.values() if test["outcome"] != "passed"]
    lost = [text for test in found.values() for text in test.get("lost", [])]
    seconds = sum(test["seconds"] for test in found.values())
    said = "; ".join([*dict.fromkeys(lost), *(f"{bad.count(outcome)} {outcome}" for outcome in sorted(set(bad)))])
    return f"{' '.join(f'`{name}`' for name in by_name)} | {seconds:.1f} s | {said or 'holds'}"


def main(path: Path) -> None:
    """Write the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    DOCUMENT.write_text(f"{head}{_BEGIN}{table(json.loads(path.read_text()))}{_END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
