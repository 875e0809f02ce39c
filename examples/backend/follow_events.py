"""Follows the stream `events` as a back end does: every event, in order, once, over restarts of either side.

    python -m examples.backend.follow_events --url amqps://localhost:5671/devices --ca-file .local/authority/ca.pem \\
        --password-file .local/secrets/backend.reader --place-file place.json

Prints one JSON document per line on standard output, and what happens to itself on standard error. It depends on
two members of an event, `position` and `kind`; what the others are is in docs/events.md.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, AuthenticationError, ProbableAuthenticationError
from yarl import URL

from fabric.amqp import guard

ACCOUNT = "backend.reader"
STREAM = "events"
PREFETCH = 200  # messages in hand; acks give credit and settle nothing, since a stream keeps what was read
CALL = 10.0  # seconds for one request to the broker
SILENCE = 10.0  # seconds: the message at our own place is there, so it comes at once
PATIENCE = 30.0  # seconds: what was published before its turn is published again well within them
FIRST_BACKOFF, LONGEST_BACKOFF = 0.2, 5.0  # seconds, doubled with each failure, with full jitter
HEARTBEAT = 10  # seconds

# What aio-pika raises on a connection or channel that is gone; RuntimeError is its "… closed".
LOST = (AMQPError, OSError, RuntimeError, EOFError, TimeoutError)


class GiveUp(Exception):
    """What trying again does not mend; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Place:
    """The last event that was printed: its position in the log, and its offset in the stream.

    The position is the log's own, for ever. The offset is this stream's: one that the broker made anew begins at 0.
    """

    position: int
    offset: int


@dataclass(frozen=True, slots=True)
class Event:
    place: Place
    document: dict[str, Any]


class Follower:
    """Prints events from its place on. Each attempt to read is a connection of its own.

    aio-pika's robust connection is of no use here: it attaches again at the offset that it began with.
    """

    def __init__(self, url: URL, tls: ssl.SSLContext | None, place_file: Path, count: int | None) -> None:
        self._url, self._tls, self._place_file, self._left = url, tls, place_file, count
        self._place = read_place(place_file)
        self._made_anew = False  # the stream, so that the offset of our place means nothing
        self._over_gaps = False  # what is missing has been waited for long enough
        self._failures = 0

    async def run(self) -> None:
        """Return after so many events, or never.

        Raises:
            GiveUp: the broker refuses the account, or a file can't be written.
        """
        while self._left != 0:
            session = asyncio.create_task(self._session())
            try:
                await asyncio.wait([session])
            finally:
                session.cancel()
            # What waits on a lost channel is ended by cancelling it, as if we had been told to stop.
            error = ConnectionError("the channel was closed") if session.cancelled() else session.exception()
            if isinstance(error, AuthenticationError | ProbableAuthenticationError):
                raise GiveUp(f"the broker refuses {self._url.user}: {error}")
            if isinstance(error, LOST):
                await self._back_off(error)
            elif error is not None:
                raise error

    async def _back_off(self, error: BaseException) -> None:
        self._failures = min(self._failures + 1, 16)
        if self._failures == 1:
            say(f"can't read, trying again: {type(error).__name__} {error}")
        await asyncio.sleep(random.uniform(0, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2**self._failures)))  # noqa: S311

    async def _session(self) -> None:
        connection = await aio_pika.connect(self._url, ssl_context=self._tls, timeout=CALL)
        try:
            async with asyncio.timeout(CALL):
                arrived = await self._attach(connection)
            await self._follow(arrived)
        finally:
            with suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(connection.close(), CALL)

    async def _attach(self, connection: AbstractConnection) -> "asyncio.Queue[AbstractIncomingMessage | None]":
        """The messages from our place on; None when there will be no more."""
        arrived: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()  # bounded by the prefetch
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        channel.close_callbacks.add(lambda *_: arrived.put_nowait(None))
        # A stream that is deleted ends its readers and leaves their channels open.
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda _: arrived.put_nowait(None))
        stream = await channel.get_queue(STREAM, ensure=False)
        place = self._known_place()
        await stream.consume(arrived.put, arguments={"x-stream-offset": "first" if place is None else place.offset})
        return arrived

    async def _follow(self, arrived: "asyncio.Queue[AbstractIncomingMessage | None]") -> None:
        """Print until the connection is lost, enough is printed, or reading must begin elsewhere."""
        clock = asyncio.get_running_loop().time
        # We attach at the event that we had last, not behind it: if it does not come, the stream is another one.
        expected = self._known_place()
        until = None if expected is None else clock() + SILENCE
        while self._left != 0:
            try:
                async with asyncio.timeout_at(until):
                    message = await arrived.get()
            except TimeoutError:
                if expected is not None:
                    self._begin_anew("it ends before our place")
                else:
                    self._over_gaps = True
                return
            if message is None:
                raise ConnectionError("the reading was ended")
            if self._failures:
                say("reading again")
                self._failures = 0
            await message.ack()
            event = decode(message)
            if expected is not None:
                until = None
                at = offset_of(message)
                if at in (None, expected.offset) and (event is None or event.place.position != expected.position):
                    self._begin_anew("another event is at our place")
                    return
                expected = None
            if event is None:
                continue
            early = self._place is not None and event.place.position > self._place.position + 1
            if early and not self._over_gaps:
                # It is published again, once those before it are.
                until = until or clock() + PATIENCE
            elif self._place is None or event.place.position > self._place.position:
                until = None
                self._print(event)

    def _print(self, event: Event) -> None:
        if self._place is not None and event.place.position > self._place.position + 1:
            say(
                f"the stream has lost the events {self._place.position + 1} to {event.place.position - 1}; "
                "GET /v1/events has them as long as they are kept"
            )
        try:
            print(json.dumps(event.document), flush=True)
            write_place(self._place_file, event.place)
        except OSError as error:
            raise GiveUp(f"can't write: {error}") from error
        self._place = event.place
        self._made_anew = self._over_gaps = False
        if self._left is not None:
            self._left -= 1

    def _begin_anew(self, why: str) -> None:
        assert self._place is not None  # noqa: S101 - without a place nothing is expected
        say(
            f"the stream was made anew ({why}): reading it from its first event. Those up to position "
            f"{self._place.position} are not printed again; if this is another fabric's log, delete the place file"
        )
        self._made_anew = True

    def _known_place(self) -> Place | None:
        return None if self._made_anew else self._place


def decode(message: AbstractIncomingMessage) -> Event | None:
    """The event in a message; None for anything else, such as the probes by which the fabric looks for a stream, and
    what the guard has found to be undecodable."""
    offset = offset_of(message)
    try:
        document = json.loads(message.body)
    except (ValueError, RecursionError):
        return None
    if offset is None or not isinstance(document, dict):
        return None
    position, kind = document.get("position"), document.get("kind")
    if not isinstance(position, int) or not isinstance(kind, str):
        return None
    return Event(Place(position, offset), document)


def offset_of(message: AbstractIncomingMessage) -> int | None:
    offset = message.headers.get("x-stream-offset")
    return offset if isinstance(offset, int) else None


def read_place(path: Path) -> Place | None:
    """Where we were; None at the first start.

    Raises:
        GiveUp: the file can't be read, or is not ours.
    """
    try:
        found = json.loads(path.read_bytes())
        return Place(int(found["position"]), int(found["offset"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GiveUp(f"the place file {path} can't be read: {error}") from error


def write_place(path: Path, place: Place) -> None:
    """Put it in the file at once: whatever is killed when, there is the old place or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        json.dump(asdict(place), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def say(text: str) -> None:
    print(f"follow_events: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("follow_events", description="Print the events of the fabric, one JSON per line.")
    parser.add_argument("--url", required=True, help="of the broker, amqps:// or amqp://; its path is the vhost")
    parser.add_argument("--ca-file", type=Path, help="the authority's certificate, for amqps://")
    parser.add_argument("--password-file", type=Path, required=True, help=f"of the account, {ACCOUNT} by default")
    parser.add_argument("--place-file", type=Path, required=True, help="where to remember the last event printed")
    parser.add_argument("--count", type=int, help="end after so many events")
    given = parser.parse_args(arguments)
    # Mail that breaks pamqp's decoder would end every reader of the stream, again at each attempt.
    guard.install()
    guard.check()
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # each loss is said here, once
    try:
        asyncio.run(follower(given).run())
    except GiveUp as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def follower(given: argparse.Namespace) -> Follower:
    try:
        url = URL(given.url)
        password = given.password_file.read_text().strip()
        tls = ssl.create_default_context(cafile=given.ca_file) if url.scheme == "amqps" else None
    except (OSError, ValueError) as error:
        raise GiveUp(str(error)) from error
    account = url.with_user(url.user or ACCOUNT).with_password(password)
    return Follower(account.update_query(heartbeat=HEARTBEAT), tls, given.place_file, given.count)


if __name__ == "__main__":
    sys.exit(main())
