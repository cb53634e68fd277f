"""Proves that a client written from the .proto files alone works against a running gateway.

A plain script: it prints one line per promise that it has proved, and ends with 1 and a message at
the first one that does not hold. The user must be new to the gateway. See tests/it/python.rs, which
runs it as part of `make test`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from uuid import UUID, uuid4

from google.protobuf.descriptor import FieldDescriptor

import stubs

STUBS = tempfile.TemporaryDirectory(prefix="waypost-stubs-")
stubs.generate(Path(STUBS.name))
sys.path.insert(0, STUBS.name)

# These need the modules made above.
from waypost.v1 import device_pb2 as wire  # noqa: E402
from waypost.v1 import freshness_pb2 as fresh  # noqa: E402

from waypost_client import Address, Checker, Device, GatewayClosed, Lane, Ping, Pki, varint  # noqa: E402

# How long the whole proof may take: a gateway that hangs must fail the test, not stall it.
DEADLINE_S = 60
FRAME_BYTES = 65_536
FRAME_TOO_LARGE = 0x02
# A field of DeviceFrame that no version of the schema has: number 15,000, length-delimited (type 2).
UNKNOWN_FIELD = (15_000 << 3) | 2

Events = AsyncGenerator[fresh.WatchEvent]


class Broken(Exception):
    """A promise that does not hold."""


def check(holds: bool, promise: str, seen: object) -> None:
    """Ends the run when `promise` does not hold, showing what was seen instead."""
    if not holds:
        raise Broken(f"expected: {promise}; seen:\n{seen}")


def proved(promise: str) -> None:
    """Tells that a promise holds."""
    print(f"ok  {promise}", flush=True)


@dataclass
class Walk:
    """A made-up walk: one ping a second, numbered from 1, none of it in the future."""

    now_ms: int = field(default_factory=lambda: (int(time.time()) - 600) * 1000)
    seq: int = 0

    def step(self) -> Ping:
        """The next ping. Some lack a value, so that presence lists are used; the course passes north."""
        self.seq += 1
        self.now_ms += 1000
        return Ping(
            seq=self.seq,
            time_ms=self.now_ms,
            latitude_e7=-338_568_000 + 1_700 * self.seq,
            longitude_e7=1_512_153_000 - 900 * self.seq,
            accuracy_dm=30 + self.seq % 7,
            altitude_dm=None if self.seq % 5 == 1 else -20 + self.seq,
            speed_cm_per_s=140 if self.seq % 3 else None,
            course_ddeg=(3_500 + 40 * self.seq) % 3_600,
            heading_deg=(350 + 3 * self.seq) % 360,
            battery_percent=80 if self.seq > 10 else None,
            source=wire.SOURCE_GNSS if self.seq % 9 else wire.SOURCE_NETWORK,
        )

    def steps(self, count: int) -> list[Ping]:
        """The next pings."""
        return [self.step() for _ in range(count)]


@dataclass
class Session:
    """What the device knows of its connection: where it speaks, what it has sent, what is stored."""

    lane: Lane
    epoch: int
    incarnation: bytes
    sent: int = 0
    stored: dict[int, Ping] = field(default_factory=dict)

    async def settle(self, pings: list[Ping], lane: Lane | None = None) -> tuple[wire.Ack, list[wire.Reject]]:
        """Sends one batch and reads acks until each ping of the connection so far has its fate.

        An ack may stand for several batches or for a part of one, so its running totals say when
        the work is done, and the refusals are gathered over all acks that were read. Without
        `lane` the pings go where Hello was said first.
        """
        lane = lane or self.lane
        lane.send_pings(self.epoch, pings)
        self.sent += len(pings)
        rejects: list[wire.Reject] = []
        while True:
            ack = await self.ack(lane)
            rejects.extend(ack.rejects)
            settled = ack.accepted + ack.duplicate + ack.filtered + ack.rejected
            check(settled <= self.sent, f"no more than the {self.sent} pings sent are settled", ack)
            if settled == self.sent:
                refused = {reject.seq for reject in rejects}
                self.stored.update((ping.seq, ping) for ping in pings if ping.seq not in refused)
                return ack, rejects

    def write_ledger(self, file: Path) -> None:
        """Writes down what the gateway must now have on disk, for somebody who can open its store."""
        lines = (json.dumps({"epoch": self.epoch, **asdict(ping)}) for ping in self.stored.values())
        file.write_text("".join(f"{line}\n" for line in lines))

    async def ack(self, lane: Lane) -> wire.Ack:
        """The next frame of `lane`, which must be an Ack that means on disk, of this epoch and this store."""
        frame = await lane.receive()
        check(frame.WhichOneof("kind") == "ack", "an Ack", frame)
        ack = frame.ack
        check(ack.epoch == self.epoch, f"an Ack of epoch {self.epoch}", ack)
        check(ack.incarnation == self.incarnation, f"an Ack of store {self.incarnation.hex()}", ack)
        check(ack.level == wire.LEVEL_FSYNCED, "an Ack that means on disk", ack)
        check(0 < ack.receive_ms <= ack.commit_ms, "received before committed", ack)
        return ack


def totals(ack: wire.Ack) -> dict[str, int]:
    """The four fates of the connection's pings."""
    return {
        "accepted": ack.accepted,
        "duplicate": ack.duplicate,
        "filtered": ack.filtered,
        "rejected": ack.rejected,
    }


def ranges(ack: wire.Ack) -> list[tuple[int, int]]:
    """What is settled beyond durable_upto."""
    return [(span.first, span.last) for span in ack.ranges]


# --- Promises of device.proto -----------------------------------------------------------------


async def prove_epoch(device: Device) -> Session:
    """Hello with epoch 0 gets an epoch."""
    lane, welcome = await device.open_lane(wire.Hello(epoch=0, next_seq=1, lane=wire.LANE_LIVE))
    check(welcome.epoch > 0, "an epoch above 0", welcome)
    check(welcome.durable_upto == 0 and not welcome.ranges, "nothing settled in a new epoch", welcome)
    check(len(welcome.incarnation) > 0, "the name of the store", welcome)
    check(welcome.limits.frame_bytes == FRAME_BYTES, "the documented frame limit", welcome)
    check(welcome.limits.batch_pings == 1_000, "the documented batch limit", welcome)
    check(welcome.flow.credit > 0, "leave to send something", welcome)
    check(welcome.position > 0, "the commit that recorded the contact", welcome)
    proved(f"Hello with epoch 0 gets an epoch: {welcome.epoch}")
    return Session(lane, welcome.epoch, welcome.incarnation)


async def prove_batch_and_duplicates(session: Session, walk: Walk) -> None:
    """50 pings are stored once, however often they are sent."""
    pings = walk.steps(50)
    ack, rejects = await session.settle(pings)
    check(ack.durable_upto == 50 and not ack.ranges, "durable_upto 50, nothing beyond", ack)
    check(totals(ack) == {"accepted": 50, "duplicate": 0, "filtered": 0, "rejected": 0}, "accepted 50", ack)
    check(rejects == [], "no refusal", rejects)
    proved("50 pings in one batch, all columns used: durable_upto 50, accepted 50")

    again, rejects = await session.settle(pings)
    check(again.durable_upto == 50, "durable_upto still 50", again)
    check(
        totals(again) == {"accepted": 50, "duplicate": 50, "filtered": 0, "rejected": 0},
        "accepted 50 and duplicate 50, which is all 100 that were sent",
        again,
    )
    check(rejects == [], "a duplicate is no refusal", rejects)
    proved("the same batch again: duplicate 50, and the totals add up to the 100 sent")


async def prove_bad_ping_blocks_nothing(session: Session, walk: Walk) -> None:
    """A latitude of 91 degrees is refused for ever; the pings around it are not."""
    before, bad, after = walk.steps(3)
    bad = replace(bad, latitude_e7=910_000_000)
    ack, rejects = await session.settle([before, bad, after])
    refusals = [(reject.seq, reject.code, reject.retryable) for reject in rejects]
    check(
        refusals == [(bad.seq, wire.Reject.BAD_COORDINATES, False)],
        f"one refusal: {bad.seq}, BAD_COORDINATES, not retryable",
        rejects,
    )
    check(ack.durable_upto == after.seq, f"durable_upto {after.seq}, past the refused ping", ack)
    check(
        totals(ack) == {"accepted": 52, "duplicate": 50, "filtered": 0, "rejected": 1},
        "two more accepted, one rejected",
        ack,
    )
    proved("latitude 91 is rejected with BAD_COORDINATES, for ever, and the next ping is stored")


async def prove_gap(session: Session, walk: Walk) -> None:
    """What arrives beyond a hole is told as a range, and the hole's filling closes it."""
    first, hole, last = walk.steps(3)
    ack, _ = await session.settle([first, last])
    check(
        ack.durable_upto == first.seq and ranges(ack) == [(last.seq, last.seq)],
        f"durable_upto {first.seq} and range {last.seq}-{last.seq}",
        ack,
    )
    ack, _ = await session.settle([hole])
    check(ack.durable_upto == last.seq and not ack.ranges, f"durable_upto {last.seq}, no range", ack)
    proved("a hole in the sequence shows as a range, and closes when it is filled")


async def prove_backfill(device: Device, session: Session, walk: Walk) -> None:
    """The second lane is the same queue: same epoch, same totals."""
    hello = wire.Hello(
        epoch=session.epoch,
        next_seq=walk.seq + 1,
        queued=1,
        last_acked=walk.seq,
        incarnation=session.incarnation,
        lane=wire.LANE_BACKFILL,
    )
    lane, welcome = await device.open_lane(hello)
    check(welcome.epoch == session.epoch, f"epoch {session.epoch} on the second lane too", welcome)
    check(welcome.durable_upto == walk.seq, f"durable_upto {walk.seq}", welcome)
    walk.seq += 1
    old = Ping(walk.seq, walk.now_ms - 300_000, latitude_e7=0, longitude_e7=-1_800_000_000)
    ack, _ = await session.settle([old], lane)
    check(ack.durable_upto == old.seq and ack.accepted == 56, "the old ping stored, totals shared", ack)
    proved("BACKFILL takes an older ping of the same epoch, with totals over both lanes")


async def prove_lone_ping(session: Session, walk: Walk) -> wire.Ack:
    """A batch may hold one ping. This one repeats the last position, for want of a new fix."""
    ping = replace(walk.step(), source=wire.SOURCE_LAST_KNOWN)
    ack, rejects = await session.settle([ping])
    check(rejects == [] and ack.durable_upto == ping.seq and ack.accepted == 57, "the lone ping stored", ack)
    proved("a lone ping in a batch is stored")
    return ack


async def prove_heartbeat(session: Session) -> None:
    """Nothing to report is answered, and changes no total."""
    session.lane.send(wire.DeviceFrame(heartbeat=wire.Heartbeat()))
    ack = await session.ack(session.lane)
    check(sum(totals(ack).values()) == session.sent, "the totals as before", ack)
    proved("a heartbeat is acknowledged")


async def prove_unknown_field(session: Session) -> None:
    """A frame from a later version of the schema is understood as far as it can be.

    The unknown field fills the frame to exactly the limit, which is still allowed.
    """
    known = wire.DeviceFrame(heartbeat=wire.Heartbeat()).SerializeToString()
    head = varint(UNKNOWN_FIELD)
    filling = FRAME_BYTES - len(known) - len(head) - 3  # three bytes say the filling's length
    frame = known + head + varint(filling) + bytes(filling)
    check(len(frame) == FRAME_BYTES, f"a frame of {FRAME_BYTES} bytes", len(frame))
    session.lane.send_encoded(frame)
    ack = await session.ack(session.lane)
    check(sum(totals(ack).values()) == session.sent, "the totals as before", ack)
    proved(f"an unknown field is ignored, in a frame of exactly {FRAME_BYTES} bytes")


async def prove_oversized_frame(session: Session) -> None:
    """One byte more than the limit ends the connection, by the length alone."""
    session.lane.send_encoded(bytes(FRAME_BYTES + 1))
    try:
        frame = await session.lane.receive()
    except GatewayClosed as closed:
        check(closed.code == FRAME_TOO_LARGE, "close code 0x02, FRAME_TOO_LARGE", closed)
    else:
        raise Broken(f"expected: the connection closed; seen:\n{frame}")
    proved(f"a frame of {FRAME_BYTES + 1} bytes closes the connection with code 0x02")


async def prove_return(device: Device, session: Session, walk: Walk) -> Session:
    """A second connection of the same queue finds its epoch and what it has settled."""
    hello = wire.Hello(
        epoch=session.epoch,
        next_seq=walk.seq + 1,
        last_acked=walk.seq,
        incarnation=session.incarnation,
        lane=wire.LANE_LIVE,
    )
    lane, welcome = await device.open_lane(hello)
    check(welcome.epoch == session.epoch, f"the same epoch, {session.epoch}", welcome)
    check(welcome.incarnation == session.incarnation, "the same store", welcome)
    check(welcome.durable_upto == walk.seq and not welcome.ranges, f"durable_upto {walk.seq}", welcome)
    proved("a reconnect with the epoch keeps it, and Welcome says what is settled")
    return Session(lane, welcome.epoch, welcome.incarnation)


# --- Promises of freshness.proto --------------------------------------------------------------


def prove_no_coordinates() -> None:
    """No field of the freshness schema could hold a coordinate.

    Each field must be of a kind that is known to be harmless: a message of the same file, a named
    state, an opaque identity or token, a time, a commit number or a count. A field of any other
    name or type fails here until somebody has thought about it.
    """
    harmless = {
        FieldDescriptor.TYPE_BYTES: {
            "user", "user_ids", "token", "page_token", "next_page_token", "incarnation",
        },
        FieldDescriptor.TYPE_UINT64: {"position", "count"},
        FieldDescriptor.TYPE_UINT32: {"coalesced", "number", "page_size"},
    }  # fmt: skip
    file = fresh.DESCRIPTOR
    methods = file.services_by_name["Freshness"].methods
    messages = list(file.message_types_by_name.values())
    check(len(messages) > 0 and not file.dependencies, "messages, none from another file", messages)
    for method in methods:
        check(
            method.input_type in messages and method.output_type in messages,
            f"{method.name} to use messages of this file",
            (method.input_type.full_name, method.output_type.full_name),
        )
    for message in messages:
        check(not message.nested_types, f"{message.name} to hide no message inside", message.nested_types)
        for one in message.fields:
            is_known = (
                one.type == FieldDescriptor.TYPE_ENUM
                or (one.type == FieldDescriptor.TYPE_MESSAGE and one.message_type in messages)
                or (one.type == FieldDescriptor.TYPE_UINT64 and one.name.endswith("_ms"))
                or one.name in harmless.get(one.type, set())
            )
            check(is_known, "only times, states, identities, tokens and counts", one.full_name)
    proved("no field of the freshness messages can hold a coordinate")


async def prove_never_seen(checker: Checker, user: UUID) -> None:
    """A user that the gateway never heard of is told as such, in the order asked for."""
    stranger = uuid4()
    answer = await checker.get([stranger, user])
    check(
        [entry.user for entry in answer.entries] == [stranger.bytes, user.bytes],
        "two entries in the order of the request",
        answer,
    )
    for entry in answer.entries:
        check(entry.state == fresh.STATE_NEVER_SEEN, "NEVER_SEEN (the user must be new here)", entry)
        check(entry.last_contact_ms == 0 and entry.last_sample_ms == 0, "no times", entry)
    proved("Get says NEVER_SEEN of a random user")


async def expect(events: Events, kind: str) -> fresh.WatchEvent:
    """The next event, which must be of this kind."""
    event = await anext(events)
    check(event.WhichOneof("kind") == kind, f"the event {kind}", event)
    return event


async def changes_until(
    events: Events, position: int, after_ms: int
) -> tuple[list[fresh.Entry], fresh.Progress]:
    """Entries up to a Progress that has passed both the commit and the moment."""
    entries: list[fresh.Entry] = []
    announced = 0
    async for event in events:
        match event.WhichOneof("kind"):
            case "entry":
                check(event.entry.position > announced, f"nothing at or below {announced} later", event)
                entries.append(event.entry)
            case "progress":
                announced = event.progress.position
                if announced >= position and event.progress.resolved_ms > after_ms:
                    return entries, event.progress
            case "reset":
                raise Broken(f"expected: the token accepted; seen:\n{event}")
    raise Broken("expected: the stream goes on; seen: its end")


async def prove_watch(events: Events, user: UUID, walk: Walk, ack: wire.Ack) -> fresh.Progress:
    """What was acknowledged shows, and Progress then vouches for the time of its receipt."""
    entries, progress = await changes_until(events, ack.position, ack.receive_ms)
    check(len(entries) > 0, "an entry of the user", entries)
    newest = entries[-1]
    check(newest.user == user.bytes and newest.state == fresh.STATE_ACTIVE, f"{user} ACTIVE", newest)
    check(newest.last_sample_ms == walk.now_ms, f"last_sample_ms {walk.now_ms}", newest)
    check(
        newest.last_fix_ms == walk.now_ms - 1000, "last_fix_ms one ping before: the newest was no fix", newest
    )
    check(newest.last_contact_ms >= ack.receive_ms, f"last_contact_ms from {ack.receive_ms}", newest)
    check(newest.position == ack.position, f"the position of the ack, {ack.position}", newest)
    samples = [entry.last_sample_ms for entry in entries]
    check(samples == sorted(samples), "last_sample_ms never goes back", samples)
    proved("Watch shows the newest sample time, and Progress beyond the ack's receive time")
    return progress


async def prove_resume(
    checker: Checker, user: UUID, session: Session, walk: Walk, seen: fresh.Progress
) -> None:
    """A token brings what changed since, once, and nothing else."""
    async with aclosing(checker.watch([user], seen.token)) as events:
        header = (await expect(events, "header")).header
        check(header.position == seen.position, f"a start at {seen.position}", header)
        entries, _ = await changes_until(events, seen.position, seen.resolved_ms)
        check(entries == [], "no entry, as nothing changed", entries)
    for _ in range(3):
        ack, _ = await session.settle([walk.step()])
    async with aclosing(checker.watch([user], seen.token)) as events:
        await expect(events, "header")
        entries, progress = await changes_until(events, ack.position, ack.receive_ms)
        check(
            [entry.last_sample_ms for entry in entries] == [walk.now_ms],
            "one entry with the newest of three commits",
            entries,
        )
    async with aclosing(checker.watch([user], progress.token)) as events:
        await expect(events, "header")
        entries, _ = await changes_until(events, progress.position, progress.resolved_ms)
        check(entries == [], "no entry, as it was delivered before", entries)
    proved("resume by token brings what changed since, once, and nothing when nothing changed")


# --- All of it --------------------------------------------------------------------------------


async def prove_all(arguments: argparse.Namespace) -> None:
    """Runs every proof in the order a device and a checker would live through it."""
    user: UUID = arguments.user
    pki: Path = arguments.pki
    device_pki = Pki(pki / "ca.pem", pki / "device.pem", pki / "device.key")
    checker_pki = Pki(pki / "ca.pem", pki / "checker.pem", pki / "checker.key")
    walk = Walk()
    prove_no_coordinates()
    async with Checker.connect(arguments.freshness, checker_pki) as checker:
        await prove_never_seen(checker, user)
        async with aclosing(checker.watch([user])) as events:
            await expect(events, "header")
            while (await anext(events)).WhichOneof("kind") != "snapshot_end":
                pass
            async with Device.connect(arguments.devices, device_pki) as device:
                session = await prove_epoch(device)
                await prove_batch_and_duplicates(session, walk)
                await prove_bad_ping_blocks_nothing(session, walk)
                await prove_gap(session, walk)
                await prove_backfill(device, session, walk)
                ack = await prove_lone_ping(session, walk)
                progress = await prove_watch(events, user, walk, ack)
                await prove_resume(checker, user, session, walk, progress)
                await prove_heartbeat(session)
                await prove_unknown_field(session)
                await prove_oversized_frame(session)
        if arguments.ledger:
            session.write_ledger(arguments.ledger)
        async with Device.connect(arguments.devices, device_pki) as device:
            session = await prove_return(device, session, walk)
            await prove_heartbeat(session)


def main() -> int:
    """Reads the arguments and runs the proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=Address.parse, required=True, metavar="HOST:PORT")
    parser.add_argument("--freshness", type=Address.parse, required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--pki",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with ca.pem, device.pem, device.key, checker.pem and checker.key",
    )
    parser.add_argument("--user", type=UUID, required=True, help="whom the device certificate names")
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="write each stored ping here, one JSON object a line",
    )
    arguments = parser.parse_args()
    try:
        asyncio.run(asyncio.wait_for(prove_all(arguments), DEADLINE_S))
    except Broken as broken:
        print(f"not ok  {broken}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"not ok  expected: all of it within {DEADLINE_S} s; seen: it still waits", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
