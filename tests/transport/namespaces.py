"""A second network namespace, joined to ours by a pair of virtual cables; for tests that run as root."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import msgspec
import pytest


class Namespace(msgspec.Struct, frozen=True):
    name: str
    cable: str
    """Our end."""
    address: str
    """Of the other end."""

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def make_namespace() -> Iterator[Namespace]:
    """Skips where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    number = os.getpid() % 60_000
    name, cable = f"pdkv{number}", f"pdkva{number}"
    net = f"10.{number // 250}.{number % 250}"
    made = Namespace(name, cable, f"{net}.2")
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", f"pdkvb{number}", "netns", name)
        ip("addr", "add", f"{net}.1/30", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "addr", "add", f"{net}.2/30", "dev", f"pdkvb{number}")
        ip("-n", name, "link", "set", f"pdkvb{number}", "up")
        yield made
    finally:
        ip("netns", "del", name, check=False)
        ip("link", "del", cable, check=False)
