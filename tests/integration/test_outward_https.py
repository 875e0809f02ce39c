"""Keys over HTTPS from a real server: what is refused, and to which address the connection goes."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_network
from pathlib import Path

import pytest

from fabric.errors import ProviderUnavailable
from fabric.outward import https
from fabric.outward.https import HttpsKeySource
from tests.harness.provider import JwksServer

LOOPBACK = (ip_network("127.0.0.0/8"),)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JwksServer]:
    with JwksServer(tmp_path_factory.mktemp("idp")).running() as server:
        yield server


@pytest.fixture
def server(running: JwksServer) -> JwksServer:
    running.asked.clear()
    running.answer, running.document = running.plainly, b'{"keys": []}'
    return running


class Names:
    """Plays DNS: a name's addresses at each question, the last ones for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers, self.asked = list(answers), 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def source(server: JwksServer, host: str = "localhost", private: tuple = LOOPBACK, **more: object) -> HttpsKeySource:  # type: ignore[type-arg]
    return HttpsKeySource(server.url(host), private, server.authority, **more)  # type: ignore[arg-type]


async def test_it_reads_the_document(server: JwksServer) -> None:
    assert await source(server).fetch() == b'{"keys": []}'
    assert server.asked == ["/keys"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]", "0.0.0.0", "169.254.169.254", "[::ffff:169.254.169.254]", "2852039166", "10.0.0.1",
        "[fd00:ec2::254]", "[64:ff9b::7f00:1]", "[fe80::1]",
    ],
)  # fmt: skip
async def test_no_private_address_is_called_however_it_is_written(server: JwksServer, host: str) -> None:
    with pytest.raises(ProviderUnavailable, match="no address that may be called"):
        await source(server, host, private=()).fetch()
    assert server.asked == []


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "0.0.0.0", "::", "100.100.100.200"])
async def test_some_are_not_called_wherever_they_are_allowed(server: JwksServer, address: str) -> None:
    everything = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    with pytest.raises(ProviderUnavailable, match="no address that may be called"):
        await source(server, "idp.example", private=everything, resolve=Names([address])).fetch()


async def test_a_name_is_resolved_once_and_its_answer_is_what_is_called(server: JwksServer) -> None:
    """An answer that changes once it was looked at changes nothing."""
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    rebound = source(server, "idp.example", resolve=names)
    assert await rebound.fetch() == b'{"keys": []}'
    assert names.asked == 1
    with pytest.raises(ProviderUnavailable, match="no address that may be called"):
        await rebound.fetch()
    assert names.asked == 2


async def test_of_several_addresses_only_good_ones_are_called(server: JwksServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", server.port))  # nobody listens
        names = Names(["169.254.169.254", "10.0.0.1", "127.0.0.2", "127.0.0.1"])
        assert await source(server, "idp.example", resolve=names).fetch() == b'{"keys": []}'


async def test_the_name_is_checked_whatever_its_address(server: JwksServer) -> None:
    with pytest.raises(ProviderUnavailable):
        await source(server, "other.example", resolve=Names(["127.0.0.1"])).fetch()
    assert server.asked == []


async def test_the_authority_is_checked(server: JwksServer) -> None:
    with pytest.raises(ProviderUnavailable):
        await HttpsKeySource(server.url(), LOOPBACK).fetch()
    assert server.asked == []


def test_an_authority_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    for path in (tmp_path / "bad.pem", tmp_path / "missing.pem"):
        with pytest.raises(OSError):  # noqa: PT011 - whichever it is
            HttpsKeySource("https://idp.example", (), path)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 204, 404, 500])
async def test_only_200_is_an_answer(server: JwksServer, status: int) -> None:
    other = {"Location": server.url("localhost") + "/elsewhere"}
    server.answer = lambda request: server.send(request, b"", status, other)
    with pytest.raises(ProviderUnavailable, match=str(status)):
        await source(server).fetch()
    assert server.asked == ["/keys"], "it followed"


async def test_an_answer_has_a_bound(server: JwksServer) -> None:
    server.document = b" " * https.MAX_BODY
    assert len(await source(server).fetch()) == https.MAX_BODY
    server.document += b" "
    with pytest.raises(ProviderUnavailable, match="bytes"):
        await source(server).fetch()


async def test_an_answer_without_an_end_is_left(server: JwksServer) -> None:
    sent = []

    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b" " * 65_536)
            sent.append(65_536)

    server.answer = endless
    with pytest.raises(ProviderUnavailable, match="bytes"):
        await source(server).fetch()
    assert sum(sent) < 64_000_000


async def test_an_encoded_answer_is_not_read(server: JwksServer) -> None:
    """A small one may become a large one."""
    server.answer = lambda request: server.send(request, b"x" * 20, headers={"Content-Encoding": "gzip"})
    with pytest.raises(ProviderUnavailable, match="encoded"):
        await source(server).fetch()


async def test_time_is_up_however_it_drips(server: JwksServer, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not over.wait(0.05):
            request.wfile.write(b" ")

    assert https.WITHIN == 3.0
    monkeypatch.setattr(https, "WITHIN", 0.5)
    server.answer = drip
    began = time.monotonic()
    try:
        with pytest.raises(ProviderUnavailable, match="within"):
            await source(server).fetch()
    finally:
        over.set()
    assert time.monotonic() - began < 20


async def test_time_is_up_when_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "WITHIN", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ProviderUnavailable, match="within"):
            await HttpsKeySource(f"https://127.0.0.1:{silent.getsockname()[1]}/", LOOPBACK).fetch()


async def test_no_proxy_of_the_environment_is_used(server: JwksServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await source(server).fetch() == b'{"keys": []}'


async def test_what_speaks_no_tls_or_no_http_is_unavailable(server: JwksServer) -> None:
    server.answer = lambda request: request.wfile.write(b"\x00\x01 nonsense\r\n\r\n")  # type: ignore[assignment]
    with pytest.raises(ProviderUnavailable):
        await source(server).fetch()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(ProviderUnavailable):
            await HttpsKeySource(f"https://127.0.0.1:{nobody.getsockname()[1]}/", LOOPBACK).fetch()
