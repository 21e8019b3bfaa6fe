"""The link between two hosts goes down: two network name spaces, joined by a cable that a rank pulls."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_jobs import Fault, check_recovered, live_on, small_run

from pmlm_dist.config import RunConfig
from pmlm_dist.supervision.exit_codes import ExitCode

LINK = "pmlm"
_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network name spaces with a link between them: 10.213.0.1 and 10.213.0.2."""
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


class Enter:
    """The process moves to a host, whose link is up."""

    def __init__(self, host: str):
        self.host = host

    def __call__(self) -> None:
        place = os.open(f"/var/run/netns/{self.host}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(place, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(place)
        ip("link", "set", LINK, "up")


def cut() -> None:
    ip("link", "set", LINK, "down")


@pytest.mark.nightly
@pytest.mark.fault("F13")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 for name spaces")
def test_a_network_that_is_cut_is_a_hang_on_both_sides(small_corpus: Path, tmp_path: Path, straight: RunConfig):
    config = small_run(small_corpus, tmp_path / "run")
    with two_hosts() as hosts:
        moves = [Fault(Enter(host), rank=rank, step=0, again=True) for rank, host in enumerate(hosts)]
        first, second = live_on(config, *moves, Fault(cut), MASTER_ADDR="10.213.0.1", GLOO_SOCKET_IFNAME=LINK)
    assert first.codes == [ExitCode.HUNG] * 2, first.printed
    assert second.codes == [0, 0], second.printed
    check_recovered(config, straight)
