"""Hosts of the tests' own: network namespaces, each with one cable to this machine that can be pulled."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000


class Hosts:
    """A switch at `gateway` on this machine, and namespaces on it. Skips the test where they may not be made.

    Parameters
    ----------
    names : str
        A letter for each host.
    """

    gateway = "10.213.7.1"

    def __init__(self, names: str) -> None:
        self._names = names
        if shutil.which("ip") is None:
            pytest.skip("no iproute2 on this machine (apt-get install iproute2)")
        self._remove()
        if subprocess.run(
            ["ip", "link", "add", self._switch, "type", "bridge"], capture_output=True
        ).returncode:
            pytest.skip("this user may not make network namespaces")
        _ip(f"addr add {self.gateway}/24 dev {self._switch}")
        _ip(f"link set {self._switch} up")
        for number, name in enumerate(names, 2):
            host, cable = self.namespace(name), self._cable(name)
            _ip(f"netns add {host}")
            _ip(f"link add {cable} type veth peer name eth0 netns {host}")
            _ip(f"link set {cable} master {self._switch} up")
            _ip(f"-n {host} addr add {self.gateway[:-1]}{number}/24 dev eth0")
            _ip(f"-n {host} link set eth0 up")
            _ip(f"-n {host} link set lo up")

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def namespace(self, name: str) -> str:
        """For `enter`."""
        return f"{self._switch}-{name}"

    def cut(self, name: str) -> None:
        """Pull the cable: what is sent from now on is lost without a word."""
        _ip(f"link set {self._cable(name)} down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        _ip(f"link set {self._cable(name)} up")

    @property
    def _switch(self) -> str:
        return f"kf{os.getpid() % 100_000}"

    def _cable(self, name: str) -> str:
        return f"{self._switch}{name}"

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self.namespace(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._switch], capture_output=True)


def enter(namespace: str) -> None:
    """Move this process, which may have no other thread yet, into a namespace."""
    with Path("/run/netns", namespace).open() as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
