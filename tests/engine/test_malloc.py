"""Freed memory is kept in the process or returned to the system; each case in its own process."""

import platform
import subprocess
import sys

import pytest

BLOCKS = """
from pathlib import Path
import sys
import torch
from pmlm_dist.engine.malloc import keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

assert keep_freed_memory(keep=sys.argv[1] == "keep")
torch.ones(1)
before = resident()
blocks = [torch.ones(2**18) for _ in range(256)]  # 1 MiB each
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(("mode", "least", "most"), [("keep", 240, 300), ("return", -10, 20)])
def test_freed_memory_is_kept_or_returned(mode: str, least: int, most: int):
    kept = subprocess.run(
        [sys.executable, "-c", BLOCKS, mode], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert least <= int(kept) <= most
