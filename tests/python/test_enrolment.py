"""Proves that a device which knows nothing but an invitation and the .proto files gets its certificate,
pings with it, and renews it.

A plain script, as test_client.py: it prints one line per promise that it has proved, and ends with 1 and
a message at the first one that does not hold. See tests/it/python.rs.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ssl
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from aioquic.asyncio import connect
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import stubs

STUBS = tempfile.TemporaryDirectory(prefix="waypost-stubs-")
stubs.generate(Path(STUBS.name))
sys.path.insert(0, STUBS.name)

# These need the modules made above.
from waypost.v1 import device_pb2 as wire  # noqa: E402
from waypost.v1 import enrolment_pb2 as enrolment  # noqa: E402

from waypost_client import Address, Device, Ping, Pki, varint  # noqa: E402

ENROLL_ALPN = "waypost-enroll/1"
DEADLINE_S = 60


class Broken(Exception):
    """A promise that does not hold."""


def check(holds: bool, promise: str, seen: object) -> None:
    """Ends the run when `promise` does not hold, showing what was seen instead."""
    if not holds:
        raise Broken(f"expected: {promise}; seen:\n{seen}")


def proved(promise: str) -> None:
    """Tells that a promise holds."""
    print(f"ok  {promise}", flush=True)


@dataclass(frozen=True)
class Invitation:
    """What a QR code says."""

    server: Address
    authority_sha256: str
    code: str

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Reads waypost://enroll?server=...&ca=...&code=..."""
        parts = urlsplit(text)
        check((parts.scheme, parts.netloc) == ("waypost", "enroll"), "an invitation", text)
        values = parse_qs(parts.query)
        return cls(Address.parse(values["server"][0]), values["ca"][0], values["code"][0])


class Key:
    """A key that the device has made and does not show."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def request(self) -> bytes:
        """A certificate request. It names nobody, since nobody would believe it."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.DER)

    def store(self, folder: Path, issued: enrolment.IssuedCertificate) -> Pki:
        """Writes down key, certificate and whom to trust from now on."""
        folder.mkdir()
        chain = [x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in issued.chain]
        roots = [x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in issued.authorities]
        pki = Pki(folder / "ca.pem", folder / "device.pem", folder / "device.key")
        pki.authority.write_bytes(b"".join(roots))
        pki.certificate.write_bytes(b"".join(chain))
        pki.private_key.write_bytes(
            self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        return pki


async def authority_of(invitation: Invitation) -> bytes:
    """The authority that the server shows at the end of its chain, in PEM, if it is the invited one.

    aioquic cannot be told to trust a hash, so this takes a connection of its own, over which nothing is
    said. It does not give out the chain either, but for this attribute.
    """
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[ENROLL_ALPN])
    configuration.verify_mode = ssl.CERT_NONE
    server = invitation.server
    async with connect(server.host, server.port, configuration=configuration) as connection:
        chain = connection._quic.tls._peer_certificate_chain  # noqa: SLF001
    last = cast("x509.Certificate", chain[-1])
    seen = hashlib.sha256(last.public_bytes(Encoding.DER)).hexdigest()
    check(seen == invitation.authority_sha256, f"the authority {invitation.authority_sha256}", seen)
    return last.public_bytes(Encoding.PEM)


async def redeem(
    invitation: Invitation, authority: bytes, request: bytes
) -> enrolment.EnrollResponse:
    """One stream, one frame each way."""
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[ENROLL_ALPN])
    configuration.load_verify_locations(cadata=authority)
    server = invitation.server
    async with connect(server.host, server.port, configuration=configuration) as connection:
        reader, writer = await connection.create_stream()
        frame = enrolment.EnrollRequest(
            code=invitation.code, certificate_request=request
        ).SerializeToString()
        writer.write(varint(len(frame)) + frame)
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return enrolment.EnrollResponse.FromString(await reader.readexactly(length))


async def ping_once(pki: Pki, gateway: Address, epoch: int, seq: int, renewal: bytes | None) -> tuple[
    int, enrolment.EnrollResponse | None
]:
    """Connects as the device, sends one ping, and renews if there is a request for that."""
    async with Device.connect(gateway, pki) as device:
        lane, welcome = await device.open_lane(wire.Hello(lane=wire.LANE_LIVE, epoch=epoch))
        ping = Ping(seq, int(time.time()) * 1000, -338_568_000, 1_512_153_000)
        lane.send_pings(welcome.epoch, [ping])
        ack = (await lane.receive()).ack
        check(ack.durable_upto == seq, f"ping {seq} on disk", ack)
        if renewal is None:
            return welcome.epoch, None
        lane.send(wire.DeviceFrame(renew=wire.Renew(certificate_request=renewal)))
        frame = await lane.receive()
        check(frame.WhichOneof("kind") == "renewed", "an answer to Renew", frame)
        heard = await lane.receive()
        check(heard.WhichOneof("kind") == "ack", "then an Ack", heard)
        return welcome.epoch, frame.renewed


async def prove_all(invitation: Invitation, folder: Path) -> None:
    """What the first days of a device are."""
    authority = await authority_of(invitation)
    proved("the server shows the authority that the invitation names")

    first = Key()
    request = first.request()
    response = await redeem(invitation, authority, request)
    check(response.WhichOneof("outcome") == "issued", "a certificate", response)
    issued = response.issued
    life_ms = issued.expires_ms - issued.server_ms
    share = (issued.renew_at_ms - issued.server_ms) / life_ms
    check(0.66 < share < 0.67, "renewal at two thirds", issued)
    certificate = x509.load_der_x509_certificate(issued.chain[0])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    own = f"/user/{UUID(bytes=issued.user)}/device/{issued.device}"
    check(len(uris) == 1 and uris[0].endswith(own), f"one URI that ends with {own}", uris)
    proved(f"a code becomes the certificate of {uris[0]}")

    again = (await redeem(invitation, authority, request)).issued
    check(
        (again.user, again.device) == (issued.user, issued.device), "the same identity again", again
    )
    other = await redeem(invitation, authority, Key().request())
    refused = enrolment.EnrolmentRefusal.CODE_NOT_VALID
    check(other.refused.code == refused, "no certificate for another key", other)
    proved("a code that was redeemed works for its key and for no other")

    gateway = Address.parse(issued.gateway)
    second = Key()
    pki = first.store(folder / "first", issued)
    epoch, renewed = await ping_once(pki, gateway, 0, 1, second.request())
    proved("the certificate lets the device ping")
    check(renewed is not None and renewed.WhichOneof("outcome") == "issued", "a renewal", renewed)
    renewed = cast("enrolment.EnrollResponse", renewed).issued
    check((renewed.user, renewed.device) == (issued.user, issued.device), "the same device", renewed)
    pki = second.store(folder / "second", renewed)
    await ping_once(pki, gateway, epoch, 2, None)
    proved("a renewed certificate with a new key is the same device")


def main() -> int:
    """Reads the invitation and runs the proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("invitation", type=Invitation.parse)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="waypost-enrolment-") as folder:
            proof = prove_all(arguments.invitation, Path(folder))
            asyncio.run(asyncio.wait_for(proof, DEADLINE_S))
    except Broken as broken:
        print(f"not ok  {broken}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"not ok  expected: all of it within {DEADLINE_S} s; seen: it still waits", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
