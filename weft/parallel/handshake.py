"""How a rank proves to another that it belongs to their group, and which rank it is.

    connecting -> answering   hello: who I am, whom I want, for what, and a number of my own
    answering -> connecting   challenge: a number of mine, and a proof of the key over all that was said
    connecting -> answering   proof: of the key, over all that was said

Each pair of ranks has a key of its own, from the engine over the control channel: so no member can pass for another.
Messages have fixed lengths, and nothing of a hello is believed before its proof. It says also how what follows on the
connection is secured: over TLS (tls.py) both sides have shown their certificates before any of this is said. Knows
bytes; opens nothing. No torch.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import NamedTuple

PLAIN, TLS = 0, 1  # how the connection is secured
_HELLO = struct.Struct("<4sBBHH16s32s")  # magic, version, security, from, to, label, nonce
_MAGIC, _VERSION = b"weft", 1
_NONCE = _PROOF = 32
HELLO_BYTES, CHALLENGE_BYTES, PROOF_BYTES = _HELLO.size, _NONCE + _PROOF, _PROOF


class NotAMember(Exception):
    """Whoever it is, it doesn't belong here."""


class Claim(NamedTuple):
    """Who wants to talk to whom, for what; not to be believed yet."""

    rank: int
    to: int
    label: bytes


def new_key() -> bytes:
    """A group's."""
    return secrets.token_bytes(32)


def pair_key(group: bytes, one: int, other: int) -> bytes:
    """That of two ranks, which only they and the engine know."""
    return _mac(group, f"{min(one, other)} {max(one, other)}".encode())


def label_of(text: str) -> bytes:
    """What a connection is for, in 16 bytes."""
    return hashlib.sha256(text.encode()).digest()[:16]


def hello(rank: int, to: int, label: bytes, security: int = PLAIN) -> bytes:
    """The first message."""
    return _HELLO.pack(_MAGIC, _VERSION, security, rank, to, label, secrets.token_bytes(_NONCE))


def read_hello(said: bytes, security: int = PLAIN) -> Claim:
    """Of HELLO_BYTES. Raises `NotAMember`."""
    magic, version, secured, rank, to, label, _ = _HELLO.unpack(said)
    if (magic, version, secured) != (_MAGIC, _VERSION, security):
        raise NotAMember("speaks another language")
    return Claim(rank, to, label)


def challenge(key: bytes, said: bytes) -> bytes:
    """The answer to a hello."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + _mac(key, b"answering" + said + nonce)


def proof(key: bytes, said: bytes, answer: bytes) -> bytes:
    """The last message. Raises `NotAMember` if who answered doesn't have the key."""
    nonce, shown = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(shown, _mac(key, b"answering" + said + nonce)):
        raise NotAMember("has another key")
    return _mac(key, b"connecting" + said + nonce)


def demand_proof(key: bytes, said: bytes, answer: bytes, shown: bytes) -> None:
    """Raises `NotAMember` unless a hello and its challenge were followed by this."""
    if not hmac.compare_digest(shown, _mac(key, b"connecting" + said + answer[:_NONCE])):
        raise NotAMember("has another key")


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")
