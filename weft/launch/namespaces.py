"""Starts workers on this machine as if on several: each in a network namespace, over a link of known speed.

The traffic is real: TCP through the kernel, shaped by a token bucket at both ends. Needs root and iproute2 on
Linux. Knows namespaces and links; knows nothing of what travels. Everything is removed by `stop()` and `close()`,
and what a killed run has left is removed by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from itertools import count as numbers
from pathlib import Path

from weft.errors import InputError
from weft.launch.local import LocalLauncher
from weft.links import BURST, Link

# A burst below a segmentation-offload packet (64 KiB) makes the kernel split each one: the processor time of
# communication quadruples.
BUCKET = f"burst {BURST} latency 200ms"
# What most systems use. Else the host's own choice would be measured with the link: BBR, for one, paces small messages
# between pauses at a fraction of its speed.
CONGESTION = "cubic"
PREFIX = "weft"
_NUMBERS = numbers()
SUBNET, MEDIUM = "10.213.77.", "10.213."  # inside the namespaces only


def demand_namespaces() -> None:
    """Raises `InputError` that says what is missing where shaped links can't be built."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise InputError(f"a shaped link needs {' and '.join(missing)}; install the package iproute2")
    if os.geteuid() != 0:
        raise InputError("a shaped link needs root, because it builds network namespaces; run as root, or --link none")


class NamespaceLauncher(LocalLauncher):
    """Each worker in a namespace of its own; two are joined directly, more by a bridge in one more namespace. `shared`:
    all directions share one rate, as on a radio."""

    shares_memory = False

    def __init__(self, rate: float | None = None, shared: bool = False) -> None:
        super().__init__()
        demand_namespaces()
        self.rate, self.shared = rate, shared  # bits a second; None: as fast as the kernel goes
        self._names: list[str] = []
        self._stem = f"{PREFIX}-{os.getpid()}-{next(_NUMBERS)}"  # of names; a process may have several launchers
        self._ends: list[tuple[str, str]] = []  # every (namespace, device) that sends

    @property
    def link_name(self) -> str:
        """With its speed now."""
        return f"between network namespaces, {Link(self.rate) if self.rate else 'unshaped'}"

    def start(self, threads: int, address: str, tokens: Sequence[str]) -> None:
        """Builds the network, then starts the workers in it."""
        remove_leftovers()
        try:
            self.build(len(tokens))
            self.shape(self.rate)
        except subprocess.CalledProcessError as error:
            self.remove()
            reason = error.stderr.decode().strip() or str(error)
            raise InputError(f"the network namespaces can't be built: {reason}") from None
        super().start(threads, address, tokens)

    def build(self, count: int) -> None:
        """Namespaces and links for so many workers."""
        self._names = [f"{self._stem}_{index}" for index in range(count)]
        for name in self._names:
            _ip("netns", "add", name)
            _in(name, "ip", "link", "set", "lo", "up")
        hub = f"{self._stem}_hub"
        if self.shared:
            self._build_medium(hub, f"{self._stem}_air", count)
        elif count == 2:
            self._wire(self._names[0], "data0", self._names[1], "data0")
        elif count > 2:
            self._build_bridge(hub)
        for index in range(count if count > 1 else 0):
            _in(self._names[index], "ip", "address", "add", f"{SUBNET}{index + 1}/24", "dev", "data0")
            with suppress(subprocess.CalledProcessError):  # a kernel without it
                _in(self._names[index], *f"ip route replace {SUBNET}0/24 dev data0 congctl {CONGESTION}".split())

    def _build_bridge(self, hub: str) -> None:
        _ip("netns", "add", hub)
        _in(hub, "ip", "link", "add", "bridge", "type", "bridge")
        _in(hub, "ip", "link", "set", "bridge", "up")
        for index, name in enumerate(self._names):
            self._wire(name, "data0", hub, f"port{index}")
            _in(hub, "ip", "link", "set", f"port{index}", "master", "bridge")
        self._names.append(hub)

    def _build_medium(self, hub: str, air: str, count: int) -> None:
        """A hub that sends all that comes from a worker through one shaped device, to a namespace that sends it back,
        and only then to whom it is for."""
        for name in (hub, air):
            _ip("netns", "add", name)
            for setting in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
                _in(name, "sysctl", "-qw", f"net.ipv4.{setting}")
        for index, name in enumerate(self._names):
            self._wire(name, "data0", hub, f"port{index}")
            _in(hub, "sysctl", "-qw", f"net.ipv4.conf.port{index}.proxy_arp=1")
            _in(hub, *f"ip route add {SUBNET}{index + 1}/32 dev port{index}".split())
            _in(hub, *f"ip rule add iif port{index} lookup 100".split())
        self._ends.clear()
        for there, back, net in (("out", "into", 1), ("return", "home", 2)):
            left, right = ((hub, there), (air, back)) if net == 1 else ((air, there), (hub, back))
            self._wire(left[0], left[1], right[0], right[1])
            for (name, device), host in ((left, 1), (right, 2)):
                _in(name, *f"ip address add {MEDIUM}{net}.{host}/24 dev {device}".split())
        _in(hub, *f"ip route add default via {MEDIUM}1.2 dev out table 100".split())
        _in(air, *f"ip route add {SUBNET}0/24 via {MEDIUM}2.2 dev return".split())
        self._ends = [(hub, "out")]
        self._names += [hub, air]

    def _wire(self, left: str, left_device: str, right: str, right_device: str) -> None:
        _in(left, "ip", "link", "add", left_device, "type", "veth", "peer", "name", right_device, "netns", right)
        for name, device in ((left, left_device), (right, right_device)):
            _in(name, "ip", "link", "set", device, "up")
            self._ends.append((name, device))

    def shape(self, rate: float | None) -> bool:
        """Sets the speed of every link, bits a second, also while workers run; None is as fast as the kernel goes."""
        self.rate = rate
        for name, device in self._ends:
            with suppress(subprocess.CalledProcessError):  # nothing there to remove the first time
                _in(name, "tc", "qdisc", "del", "dev", device, "root")
            if rate is not None:
                shaped = ("tbf", "rate", f"{rate:.0f}bit", *BUCKET.split())
                _in(name, "tc", "qdisc", "add", "dev", device, "root", *shaped)
        return True

    def sent(self) -> list[int]:
        """Bytes that each worker's device has sent so far, headers included, as the kernel counts them."""
        paths = ("cat", "/sys/class/net/data0/statistics/tx_bytes")
        return [int(_in(self._names[index], *paths)) for index in range(len(self.pids()))]

    def prefix(self, index: int) -> Sequence[str]:
        """Runs a worker inside its namespace."""
        return ("ip", "netns", "exec", self._names[index])

    def data_address(self, index: int) -> str:
        """Inside the namespaces' own subnet."""
        return f"{SUBNET}{index + 1}"

    def interface(self, index: int) -> str:
        """The shaped device."""
        return "data0"

    def stop(self) -> None:
        """Ends the workers and removes the network."""
        super().stop()
        self.remove()

    def remove(self) -> None:
        """Takes them away."""
        for name in self._names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)
        self._names, self._ends = [], []


def remove_leftovers() -> None:
    """Removes namespaces of earlier runs whose process is gone."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        match = re.fullmatch(PREFIX + r"-(\d+)-\w+", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _in(namespace: str, *command: str) -> str:
    return _run("ip", "netns", "exec", namespace, *command)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout.decode()
