"""The public listener over real sockets, with a bare app behind it: heads come in time and in size, or not at all."""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvicorn
import uvloop

from api.operator import authority, listener
from api.operator.listener import PublicServer
from api.operator.sockets import free_port
from tests.harness.stack import eventually

HOST = "127.0.0.1"
PATIENCE = 20.0  # seconds for what should take a fraction of one
SHORT = 0.3  # seconds instead of ten
HEAD = b"GET / HTTP/1.1\r\nHost: gateway\r\n"

Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: object, receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
    """Answers without reading a body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory, now = tmp_path_factory.mktemp("certificate"), datetime.now(UTC)
    ours = authority.make_authority("test", [HOST], now=now)
    pair = directory / "server.pem", directory / "server.key"
    authority.save(authority.issue(ours, [HOST], now=now), *pair)
    return pair


@pytest.fixture(scope="module")
def port(certificate: tuple[Path, Path]) -> Iterator[int]:
    """Of a server on uvloop, as the gateway runs it, in a thread of its own."""
    port = free_port(HOST, besides=set())
    config = uvicorn.Config(
        app, host=HOST, port=port, ssl_certfile=certificate[0], ssl_keyfile=certificate[1],
        lifespan="off", log_config=None, ws="none", timeout_keep_alive=60,
    )  # fmt: skip
    server = PublicServer(config)

    def serve() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server._serve())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listener, "HEAD_TIMEOUT", SHORT)
        patch.setattr(listener, "TLS_TIMEOUT", SHORT)
        serving = threading.Thread(target=serve)
        serving.start()
        eventually(lambda: server.started, "it listens")
        yield port
        server.should_exit = True
        serving.join(PATIENCE)
        assert not serving.is_alive()


async def connect(port: int) -> Connected:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await asyncio.open_connection(HOST, port, ssl=context)


async def answered(connected: Connected, request: bytes = HEAD + b"\r\n") -> bytes:
    reader, writer = connected
    writer.write(request)
    async with asyncio.timeout(PATIENCE):
        return (await reader.readuntil(b"ok"))[9:12]


async def cut_off(connected: Connected, drip: bytes = b"") -> float:
    """Seconds until it is cut off, though this side sends something all the time."""
    reader, writer = connected
    began = time.monotonic()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        async with asyncio.timeout(PATIENCE):
            while True:
                if drip:
                    writer.write(drip)
                with contextlib.suppress(TimeoutError):
                    if await asyncio.wait_for(reader.read(1000), SHORT / 10) == b"":
                        break
    writer.close()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("sent", "drip"),
    [(b"", b""), (b"G", b""), (b"GET /", b"x"), (HEAD, b"a: b\r\n"), (HEAD + b"a: ", b"b")],
    ids=["nothing", "a letter", "an address without end", "headers without end", "a header without end"],
)
async def test_a_head_that_does_not_end_is_cut_off(port: int, sent: bytes, drip: bytes) -> None:
    connected = await connect(port)
    connected[1].write(sent)
    assert await cut_off(connected, drip) >= SHORT / 2


async def test_silence_before_tls_is_cut_off(port: int) -> None:
    await cut_off(await asyncio.open_connection(HOST, port))


async def test_a_second_head_is_timed_too(port: int) -> None:
    connected = await connect(port)
    for _ in range(3):
        assert await answered(connected) == b"200"
        await asyncio.sleep(SHORT / 3)
    await cut_off(connected, b"x")


@pytest.mark.parametrize("framing", [b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_goes_on_after_the_answer_is_cut_off(port: int, framing: bytes) -> None:
    connected = await connect(port)
    assert await answered(connected, b"POST / HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n") == b"200"
    await cut_off(connected, b"1\r\nx\r\n")


@pytest.mark.parametrize(
    "endless",
    [b"a: " + b"b" * 100, b"a: b\r\n" * 20],
    ids=["one header", "many headers"],
)
async def test_a_head_has_a_size(port: int, monkeypatch: pytest.MonkeyPatch, endless: bytes) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT", PATIENCE)  # the next connection's
    connected = await connect(port)
    connected[1].write(HEAD)
    sent = 0
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        async with asyncio.timeout(PATIENCE):
            while not connected[0].at_eof():
                connected[1].write(endless * 100)
                await connected[1].drain()
                sent += len(endless) * 100
                await asyncio.sleep(0)
    connected[1].close()
    assert sent < 20_000_000


async def test_trailers_have_a_size_too(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT", PATIENCE)
    connected = await connect(port)
    request = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    assert await answered(connected, request) == b"200"
    await cut_off(connected, b"a: b\r\n" * 1000)


async def test_who_has_waited_longest_makes_room_and_callers_are_served(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEAD_TIMEOUT", PATIENCE * 2)
    monkeypatch.setattr(listener, "MOST_WAITING", 5)
    silent = [await connect(port) for _ in range(12)]
    assert await answered(await connect(port)) == b"200"
    for each in silent[:7]:
        await cut_off(each)
    assert not any(reader.at_eof() for reader, _ in silent[-4:])
    assert await answered(silent[-1]) == b"200", "the latest are not cut off"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", list(ssl.TLSVersion)[2:-1], ids=lambda version: version.name)
async def test_tls_is_1_2_or_later(port: int, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # or this side would not even ask
    context.minimum_version = context.maximum_version = version
    try:
        connected = await asyncio.open_connection(HOST, port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        assert version < ssl.TLSVersion.TLSv1_2
    else:
        assert version >= ssl.TLSVersion.TLSv1_2
        assert await answered(connected) == b"200"
        connected[1].close()
