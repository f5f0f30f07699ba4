"""The engine's keys, and the tokens with which others reach it.

The engine's key pair is its own, new or from a secret of its user's. A token holds the public half, which is said to
nobody in the clear: who has it can talk to this engine, and can neither pass for it nor read along. Knows bytes; opens
nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import NamedTuple

import zmq
from zmq.utils import z85

from weft.errors import InputError

SHORTEST = 16  # letters of a secret
_PREFIX = "weft-"
_SALT = b"weft engine key 1"


class EngineKey(NamedTuple):
    """A CURVE key pair, as ZeroMQ writes keys."""

    public: bytes
    secret: bytes

    @property
    def token(self) -> str:
        """For those that are to reach the engine."""
        return _PREFIX + base64.urlsafe_b64encode(z85.decode(self.public)).decode().rstrip("=")

    def ticket(self, place: int) -> str:
        """What the rank at this place has beside the token, and no other."""
        return hmac.new(self.secret, f"place {place}".encode(), "sha256").hexdigest()

    def admits(self, place: int, ticket: str) -> bool:
        """Whether it is that one; it may be anything."""
        return hmac.compare_digest(self.ticket(place).encode(), ticket.encode("utf-8", "replace"))

    def token_of(self, place: int) -> str:
        """Both, for that rank."""
        return f"{self.token}.{self.ticket(place)}"


def new_key() -> EngineKey:
    """By chance."""
    return EngineKey(*zmq.curve_keypair())


def key_of(secret: str) -> EngineKey:
    """The same for the same secret, at every start of the engine. Raises `InputError` for one that can be guessed."""
    if len(secret) < SHORTEST:
        raise InputError(
            f"WEFT_TOKEN has {len(secret)} letters, which can be guessed; give {SHORTEST} or more, or none: then there "
            "is a new one at each start"
        )
    if secret.startswith(_PREFIX):
        raise InputError("WEFT_TOKEN is a token for other machines; the server wants a secret of its own, or none")
    # Slow on purpose: a secret that people think of is to be hard to find from what they see of the key.
    derived = hashlib.scrypt(secret.encode(), salt=_SALT, n=1 << 14, r=8, p=1, maxmem=64 << 20, dklen=32)
    private: bytes = z85.encode(derived)
    return EngineKey(zmq.curve_public(private), private)


def engine_of(token: str) -> bytes:
    """The public key of the engine that a token is for. Raises `InputError`."""
    try:
        if not re.fullmatch(rf"{_PREFIX}[A-Za-z0-9_-]{{43}}", token):
            raise ValueError(token)
        public: bytes = z85.encode(base64.urlsafe_b64decode(token.removeprefix(_PREFIX) + "="))
    except (ValueError, binascii.Error):
        raise InputError(
            f"WEFT_TOKEN is not a token: those begin with {_PREFIX} and have {len(_PREFIX) + 43} letters; copy the one "
            "that weft serve prints (the secret that it may have been given stays on its machine)"
        ) from None
    return public
