"""Compile the attention kernels for a compute capability without a GPU; print what they need, as JSON.

Usage: kernel_resources.py CAPABILITY (80: A100, 90: H100). A process of its own: Triton's interpreter is off.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmlm_dist.model import triton_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32 = ("lse_ptr", "delta_ptr", "run_sums_ptr", "bias_ptr")
INT32 = ("order_ptr", "position_ptr", "run_ptr", "start_ptr", "lists_ptr", "counts_ptr")
"""Last parts of names."""
ALIGNED = ("q_row", "q_sample", "q_head", "kv_row", "kv_sample", "kv_head")
"""Strides: multiples of 16."""


def resources(kernel: Any, capability: int, *, blocks: tuple[int, int], warps: int, stages: int) -> dict[str, int]:
    """Registers, spilled bytes a thread, shared memory, products and atomic operations of a kernel for bf16."""
    constants: dict[str, Any] = {
        "HEAD_DIM": 64, "Q_BLOCK": blocks[0], "K_BLOCK": blocks[1], "RUNS": 32, "HAS_BIAS": True, "HAS_DROPOUT": False,
        "PRECISION": "tf32",
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _type(name, constants) for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ALIGNED
    }
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=positions, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    code = compiled.asm["ptx"]
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
        "products": len(re.findall(r"\bwgmma\.mma_async|\bmma\.sync", code)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.(?:global|relaxed|acq_rel|gpu)", code)),
    }


def _type(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in FP32:
        return "*fp32"
    if name.endswith(INT32):
        return "*i32"
    if name.endswith("_ptr"):
        return "*bf16"
    return "fp32" if name in ("scale", "dropout") else "i32"


if __name__ == "__main__":
    kernels = (triton_kernels.attend, triton_kernels.query_gradients, triton_kernels.key_gradients)
    print(
        json.dumps(
            {
                kernel.fn.__name__: resources(kernel, int(sys.argv[1]), blocks=(64, 64), warps=4, stages=2)
                for kernel in kernels
            }
        )
    )
