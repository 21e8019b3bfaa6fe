"""Benchmarks: ratios of times that are measured in interleaved rounds of one run.

python benchmarks/run.py NAME [--json FILE] [--quick] [settings of the benchmark; --help lists them]
"""

import argparse
import importlib
import sys
from pathlib import Path

import tyro

BENCHMARKS = {
    "attention": "AttentionOptions",
    "checkpoint": "CheckpointOptions",
    "generate": "GenerateOptions",
    "loader": "LoaderOptions",
    "plan": "PlanOptions",
    "prepare": "PrepareOptions",
    "scale": "ScaleOptions",
    "scaling": "ScalingOptions",
    "step": "StepOptions",
    "update": "UpdateOptions",
    "zero": "ZeroOptions",
}


def main() -> None:
    """Run one benchmark, print its report, and write it to the file of `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", type=Path, help="file to write the report to")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small shapes, one round")
    known, rest = parser.parse_known_args()
    module = importlib.import_module(known.name)
    options = tyro.cli(getattr(module, BENCHMARKS[known.name]), args=rest, prog=f"run.py {known.name}")
    report = module.run(options.quick() if known.quick else options)
    report.show()
    if known.json:
        report.write(known.json)


if __name__ == "__main__":
    sys.exit(main())
