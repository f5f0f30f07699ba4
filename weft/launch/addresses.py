"""Addresses of machines, as users write them and as sockets want them. Knows names and devices; opens nothing."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from weft.errors import InputError


def parse_address(text: str, name: str) -> tuple[str, int]:
    """HOST:PORT. Raises `InputError`."""
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InputError(f"{name} {text!r} is not an address; write it like 10.0.0.1:7000")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """True for names and addresses, in brackets or not, that reach this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def endpoint(host: str, port: int | str) -> str:
    """As ZeroMQ writes it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def resolved(host: str, name: str) -> str:
    """A host's address, or a network device's of this machine, IPv4 rather than IPv6. Raises `InputError`."""
    if host in (devices := psutil.net_if_addrs()):
        listed = [entry.address for family in (socket.AF_INET, socket.AF_INET6) for entry in devices[host]
                  if entry.family == family]  # fmt: skip
        if not listed:
            raise InputError(f"{name}: the network device {host} has no address; give another one")
        return str(listed[0])
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        *_, address = min(addresses, key=lambda entry: entry[0] != socket.AF_INET)
        # An address of one link only says nothing without its device.
        device = f"%{socket.if_indextoname(int(address[3]))}" if len(address) > 3 and address[3] else ""
    except (OSError, UnicodeError) as error:
        raise InputError(f"{name}: no host or network device {host!r} is known ({error}); give its address") from None
    return str(address[0]).partition("%")[0] + device


def interface_of(address: str) -> str:
    """The network device that has this address. Raises `InputError`."""
    devices = psutil.net_if_addrs().items()
    names = [str(name) for name, entries in devices if any(entry.address == address for entry in entries)]
    if not names:
        raise InputError(f"no network device of this machine has the address {address}; see the output of: ip address")
    return names[0]
