"""The table of devices: lookup by torch's device names, and peak rates recomputed from clock and core counts."""

import pytest

from pmlm_dist.devices import DEVICES, device_named


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA L40S", "l40s-48gb"),
    ],
)
def test_device_is_found_by_its_cuda_name(cuda_name: str, name: str):
    device = device_named(cuda_name)
    assert device is not None
    assert device.name == name


def test_unknown_device_is_none():
    assert device_named("NVIDIA Imaginary 1") is None


@pytest.mark.parametrize(
    ("name", "cores", "boost_ghz", "flops_of_core"),
    [("h100-80gb", 528, 1.830, 1024), ("a100-80gb", 432, 1.410, 512), ("v100-32gb", 640, 1.530, 128)],
)
def test_half_precision_peak_is_cores_times_clock(name: str, cores: int, boost_ghz: float, flops_of_core: int):
    """Tensor cores, boost clock, and FLOPs of a tensor core in a cycle, from the white paper of each chip."""
    assert DEVICES[name].peak["fp16"] == pytest.approx(cores * boost_ghz * 1e9 * flops_of_core, rel=0.01)


def test_only_volta_has_no_bfloat16():
    assert set(DEVICES["v100-32gb"].peak) == {"fp16", "fp32"}
    assert all("bf16" in device.peak for name, device in DEVICES.items() if name != "v100-32gb")
