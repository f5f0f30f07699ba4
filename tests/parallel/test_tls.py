"""Between machines nobody reads along, and nobody takes part who isn't that very rank."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from tests.ranks import Threads, meshes
from weft.errors import LinkLost
from weft.parallel import handshake as h
from weft.parallel.direct import Direct
from weft.parallel.group import Group
from weft.parallel.listening import Place
from weft.parallel.mesh import Mesh
from weft.parallel.tls import Encryption, Identity

LABEL = h.label_of("for anything")
TEXT = b"the user's text in another form " * 64


class Tap:
    """Passes on what comes to a place, and records it."""

    def __init__(self, place: Place) -> None:
        self._server, self._to = socket.create_server(("127.0.0.1", 0)), (place.address, place.port)
        self.place = Place("127.0.0.1", self._server.getsockname()[1], "")
        self.recorded, self._open = bytearray(), list[socket.socket]()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                one = self._server.accept()[0]
                self._open.append(one)
                other = socket.create_connection(self._to)
                self._open.append(other)
                for here, there in ((one, other), (other, one)):
                    threading.Thread(target=self._pass_on, args=(here, there), daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(1 << 16):
                self.recorded += data
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for each in (self._server, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # whoever waits for it goes on
            each.close()


def recorded(secured: bool) -> bytes:
    """What passes between two ranks that tell each other TEXT."""
    threads, own = Threads(2), [Identity() if secured else None for _ in range(2)]
    made = [Mesh("127.0.0.1", identity=identity) for identity in own]
    taps = [Tap(mesh.place) for mesh in made]
    key = h.pair_key(h.new_key(), 0, 1)
    shown = [identity.certificate if identity else b"" for identity in own]
    try:
        places = [tap.place for tap in taps]
        threads.each(lambda r: made[r].join(r, places, [key, key], certificates=shown))
        transports = [Direct(mesh) for mesh in made]
        groups = threads.each(lambda r: Group(transports[r], range(2)))
        sent = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)

        def swap(rank: int) -> torch.Tensor:
            received = torch.empty_like(sent)
            groups[rank].exchange(sent, received, 1 - rank)
            return received

        assert all(bytes(got.numpy()) == TEXT for got in threads.each(swap))
        for transport in transports:
            transport.close()
    finally:
        threads.close()
        for tap in taps:
            tap.close()
    return b"".join(bytes(tap.recorded) for tap in taps)


def test_a_recorded_connection_shows_nothing() -> None:
    seen = recorded(secured=True)
    assert len(seen) > 4 * len(TEXT)
    assert TEXT[:8] not in seen and b"weft\x01" not in seen and LABEL not in seen


def test_a_recorded_plain_one_shows_it() -> None:
    """So that the test above can fail."""
    seen = recorded(secured=False)
    assert seen.count(TEXT) == 2 and b"weft\x01" in seen


@pytest.fixture
def three() -> Iterator[list[Mesh]]:
    threads = Threads(3)
    made = meshes(threads, memory=False, secured=True)
    yield made
    for mesh in made:
        mesh.close()
    threads.close()


def towards(mesh: Mesh, identity: Identity | None, change: Callable[[ssl.SSLContext], None] = lambda c: None) -> bytes:
    """What somebody hears who shows this identity, says that it is rank 1, and proves that by rank 1's key with rank 0:
    nothing but the end of the connection."""
    if identity is not None:
        context = identity.context(False, [identity.certificate])
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    change(context)
    with socket.create_connection((mesh.place.address, mesh.place.port), timeout=5) as connection:
        try:
            with context.wrap_socket(connection) as secured:
                hello = h.hello(1, 0, LABEL, h.TLS)
                secured.sendall(hello)
                challenge = secured.recv(h.CHALLENGE_BYTES)
                if challenge:
                    secured.sendall(h.proof(mesh._keys[1], hello, challenge))
                return secured.recv(1)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_rank_1_itself_is_let_in(three: list[Mesh]) -> None:
    """So that those below are kept out by what they show."""
    assert three[1]._identity is not None
    assert towards(three[0], three[1]._identity) == b"!"
    three[0]._await(1, LABEL)[0].close()


@pytest.mark.parametrize("who", ["nobody", "stranger", "rank 2"])
def test_any_other_certificate_gets_nowhere(three: list[Mesh], who: str) -> None:
    identity = {"nobody": None, "stranger": Identity(), "rank 2": three[2]._identity}[who]
    assert towards(three[0], identity) == b"" and not three[0]._arrived


def test_older_versions_get_nowhere(three: list[Mesh]) -> None:
    def older(context: ssl.SSLContext) -> None:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2

    assert towards(three[0], three[1]._identity, older) == b"" and not three[0]._arrived


@pytest.mark.parametrize(
    "said", [h.hello(1, 0, LABEL), h.hello(1, 0, LABEL, h.TLS), b"GET / HTTP/1.1\r\n\r\n", bytes(4096)]
)
def test_what_is_not_encrypted_is_not_read(three: list[Mesh], said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> None:
        raise AssertionError("it was read before its certificate was seen")

    monkeypatch.setattr(h, "read_hello", read)
    with socket.create_connection((three[0].place.address, three[0].place.port), timeout=5) as guest:
        guest.sendall(said)
        with suppress(ConnectionError):
            while guest.recv(4096):  # TLS says why it ends
                pass
    assert not three[0]._guests and not three[0]._arrived


@pytest.mark.parametrize("who", ["stranger", "rank 2"])
def test_who_listens_in_a_ranks_place_is_not_talked_to(three: list[Mesh], who: str) -> None:
    """Not even when it has the key."""
    identity = Identity() if who == "stranger" else three[2]._identity
    assert identity is not None
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = identity.context(True, [identity.certificate])
        context.verify_mode = ssl.CERT_NONE

        def impostor() -> None:
            with suppress(OSError), context.wrap_socket(server.accept()[0], server_side=True) as guest:
                heard.extend(guest.recv(h.HELLO_BYTES))

        thread = threading.Thread(target=impostor, daemon=True)
        thread.start()
        three[1]._places = [Place("127.0.0.1", server.getsockname()[1], ""), *three[1]._places[1:]]
        with pytest.raises(LinkLost, match="what listens there is another one, it shows another certificate"):
            three[1]._connect(0, LABEL)
        thread.join(5)
    assert not heard


def test_a_certificate_that_a_member_has_signed_is_not_its_own() -> None:
    """The context trusts a member's certificate; only that very one will do."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    member = Identity()
    pem = member._both
    key = serialization.load_pem_private_key(pem, None)
    issuer = x509.load_pem_x509_certificate(pem)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    own = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateBuilder(
        issuer.subject, issuer.subject, own.public_key(), 7, issuer.not_valid_before_utc, issuer.not_valid_after_utc
    ).sign(key, hashes.SHA256())
    forged = Identity()
    forged.certificate = made.public_bytes(serialization.Encoding.DER)
    forged._both = made.public_bytes(serialization.Encoding.PEM) + own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    answering = Identity()
    here = Encryption(answering, 0, [answering.certificate, member.certificate])
    there = Encryption(forged, 1, [answering.certificate, forged.certificate])
    one, other = socket.socketpair()
    one.settimeout(5)
    other.settimeout(5)
    ended: list[BaseException] = []

    def reach() -> None:
        try:
            with there.reach(other, 0) as reached:
                reached.recv(1)
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=reach)
    thread.start()
    secured = here.received(one)
    with pytest.raises((ssl.SSLError, h.NotAMember)):
        secured.do_handshake()
        here.peer_of(secured)
    secured.close()
    thread.join(5)
    other.close()
