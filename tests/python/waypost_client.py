"""A Waypost device and a Waypost checker in Python, written from the .proto files alone.

It is what an author who has never seen the gateway's code would write: `device.proto` for the
device, `freshness.proto` for the checker. It exists to prove that those two files say enough, so
nothing here may be copied from, or depend on, the Rust side.

The modules under `waypost.v1` are what protoc makes of the .proto files; see `stubs.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import UUID

import grpc
import grpc.aio
from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent

from waypost.v1 import device_pb2 as wire
from waypost.v1 import freshness_pb2 as fresh
from waypost.v1 import freshness_pb2_grpc as fresh_grpc

ALPN = "waypost/1"


@dataclass(frozen=True)
class Pki:
    """The files that one party holds: whom it trusts, and who it is."""

    authority: Path
    certificate: Path
    private_key: Path


@dataclass(frozen=True)
class Address:
    """Where a gateway listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads HOST:PORT."""
        host, _, port = text.rpartition(":")
        return cls(host, int(port))


# --- The device -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ping:
    """One position, in the units of PingBatch. None says that the device does not know."""

    seq: int
    time_ms: int
    latitude_e7: int
    longitude_e7: int
    accuracy_dm: int | None = None
    altitude_dm: int | None = None
    speed_cm_per_s: int | None = None
    course_ddeg: int | None = None
    heading_deg: int | None = None
    battery_percent: int | None = None
    source: int = wire.SOURCE_UNSPECIFIED


def encode_batch(epoch: int, pings: Sequence[Ping]) -> wire.PingBatch:
    """Puts pings, in growing order of their sequence numbers, into the columns of a PingBatch."""
    sequence = [ping.seq for ping in pings]
    gaps = [later - earlier - 1 for earlier, later in itertools.pairwise(sequence)]
    times = [ping.time_ms for ping in pings]
    latitudes = [ping.latitude_e7 for ping in pings]
    longitudes = [ping.longitude_e7 for ping in pings]
    time_unit = _common_unit(times)
    degree_scale = _common_unit(latitudes + longitudes)
    batch = wire.PingBatch(
        epoch=epoch,
        first_seq=sequence[0],
        seq_gap=gaps if any(gaps) else [],
        count=len(pings),
        time=_deltas(time // time_unit for time in times),
        time_unit_ms=time_unit,
        latitude=_deltas(latitude // degree_scale for latitude in latitudes),
        longitude=_deltas(longitude // degree_scale for longitude in longitudes),
        degree_scale=degree_scale,
        source_runs=_source_runs(pings),
    )
    for column, presence, turn in (
        ("accuracy_dm", "accuracy_present", None),
        ("altitude_dm", "altitude_present", None),
        ("speed_cm_per_s", "speed_present", None),
        ("course_ddeg", "course_present", 3600),
        ("heading_deg", "heading_present", 360),
        ("battery_percent", "battery_present", None),
    ):
        values = [cast("int | None", getattr(ping, column)) for ping in pings]
        known = [value for value in values if value is not None]
        getattr(batch, column).extend(_deltas(known, turn))
        if 0 < len(known) < len(values):
            getattr(batch, presence).extend(_presence(values))
    return batch


def _common_unit(values: Sequence[int]) -> int:
    """The largest power of ten up to 1,000 that divides all values: smaller numbers, fewer bytes."""
    return next(unit for unit in (1000, 100, 10, 1) if all(value % unit == 0 for value in values))


def _deltas(values: Iterable[int], turn: int | None = None) -> list[int]:
    """Each value's difference to the one before it, from 0; of angles, the short way round."""
    differences = []
    before = 0
    for value in values:
        difference = value - before
        if turn is not None:
            difference = (difference + turn // 2) % turn - turn // 2
        differences.append(difference)
        before = value
    return differences


def _presence(values: Sequence[int | None]) -> list[int]:
    """How many in a row have a value, then how many lack it, and so on; a leading 0 if the first lacks it."""
    runs = [(has, len(list(run))) for has, run in itertools.groupby(values, lambda value: value is not None)]
    lengths = [length for _, length in runs]
    return lengths if runs[0][0] else [0, *lengths]


def _source_runs(pings: Sequence[Ping]) -> list[int]:
    """How many in a row, then their source, and so on; empty when no ping names one."""
    if all(ping.source == wire.SOURCE_UNSPECIFIED for ping in pings):
        return []
    runs = itertools.groupby(ping.source for ping in pings)
    return [number for source, run in runs for number in (len(list(run)), source)]


def varint(value: int) -> bytes:
    """A protobuf varint: seven bits a byte, the lowest first; all but the last have the top bit set."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class GatewayClosed(Exception):
    """The connection ended. `code` is an application error code of device.proto, or None when QUIC
    itself ended it (the handshake failed, or nothing was heard for too long)."""

    def __init__(self, event: ConnectionTerminated) -> None:
        self.code = event.error_code if event.frame_type is None else None
        self.reason = event.reason_phrase
        super().__init__(f"closed with code {event.error_code:#04x}: {event.reason_phrase}")


class _Connection(QuicConnectionProtocol):
    """aioquic's connection, which in addition remembers why it ended."""

    termination: ConnectionTerminated | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        """Keeps the end's reason before the readers see their end."""
        if isinstance(event, ConnectionTerminated):
            self.termination = event
        super().quic_event_received(event)


class Lane:
    """One stream after its Hello: frames out, frames in."""

    def __init__(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._writer = writer

    def send(self, frame: wire.DeviceFrame) -> None:
        """Sends one frame."""
        self.send_encoded(frame.SerializeToString())

    def send_encoded(self, frame: bytes) -> None:
        """Sends the bytes of one frame, length first."""
        self._writer.write(varint(len(frame)) + frame)

    def send_pings(self, epoch: int, pings: Sequence[Ping]) -> None:
        """Sends pings as one batch."""
        self.send(wire.DeviceFrame(batch=encode_batch(epoch, pings)))

    async def receive(self) -> wire.GatewayFrame:
        """The gateway's next frame. Raises GatewayClosed when none will come."""
        try:
            length = shift = 0
            while True:
                byte = (await self._reader.readexactly(1))[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            return wire.GatewayFrame.FromString(await self._reader.readexactly(length))
        except asyncio.IncompleteReadError as end:
            await self._connection.wait_closed()
            if self._connection.termination is None:
                raise
            raise GatewayClosed(self._connection.termination) from end


class Device:
    """A device's connection to the gateway."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def connect(cls, gateway: Address, pki: Pki) -> AsyncIterator[Device]:
        """Connects and proves with the certificate who this is; closes at the end of the block."""
        configuration = QuicConfiguration(is_client=True, alpn_protocols=[ALPN])
        configuration.load_verify_locations(str(pki.authority))
        configuration.load_cert_chain(pki.certificate, pki.private_key)
        async with connect(
            gateway.host, gateway.port, configuration=configuration, create_protocol=_Connection
        ) as connection:
            yield cls(cast(_Connection, connection))

    async def open_lane(self, hello: wire.Hello) -> tuple[Lane, wire.Welcome]:
        """Opens a stream, says Hello on it and reads the Welcome."""
        reader, writer = await self._connection.create_stream()
        lane = Lane(self._connection, reader, writer)
        lane.send(wire.DeviceFrame(hello=hello))
        answer = await lane.receive()
        if answer.WhichOneof("kind") != "welcome":
            raise ValueError(f"the first frame from the gateway is not Welcome but {answer}")
        return lane, answer.welcome


# --- The checker ------------------------------------------------------------------------------


class Checker:
    """A checker's channel to the freshness service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._service = fresh_grpc.FreshnessStub(channel)

    @classmethod
    @asynccontextmanager
    async def connect(cls, gateway: Address, pki: Pki) -> AsyncIterator[Checker]:
        """Makes a channel with TLS and the checker's certificate; closes it at the end of the block."""
        credentials = grpc.ssl_channel_credentials(
            root_certificates=pki.authority.read_bytes(),
            private_key=pki.private_key.read_bytes(),
            certificate_chain=pki.certificate.read_bytes(),
        )
        async with grpc.aio.secure_channel(f"{gateway.host}:{gateway.port}", credentials) as channel:
            yield cls(channel)

    async def get(self, users: Sequence[UUID]) -> fresh.GetResponse:
        """The users' entries now, in the order asked for."""
        return await self._service.Get(fresh.GetRequest(user_ids=[user.bytes for user in users]))

    async def watch(self, users: Sequence[UUID], token: bytes = b"") -> AsyncGenerator[fresh.WatchEvent]:
        """Snapshot and changes of these users, or what changed since `token`; ends when closed."""
        request = fresh.WatchRequest(token=token, user_ids=[user.bytes for user in users])
        call = self._service.Watch(request)
        try:
            async for response in call:
                for event in response.events:
                    yield event
        finally:
            call.cancel()
