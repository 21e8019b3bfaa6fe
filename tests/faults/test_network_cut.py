"""Network cut between two hosts: two network namespaces, and a rank that sets their link down."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_jobs import Fault, check_recovered, run_with_restarts, small_run

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.exit_codes import ExitCode

LINK = "pmlm"
_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Create two network namespaces with a link between them, 10.213.0.1 and 10.213.0.2; yield their names."""
    names = [f"pmlm-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.213.0.{number}/24", "dev", LINK)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class EnterHost:
    """Move this process to the namespace of a host and set its link up."""

    def __init__(self, host: str):
        self.host = host

    def __call__(self) -> None:
        namespace = os.open(f"/var/run/netns/{self.host}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(namespace)
        ip("link", "set", LINK, "up")


def cut() -> None:
    ip("link", "set", LINK, "down")


@pytest.mark.nightly
@pytest.mark.fault("F13")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 for namespaces")
def test_network_cut_is_a_hang_on_both_sides(small_corpus: Path, tmp_path: Path, uninterrupted: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    with two_hosts() as hosts:
        moves = [Fault(EnterHost(host), rank=rank, step=0, every_attempt=True) for rank, host in enumerate(hosts)]
        first, second = run_with_restarts(config, *moves, Fault(cut), MASTER_ADDR="10.213.0.1", GLOO_SOCKET_IFNAME=LINK)
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert second.codes == [0, 0], second.printed
    check_recovered(config, uninterrupted)
