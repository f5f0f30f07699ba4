"""TLS 1.3 between ranks: each shows a certificate of its own, and takes the other's only if it is that one.

A rank makes a key and a certificate for each group that it joins; the engine hands the certificates out, over the
control channel. So there is no authority that could be deceived, and a stranger, or one rank that passes for another,
ends the hand-shake. The key stays in this process's memory. Knows sockets and certificates; knows nothing of what ranks
say. No torch.
"""

from __future__ import annotations

import os
import secrets
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache

from weft.parallel.handshake import NotAMember

SIGN_BYTES = 23  # of one byte, encrypted
RECORD = 16384  # bytes of a record's content at most
WAITS = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)  # nothing can be done now
_BEGIN, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)  # clocks of machines differ


class Identity:
    """A rank's key and certificate. `certificate`: as others are given it, DER."""

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        # A name of its own: among trusted ones of the same name, OpenSSL would try the first.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"weft {secrets.token_hex(16)}")])
        made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), _BEGIN, _END)
        certificate = made.sign(key, hashes.SHA256())
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)
        self._both = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def context(self, answering: bool, trusted: Sequence[bytes]) -> ssl.SSLContext:
        """Of one side of connections to those with the trusted certificates."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if answering else ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        if answering:
            made.num_tickets = 0  # nobody comes again, and nobody would read them
        with _as_file(self._both) as path:
            made.load_cert_chain(path)
        made.load_verify_locations(cadata="".join(map(ssl.DER_cert_to_PEM_cert, trusted)))
        return made


class Encryption:
    """One rank's, of a group. `certificates`: of all ranks."""

    def __init__(self, identity: Identity, rank: int, certificates: Sequence[bytes]) -> None:
        self._certificates = list(certificates)
        others = [certificate for other, certificate in enumerate(certificates) if other != rank]
        self._answering = identity.context(True, others)
        self._towards = cache(lambda peer: identity.context(False, [self._certificates[peer]]))

    def reach(self, connection: socket.socket, peer: int) -> ssl.SSLSocket:
        """The connecting side, until both have shown their certificates. The connection may have a timeout. Raises
        `NotAMember` for anybody else, and OSError."""
        try:
            secured: ssl.SSLSocket = self._towards(peer).wrap_socket(connection)
        except ssl.SSLCertVerificationError:
            raise NotAMember("shows another certificate") from None
        if secured.getpeercert(binary_form=True) != self._certificates[peer]:
            secured.close()
            raise NotAMember("shows another certificate")
        return secured

    def received(self, connection: socket.socket) -> ssl.SSLSocket:
        """The answering side of a connection that has not said anything yet: `do_handshake` is left to the caller."""
        return self._answering.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def peer_of(self, connection: ssl.SSLSocket) -> int:
        """After the hand-shake: whose certificate was shown. Raises `NotAMember`."""
        shown = connection.getpeercert(binary_form=True)
        if shown not in self._certificates:
            raise NotAMember("shows another certificate")
        return self._certificates.index(shown)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path at which the ssl module finds it: of memory without a name, or of a file that only this user may read."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        handle = os.memfd_create("weft", os.MFD_CLOEXEC)
        try:
            os.write(handle, content)
            yield f"/proc/self/fd/{handle}"
        finally:
            os.close(handle)
        return
    with tempfile.NamedTemporaryFile(prefix="weft-") as file:  # mode 0600
        file.write(content)
        file.flush()
        yield file.name


def send(connection: socket.socket, buffers: Sequence[memoryview]) -> int:
    """What goes out now of these bytes, encrypted or not. Raises one of WAITS where nothing does; they are given again
    then."""
    if not isinstance(connection, ssl.SSLSocket):
        return connection.sendmsg(buffers)
    first, *rest = buffers
    if rest:  # a header, which is not worth a record of its own
        return connection.send(bytes(first) + rest[0][: RECORD - len(first)])
    return connection.send(first)


def receive(connection: socket.socket, buffers: Sequence[memoryview]) -> int:
    """What has come, into these, from the first one on. 0: it is over. Raises one of WAITS."""
    if isinstance(connection, ssl.SSLSocket):
        return connection.recv_into(buffers[0])
    return connection.recvmsg_into(buffers)[0]


def pending(connection: socket.socket) -> bool:
    """Whether something has come that no system call would tell of."""
    return isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
