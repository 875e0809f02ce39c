"""Readings: the bounded buffer, the values, the `system` channel, and the local socket they may come through."""

import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from device_agent import control, errors, log, system, telemetry
from topology import names, wire


class FakeLoop:
    """A link without a broker: what is published is confirmed when the test says so."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[tuple[str, wire.Message, Callable[[bool], None]]] = []
        self.writes = 0
        self.held: list[Callable[[], None]] | None = None  # what waits for the loop's next turn; None: nothing does

    def call(self, function: Callable[[], None]) -> None:
        if self.held is None:
            function()
        else:
            self.held.append(function)

    soon = call

    def turn(self) -> None:
        held, self.held = self.held or [], None
        for function in held:
            function()

    @contextmanager
    def together(self) -> Iterator[None]:
        before = len(self.sent)
        yield
        self.writes += len(self.sent) > before

    def later(self, delay: float, function: Callable[..., None], *arguments: object) -> None:
        return

    def publish(self, key: str, message: wire.Message, done: Callable[[bool], None]) -> bool:
        if self.up:
            self.sent.append((key, message, done))
        return self.up


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def buffer(loop: FakeLoop) -> telemetry.Telemetry:
    return telemetry.Telemetry(loop, names.DeviceId("garage-7"))  # type: ignore[arg-type]  # plays the link's part


def test_a_reading_is_done_when_it_is_confirmed(buffer: telemetry.Telemetry, loop: FakeLoop) -> None:
    future = buffer.offer("door.state", b"1", wire.JSON, 7)
    ((key, message, done),) = loop.sent
    assert key == "telemetry.garage-7.door.state"
    assert wire.decode_reading(message).at == 7
    assert not future.done()
    done(True)
    assert future.result(0) is None
    assert buffer.idle


def test_what_waits_is_bounded_and_the_error_is_clear(buffer: telemetry.Telemetry, loop: FakeLoop) -> None:
    loop.up = False
    for _ in range(telemetry.MAX_READINGS):
        buffer.offer("door", b"1", wire.JSON, 7)
    with pytest.raises(errors.BufferFull, match="wait for the broker"):
        buffer.offer("door", b"1", wire.JSON, 7)
    loop.up = True
    buffer.pump()
    assert len(loop.sent) == telemetry.WINDOW
    for _, _, done in loop.sent:
        done(True)
    assert buffer.offer("door", b"1", wire.JSON, 7)


def test_what_is_offered_or_confirmed_in_one_turn_leaves_in_one_write(
    buffer: telemetry.Telemetry, loop: FakeLoop
) -> None:
    loop.held = []
    for number in range(telemetry.MAX_READINGS):
        buffer.offer("door", str(number).encode(), wire.JSON, 7)
    assert len(loop.held) == 1, "the first one calls"
    loop.turn()
    assert (len(loop.sent), loop.writes) == (telemetry.WINDOW, 1)
    loop.held = []
    for _, _, done in loop.sent[:50]:
        done(True)
    loop.turn()
    assert (len(loop.sent), loop.writes) == (telemetry.WINDOW + 50, 2)
    for number in range(50, telemetry.MAX_READINGS):
        loop.sent[number][2](True)
    assert buffer.idle
    assert [message.body for _, message, _ in loop.sent] == [str(n).encode() for n in range(telemetry.MAX_READINGS)]


def test_bytes_are_bounded_too(buffer: telemetry.Telemetry, loop: FakeLoop) -> None:
    loop.up = False
    for _ in range(telemetry.MAX_BYTES // wire.MAX_BODY):
        buffer.offer("door", bytes(wire.MAX_BODY), wire.JSON, 7)
    with pytest.raises(errors.BufferFull):
        buffer.offer("door", b"1", wire.JSON, 7)


def test_what_was_lost_is_sent_again_under_the_same_id(buffer: telemetry.Telemetry, loop: FakeLoop) -> None:
    buffer.offer("door", b"1", wire.JSON, 7)
    loop.up = False
    loop.sent[0][2](False)
    loop.up = True
    buffer.pump()
    first, second = loop.sent
    assert first[1].message_id == second[1].message_id


@pytest.mark.parametrize("channel", ["Door", "door/x", "", "a..b", "x" * 129, "door\n"])
def test_a_channel_outside_the_grammar_is_refused(buffer: telemetry.Telemetry, channel: str) -> None:
    with pytest.raises(errors.InvalidValue):
        buffer.offer(channel, b"1", wire.JSON, 7)


def test_values() -> None:
    assert telemetry.encode({"a": 1}, None) == (b'{"a":1}', wire.JSON)
    assert telemetry.encode(b"\x00", "image/png") == (b"\x00", "image/png")
    for value, kind in ((float("nan"), None), (object(), None), ({}, "image/png")):
        with pytest.raises(errors.InvalidValue):
            telemetry.encode(value, kind)


def test_the_system_channel_reads_this_machine() -> None:
    reading: dict[str, Any] = system.read(Path("/"))
    assert len(reading["load"]) == 3
    assert 0 < reading["memory"]["available"] <= reading["memory"]["total"]
    assert 0 < reading["disk"]["available"] <= reading["disk"]["total"]
    assert reading["uptime"] > 0


def test_absent_sensors_are_left_out(tmp_path: Path) -> None:
    reading = system.read(tmp_path / "missing", tmp_path, tmp_path, tmp_path)
    assert reading.keys() <= {"cpus"}


def test_temperatures_are_read_by_name(tmp_path: Path) -> None:
    for number, (kind, value) in enumerate((("cpu", "45500"), ("cpu", "46000"), ("broken", "x"))):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "type").write_text(kind + "\n")
        (zone / "temp").write_text(value + "\n")
    reading = system.read(tmp_path, tmp_path, tmp_path, tmp_path / "none")
    assert reading["temperature"] == {"cpu": 45.5, "cpu-2": 46.0}


@pytest.fixture
def offered() -> list[tuple[str, bytes]]:
    return []


@pytest.fixture
def served(tmp_path: Path, offered: list[tuple[str, bytes]]) -> Any:
    def publish(channel: str, body: bytes, content_type: str, at: int | None) -> "Future[None]":
        telemetry.check(channel, body, content_type)
        offered.append((channel, body))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    server = control.ControlServer(tmp_path, lambda: {"running": True}, publish)
    server.start()
    yield tmp_path
    server.stop()


def test_the_local_socket_is_its_owners_alone(served: Path) -> None:
    assert stat.S_IMODE((served / "control.sock").stat().st_mode) == 0o600


def test_readings_and_status_go_through_the_local_socket(served: Path, offered: list[tuple[str, bytes]]) -> None:
    client = control.connect(served)
    assert client is not None
    client.publish("door", b"\x00\xff", "image/png", None)
    with pytest.raises(errors.InvalidValue):
        client.publish("Door", b"", "image/png", None)
    assert client.status() == {"running": True}
    client.close()
    assert offered == [("door", b"\x00\xff")]


@pytest.mark.parametrize(
    "line", [b"x", b"[]", b"{}", b'{"do": "dance"}', b'{"do": "publish"}', b"[" * 100_000, b"\xff"]
)
def test_nonsense_on_the_local_socket_is_answered(served: Path, line: bytes) -> None:
    client = control.connect(served)
    assert client is not None
    client._socket.sendall(line + b"\n")
    assert b'"error"' in client._lines.readline()
    assert client.status() == {"running": True}
    client.close()


def test_nobody_serves_a_stopped_agents_socket(tmp_path: Path) -> None:
    assert control.connect(tmp_path) is None


def test_a_log_line_can_not_be_forged() -> None:
    line = log.line("mail.junk", {"id": 'x\n2026 INFO forged "\x1b[31m\u202e', "n": 3, "long": "y" * 1_000})
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.isascii()
    assert len(line) < 500
