"""A checker in Python with plain grpcio, to start from: it follows the stream, goes on where it was after
either end was restarted, and tells silence from not knowing.

    python checker_example.py --freshness localhost:4434 --pki waypost-data/pki --state checker.json

It prints one line for each thing it learns:

    connected POSITION                          a stream has begun; after 0 comes everybody
    reset                                       what was known counts no more
    entry USER STATE LAST_CONTACT_MS LAST_SAMPLE_MS
    snapshot_end COUNT                          everybody has come
    gap FROM_MS UNTIL_MS                        the gateway could not hear; UNTIL_MS is 0 while it lasts
    transition USER STATE AT_MS                 the holder has paused, or resumed
    stale RESOLVED_MS                           after this moment nothing is known of anybody
    live RESOLVED_MS                            the stream moves on again
    lost CODE                                   the stream ended; another one is tried

Written from freshness.proto alone; tests/it/python.rs runs it. `stubs.py` makes the modules of
`waypost.v1` from the .proto files; outside of this repository, make them once with grpcio-tools.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from uuid import UUID

import grpc
import grpc.aio

import stubs

STUBS = tempfile.TemporaryDirectory(prefix="waypost-stubs-")
stubs.generate(Path(STUBS.name))
sys.path.insert(0, STUBS.name)

# These need the modules made above.
from waypost.v1 import freshness_pb2 as fresh  # noqa: E402
from waypost.v1 import freshness_pb2_grpc as fresh_grpc  # noqa: E402

# The gateway makes progress every second. Without it for so long, what is going on is unknown.
STALE_AFTER_S = 3.0
# A stream without progress for so long is given up.
LOST_AFTER_S = 15.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 10.0
# Coming back would not change these.
FINAL = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}


def say(*words: object) -> None:
    """One line, at once."""
    print(*words, flush=True)


class Checker:
    """What is known, and how far the stream was worked through: one file, so that they always agree."""

    def __init__(self, service: fresh_grpc.FreshnessStub, state: Path) -> None:
        self._service = service
        self._state = state
        self._token = b""
        self._last_contact_ms: dict[str, int] = {}
        self._resolved_ms = 0
        self._learned_at = 0.0
        self._moved_at = 0.0
        self._is_stale = False
        self._failures = 0
        if state.exists():
            known = json.loads(state.read_text())
            self._token = bytes.fromhex(known["token"])
            self._last_contact_ms = known["last_contact_ms"]

    async def run(self) -> None:
        """Follows until the gateway refuses for good."""
        self._learned_at = self._moved_at = asyncio.get_running_loop().time()
        looking = asyncio.create_task(self._look_for_staleness())
        try:
            while True:
                await self._follow()
                # Between half and all of it, so that many checkers do not come back in one moment.
                pause = min(FIRST_PAUSE_S * 2**self._failures, LAST_PAUSE_S)
                self._failures = min(self._failures + 1, 16)
                await asyncio.sleep(pause * random.uniform(0.5, 1))
        finally:
            looking.cancel()

    async def _follow(self) -> None:
        """Reads one stream to its end."""
        self._moved_at = asyncio.get_running_loop().time()
        call = self._service.Watch(fresh.WatchRequest(token=self._token))
        reading = asyncio.create_task(self._read(call))
        try:
            while not (await asyncio.wait({reading}, timeout=1))[0]:
                if LOST_AFTER_S <= asyncio.get_running_loop().time() - self._moved_at:
                    say("lost", "no progress")
                    return
            reading.result()
            say("lost", "ended")
        except grpc.aio.AioRpcError as error:
            if error.code() in FINAL:
                raise
            say("lost", error.code().name)
        finally:
            reading.cancel()
            call.cancel()

    async def _read(self, call: grpc.aio.UnaryStreamCall) -> None:
        is_snapshot = False
        async for response in call:
            for event in response.events:
                kind = event.WhichOneof("kind")
                if kind == "header":
                    say("connected", event.header.position)
                    is_snapshot = event.header.position == 0
                    if is_snapshot:
                        self._forget()
                elif kind == "reset":
                    say("reset")
                    is_snapshot = True
                    self._forget()
                elif kind == "entry":
                    self._take(event.entry)
                elif kind == "snapshot_end":
                    say("snapshot_end", event.snapshot_end.count)
                    is_snapshot = False
                    self._settle(event.snapshot_end.token)
                elif kind == "progress":
                    self._learn(event.progress.resolved_ms)
                    self._settle(event.progress.token)
                elif kind == "coverage":
                    say("gap", event.coverage.from_ms, event.coverage.until_ms)
                elif kind == "transition":
                    change = event.transition
                    state = fresh.State.Name(change.state).removeprefix("STATE_")
                    say("transition", UUID(bytes=change.user), state, change.at_ms)
                if is_snapshot or kind in {"header", "progress"}:
                    self._moved_at = asyncio.get_running_loop().time()

    def _forget(self) -> None:
        self._last_contact_ms.clear()
        self._resolved_ms = 0
        # Half a snapshot is nothing to go on from.
        self._token = b""

    def _take(self, entry: fresh.Entry) -> None:
        user = str(UUID(bytes=entry.user))
        state = fresh.State.Name(entry.state).removeprefix("STATE_")
        say("entry", user, state, entry.last_contact_ms, entry.last_sample_ms)
        # The silence of somebody who paused, erased or withdrew means nothing.
        if entry.state == fresh.STATE_ACTIVE:
            self._last_contact_ms[user] = entry.last_contact_ms
        else:
            self._last_contact_ms.pop(user, None)

    def _learn(self, resolved_ms: int) -> None:
        """Only a moment further than the last one is news; 0 says that the stream is catching up."""
        if self._resolved_ms < resolved_ms:
            self._resolved_ms = resolved_ms
            self._learned_at = asyncio.get_running_loop().time()
            self._failures = 0
            if self._is_stale:
                self._is_stale = False
                say("live", resolved_ms)

    def _settle(self, token: bytes) -> None:
        """All before this token was worked through: from here a later process may go on.

        A real checker writes less often, or what changed into its database, but always the token and
        its own effects in one step."""
        if token == self._token:
            return
        self._token = token
        beside = self._state.with_suffix(".new")
        beside.write_text(json.dumps({"token": token.hex(), "last_contact_ms": self._last_contact_ms}))
        os.replace(beside, self._state)

    async def _look_for_staleness(self) -> None:
        """With a connection or without: whoever learns nothing knows nothing."""
        while True:
            wait_s = self._learned_at + STALE_AFTER_S - asyncio.get_running_loop().time()
            if wait_s <= 0 and not self._is_stale:
                self._is_stale = True
                say("stale", self._resolved_ms)
            await asyncio.sleep(max(wait_s, 0.1))


async def main() -> None:
    """Connects as the development checker and follows."""
    arguments = argparse.ArgumentParser(description="Follows how fresh users are.")
    arguments.add_argument("--freshness", required=True, metavar="HOST:PORT")
    arguments.add_argument("--pki", required=True, type=Path, metavar="DIR")
    arguments.add_argument("--state", required=True, type=Path, metavar="FILE")
    given = arguments.parse_args()
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(given.pki / "ca.pem").read_bytes(),
        private_key=(given.pki / "checker-dev.key").read_bytes(),
        certificate_chain=(given.pki / "checker-dev.pem").read_bytes(),
    )
    # When to come back is decided above; the channel need not wait on its own beyond that.
    options = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 5_000)]
    async with grpc.aio.secure_channel(given.freshness, credentials, options=options) as channel:
        await Checker(fresh_grpc.FreshnessStub(channel), given.state).run()


if __name__ == "__main__":
    asyncio.run(main())
