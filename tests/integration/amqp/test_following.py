"""The example that follows the stream `events`: what it makes of repetitions, gaps and a stream made anew."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from yarl import URL

from examples.backend import follow_events
from examples.backend.follow_events import Follower, GiveUp, Place, read_place, write_place
from fabric.amqp import guard
from fabric.amqp.declarer import declare_queue
from fabric.amqp.publisher import AmqpPublisher
from tests.harness.broker import LOOPBACK, Broker, eventually
from tests.harness.rawamqp import RawClient, properties, short
from topology import access, layout, names
from topology.wire import Message

(EVENTS,) = (queue for queue in layout.QUEUES if queue.name == names.EVENTS)


class Reader:
    """The example in this process, on the account of back ends; each run is a start of its own."""

    def __init__(self, broker: Broker, place_file: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.place_file = place_file
        self._broker, self._capture = broker, capture
        self.said = ""
        self.printed: list[int] = []

    async def run(self, count: int) -> list[int]:
        """The positions that it prints."""
        async with asyncio.timeout(60):
            await self.follower(count).run()
        return self.read()

    @asynccontextmanager
    async def running(self, count: int) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(self.follower(count).run())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def follower(self, count: int, password: str | None = None) -> Follower:
        guard.install()
        url = URL.build(
            scheme="amqp",
            host=LOOPBACK,
            port=self._broker.node.amqp_port,
            path=f"/{names.VHOST}",
            user=access.BACKEND,
            password=password or self._broker.node.password(access.BACKEND),
        )
        return Follower(url, None, self.place_file, count)

    def has_printed(self, count: int) -> bool:
        self.read()
        return len(self.printed) == count

    def read(self) -> list[int]:
        out, err = self._capture.readouterr()
        self.said += err
        new = [json.loads(line)["position"] for line in out.splitlines()]
        self.printed += new
        return new


@pytest.fixture
def reader(
    broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Reader:
    monkeypatch.setattr(follow_events, "SILENCE", 2.0)
    monkeypatch.setattr(follow_events, "PATIENCE", 1.0)
    return Reader(broker, tmp_path / "place.json", capsys)


@pytest.fixture
async def stream(publisher: AmqpPublisher, broker: Broker) -> None:
    """An empty stream `events`."""
    await make_anew(publisher, broker)


async def make_anew(publisher: AmqpPublisher, broker: Broker) -> None:
    await publisher.delete_queue(names.EVENTS)
    async with broker.link("declare") as link, link.throwaway() as channel:
        await declare_queue(channel, EVENTS)


async def publish(publisher: AmqpPublisher, *positions: int) -> None:
    for position in positions:
        body = json.dumps({"position": position, "kind": "command.queued"}).encode()
        await publisher.publish("", names.EVENTS, Message("command.queued", {}, body))


@pytest.mark.usefixtures("stream")
async def test_each_start_goes_on_behind_the_last_event(publisher: AmqpPublisher, reader: Reader) -> None:
    await publish(publisher, *range(1, 8))
    assert await reader.run(3) == [1, 2, 3]
    assert read_place(reader.place_file) == Place(3, 2)
    assert await reader.run(1) == [4]
    assert await reader.run(3) == [5, 6, 7]
    assert reader.said == ""


@pytest.mark.usefixtures("stream")
async def test_the_first_event_may_have_any_position(publisher: AmqpPublisher, reader: Reader) -> None:
    await publish(publisher, 17, 18)
    assert await reader.run(2) == [17, 18]


@pytest.mark.usefixtures("stream")
async def test_repetitions_are_dropped_and_each_event_has_its_turn(publisher: AmqpPublisher, reader: Reader) -> None:
    # As a sequencer leaves it whose broker was killed in the middle of a batch, twice.
    await publish(publisher, 1, 2, 2, 5, 6, 1, 2, 5, 3, 4, 5, 6, 7)
    assert await reader.run(4) == [1, 2, 3, 4]
    assert await reader.run(3) == [5, 6, 7]
    assert reader.said == ""


@pytest.mark.usefixtures("stream")
async def test_what_stays_away_is_said_to_be_lost(publisher: AmqpPublisher, reader: Reader) -> None:
    await publish(publisher, 1, 2, 6, 7, 8)
    assert await reader.run(5) == [1, 2, 6, 7, 8]
    assert "has lost the events 3 to 5" in reader.said


@pytest.mark.usefixtures("stream")
async def test_what_is_no_event_is_passed_over(publisher: AmqpPublisher, reader: Reader, broker: Broker) -> None:
    await publish(publisher, 1)
    await publisher.publish("", names.EVENTS, Message("probe"))
    for body in (b"\xff", b"[1]", b'{"position": "2"}', b"[" * 100_000):
        await publisher.publish("", names.EVENTS, Message("other", {}, body))
    with RawClient(LOOPBACK, broker.node.amqp_port) as client:
        client.login(access.WORKER, broker.node.password(access.WORKER))
        client.open_channel(confirms=True)
        client.publish("", names.EVENTS, b"poison", properties(correlation_id=short(b"\xff")))
        assert client.confirmed()
    await publish(publisher, 2)
    assert await reader.run(1) == [1]
    assert await reader.run(1) == [2]


@pytest.mark.parametrize("again", [(6, 7), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10, 11)], ids=["shorter", "as long", "longer"])
@pytest.mark.usefixtures("stream")
async def test_a_stream_made_anew_is_read_from_its_first_event(
    publisher: AmqpPublisher, reader: Reader, broker: Broker, again: tuple[int, ...]
) -> None:
    await publish(publisher, 1, 2, 3, 4, 5)
    assert await reader.run(5) == [1, 2, 3, 4, 5]
    await make_anew(publisher, broker)
    await publish(publisher, *again)
    assert await reader.run(2) == [6, 7]
    assert "was made anew" in reader.said
    assert "lost the events" not in reader.said
    assert read_place(reader.place_file) == Place(7, again.index(7))


@pytest.mark.usefixtures("stream")
async def test_the_stream_is_made_anew_while_it_is_read(
    publisher: AmqpPublisher, reader: Reader, broker: Broker
) -> None:
    await publish(publisher, 1, 2, 3)
    async with reader.running(6) as task:
        await eventually(lambda: reader.has_printed(3))
        await make_anew(publisher, broker)
        await publish(publisher, 4, 5, 6)
        await asyncio.wait([task], timeout=30)
        assert task.done()
    reader.read()
    assert reader.printed == [1, 2, 3, 4, 5, 6]
    assert "was made anew" in reader.said


@pytest.mark.usefixtures("stream")
async def test_a_refused_account_and_an_unusable_file_are_no_loss(
    publisher: AmqpPublisher, reader: Reader, tmp_path: Path
) -> None:
    with pytest.raises(GiveUp, match=r"refuses backend\.reader"):
        await reader.follower(1, "wrong").run()
    await publish(publisher, 1)
    reader.place_file = tmp_path / "nowhere" / "place.json"
    with pytest.raises(GiveUp, match="can't write"):
        await reader.follower(1).run()
    reader.place_file = tmp_path / "broken.json"
    for text in ("", "[]", '{"position": 1}', '{"position": "x", "offset": 1}', "null"):
        reader.place_file.write_text(text)
        with pytest.raises(GiveUp, match="can't be read"):
            reader.follower(1)


def test_a_place_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "place.json"
    assert read_place(file) is None
    for place in (Place(1, 0), Place(2**62, 2**62)):
        write_place(file, place)
        assert read_place(file) == place
    assert list(tmp_path.iterdir()) == [file]
