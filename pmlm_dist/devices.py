"""Peak rates, bandwidths and memory of devices, from their data sheets. Standard library only.

Rates: dense products without sparsity, in FLOP/s; fp32 without TF32, which torch does not use by default. Bandwidths:
bytes a second; a link's in one direction (data sheets add up both). Sources: NVIDIA's data sheets of V100, A100, H100
(SXM, PCIe, NVL), H200 and L40S.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9
HEAP_SLACK = 0.4
"""Fragmentation of glibc's heap when freed memory is kept (engine/malloc.py), as a fraction of the memory in use.
Measured by `benchmarks/run.py plan`: 0.23 to 0.43, and 0.65 with two ranks of the tiny model."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one process' share of a CPU.

    `*_share`: attained fraction of the peak; 1 for measured devices, whose rates are attained ones already.
    """

    name: str
    memory: float
    """Bytes, as advertised. Boards have up to 6 % more, which is about what CUDA and NCCL use."""
    peak: Mapping[str, float]
    """FLOP/s of matrix products by precision (fp32, fp16, bf16); a missing precision is not supported."""
    bandwidth: float
    """Bytes a second of the device's memory."""
    link: float
    """Bytes a second of the link to the other devices of the node, in one direction."""
    network: float
    """Bytes a second of the network to other nodes, for each device, in one direction."""
    cuda_name: str = ""
    """Substring of `torch.cuda.get_device_name`."""
    matrix_share: float = 0.6
    """Attained by a Transformer's large matrix products."""
    bandwidth_share: float = 0.8
    """Attained by element-wise operations on large tensors."""
    link_share: float = 0.8
    """Attained by collectives inside a node: NCCL reports 370 of H100's 450 GB/s with rings."""
    network_share: float = 0.9
    """Attained by collectives between nodes: NCCL expects 46 to 48 of the 50 GB/s of an NDR port."""
    is_accelerator: bool = True
    """False for a CPU."""
    dispatch: float = 5e-6
    """Seconds for the host to launch one operation."""
    latency: float = 10e-6
    """Seconds of one round of a collective between two ranks."""
    host_link: float = 25 * GIGA
    """Bytes a second to the host's memory, for offloading: attained with PCIe 4.0 x16."""
    host_bandwidth: float = 20 * GIGA
    """Bytes a second of the host's memory for each device: limits the step of an offloaded optimizer."""
    slack: float = 0.06
    """Memory that the allocator reserves beyond the allocated bytes, as a fraction of them."""


def _gpu(name: str, cuda_name: str, gigabytes: float, *, tflops: Mapping[str, float], gbs: tuple[float, ...]) -> Device:
    """A GPU from its data sheet; `gbs`: bandwidth of memory, link (one direction) and network in GB/s."""
    memory, link, network = (GIGA * rate for rate in gbs)
    peak = {precision: TERA * rate for precision, rate in tflops.items()}
    return Device(name, GIGA * gigabytes, peak, memory, link, network, cuda_name=cuda_name)


_HOPPER = {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9}
_AMPERE = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}
_NDR, _HDR, _EDR = 50.0, 25.0, 12.5
"""InfiniBand ports of 400, 200 and 100 Gb/s, one for each GPU, in GB/s."""

# `device_named` returns the first match, so "H100 PCIe" must precede "H100".
DEVICES = {
    device.name: device
    for device in (
        _gpu("h200-141gb", "H200", 141, tflops=_HOPPER, gbs=(4800, 450, _NDR)),
        _gpu("h100-pcie-80gb", "H100 PCIe", 80, gbs=(2000, 64, _NDR), tflops={"bf16": 756, "fp16": 756, "fp32": 51}),
        _gpu("h100-nvl-94gb", "H100 NVL", 94, gbs=(3900, 300, _NDR), tflops={"bf16": 835, "fp16": 835, "fp32": 60}),
        _gpu("h100-80gb", "H100", 80, tflops=_HOPPER, gbs=(3350, 450, _NDR)),
        _gpu("a100-80gb", "A100-SXM4-80GB", 80, tflops=_AMPERE, gbs=(2039, 300, _HDR)),
        _gpu("a100-40gb", "A100", 40, tflops=_AMPERE, gbs=(1555, 300, _HDR)),
        _gpu("l40s-48gb", "L40S", 48, gbs=(864, 32, _HDR), tflops={"bf16": 362.05, "fp16": 362.05, "fp32": 91.6}),
        _gpu("v100-32gb", "V100", 32, gbs=(900, 150, _EDR), tflops={"fp16": 125.0, "fp32": 15.7}),
    )
}


def device_named(cuda_name: str) -> Device | None:
    """The device that torch calls `cuda_name`; None if it is not in the table."""
    return next((device for device in DEVICES.values() if device.cuda_name in cuda_name), None)
