"""Text that means something to whoever shows or carries it: in reports, in content types, in ids and addresses."""

import http.client
import itertools
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import proton
import pytest

from tests.harness.broker import evaluate
from tests.harness.device import Device, all_at_once, until_closed
from tests.harness.rawamqp import RawClient, field, long, properties, short
from tests.harness.stack import RunningStack, eventually
from topology import names, wire

EVIL = '\r\n\nevent: forged\ndata: {}\n\n2026-01-01T00:00:00Z INFO forged=1\x1b[2J\x1b]0;x\x07\u202e\x9b"}'
REFUSED = (400, 403, 404, 405, 415, 422)
CONTROL = {*range(0x20), 0x7F, *range(0x80, 0xA0)} - {0x0A}


@pytest.fixture(scope="module")
def device(stack: RunningStack) -> Device:
    return Device.enrolled(stack, "injector")


def queued(stack: RunningStack, device: Device) -> str:
    command = stack.send(device.id, "note", {}, ttl=600)
    eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
    return str(command["id"])


def say(client: RawClient, device: Device, command: str, reason: bytes, content_type: bytes = b"text/plain") -> None:
    """An outcome of the device's own command, in the contract's form but for what is given."""
    told = {"v": wire.VERSION, "at": int(time.time() * 1000), "agent": device.agent, "status": "failed"}
    headers = b"".join(short(name) + field(value) for name, value in told.items())
    headers += short("reason") + b"S" + long(reason)
    given = properties(
        content_type=short(content_type),
        headers=long(headers),
        correlation_id=short(command),
        type=short("outcome"),
        user_id=short(device.id),
    )
    client.publish(names.UPLINK, names.outcome_key(names.DeviceId(device.id)), b"jammed", given)
    assert client.confirmed()


def restante(stack: RunningStack, *arguments: str) -> bytes:
    """What the operator's command prints for a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "api.operator.cli", "--state-dir", str(stack.stack.files.state_dir), *arguments],
        capture_output=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_reason_is_text_and_nothing_else(stack: RunningStack, device: Device) -> None:
    """In the answer, in events, in logs at the level `debug`, and on the operator's terminal."""
    command = queued(stack, device)
    with device.raw() as client, stack.http.stream("GET", "/v1/events", params={"device": device.id}) as events:
        say(client, device, command, EVIL.encode())
        lines = list(itertools.takewhile(lambda line: line != "event: command.failed", events.iter_lines()))
    assert lines
    assert not any("forged" in line for line in lines), "of its own, not within another's data"
    shown = stack.command(command)
    assert "forged" in shown["outcome"]["reason"]
    printed = restante(stack, "command", "get", command)
    assert b"forged" in printed, "the control"
    assert not CONTROL & set(printed.decode())
    for log in ("gateway.log", "worker.log"):
        content = (stack.stack.files.state_dir / log).read_bytes()
        assert not any(code in content for code in (b"\x1b", b"\x07", b"\xc2\x9b", "\u202e".encode()))
        assert not any(line.startswith((b"event: forged", b"2026-01-01T00:00:00Z")) for line in content.splitlines())


BAD_TYPES = {
    "CR LF": b"text/plain\r\nSet-Cookie: a=b",
    "LF": b"text/plain\nx: y",
    "255 bytes": b"a/" + b"b" * 253,
    "no slash": b"text",
    "not UTF-8": b"text/\xff",
    "NUL": b"text/plain\x00",
    "a comment of its own": b'text/plain; x="\r\n"',
    "empty": b"",
}


def test_a_content_type_is_one(stack: RunningStack, device: Device) -> None:
    """What is none is kept in quarantine, and its command stays as it was."""
    commands = {what: queued(stack, device) for what in BAD_TYPES}
    good = queued(stack, device)
    with device.raw() as client:
        for what, command in commands.items():
            say(client, device, command, b"jammed", BAD_TYPES[what])
        say(client, device, good, b"jammed")
    eventually(lambda: stack.command(good)["state"] == "failed", "the right one is heard, behind the others")
    assert {what: stack.command(command)["state"] for what, command in commands.items()} == dict.fromkeys(
        commands, "queued"
    )


@pytest.mark.parametrize("content_type", ["a/" + "b" * 300, "text", "text/plain, a/b", 'text/plain; x="\\"'])
def test_nor_does_a_caller_choose_another(stack: RunningStack, device: Device, content_type: str) -> None:
    path = f"/v1/devices/{device.id}/commands?name=note&ttl=5"
    answer = stack.http.post(path, content=b"x", headers={"Content-Type": content_type})
    assert answer.status_code in (415, 422), answer.text


LONG = proton.symbol("x" * 300)
BREAKING: dict[str, dict[str, Any]] = {
    "content type": {"content_type": LONG},
    "content encoding": {"content_encoding": LONG},
    "a character": {"properties": {"a": proton.char("x")}},
}


def test_what_only_fits_into_1_0_silences_nobody(stack: RunningStack, device: Device) -> None:
    """The broker fails when it translates these for a reader in 0-9-1, and ends that reader's connection at each
    delivery. They can't be sent, since it opens no connection in 1.0."""
    good, readers = queued(stack, device), consumers(stack, names.REPORTS)
    key = names.outcome_key(names.DeviceId(device.id))

    def send(given: dict[str, Any]) -> bytes:
        with all_at_once(
            device, f"/exchanges/{names.UPLINK}/{key}", proton.Message(body=b"null", **given).encode()
        ) as it:
            return until_closed(it.socket)

    with ThreadPoolExecutor(len(BREAKING)) as pool:  # the broker lets each wait for three seconds
        answers = list(pool.map(send, BREAKING.values()))
    assert all(answer.endswith(b"AMQP\0\x01\0\0") for answer in answers), "logged in, and nothing opened"
    with device.raw() as client:
        say(client, device, good, b"jammed")
    eventually(lambda: stack.command(good)["state"] == "failed", "the right one is heard, behind all of these")
    assert consumers(stack, names.REPORTS) == readers, "the worker has lost its connection"


def consumers(stack: RunningStack, queue: str) -> str:
    """Who consumes from it, with their channels."""
    broker = stack.stack.broker
    assert broker is not None
    found = evaluate(
        broker,
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{names.VHOST}">>, queue, <<"{queue}">>)),'
        " lists:sort([element(1, C) || C <- rabbit_amqqueue:consumers(Q)]).",
    )
    assert "<" in found, found
    return found


# ---- Ids and addresses -------------------------------------------------------------------------------

NO_IDS = (
    "..%2f..%2fdevices", "%2e%2e", "..", ".", "a%2fb", "a%2Fkeys", "a%5cb", "%00", "a%00", "a%0d%0aSet-Cookie:%20a=b",
    "a;b=c", "a;", "%3b", "a%3fb", "a%23b", "a%20", "%20a", "a%252fb", "*", "%", "%zz", "'%20OR%201=1--", "{}", "$ne",
    "%EF%BD%81", "%D9%A1%D9%A2", "%C2%B2", "caf%C3%A9", "%F0%9F%98%80", "%ff%fe", "%C0%AE", "A", "a" * 129, "a" * 5000,
)  # fmt: skip


def routes(stack: RunningStack) -> Iterator[tuple[str, str, str]]:
    """(method, path, name of the parameter) of each route that has one."""
    for path, methods in stack.ok(stack.http.get("/openapi.json"))["paths"].items():
        for name in re.findall(r"{(\w+)}", path):
            for method in methods:
                yield method.upper(), path, name


def test_an_id_is_an_id_in_every_address(stack: RunningStack, device: Device) -> None:
    """Each parameter of each route, the others right: a refusal that changes nothing and echoes nothing."""
    right = {"id": device.id, "channel": "probe", "kid": device.kid, "jti": str(uuid.UUID(int=0)), "subject": "probe"}
    before = stack.http.get(f"/v1/devices/{device.id}").headers["etag"]
    found = list(routes(stack))
    assert len(found) > 10
    url = urlsplit(stack.stack.settings.api_url)
    assert url.hostname is not None
    connection = http.client.HTTPSConnection(url.hostname, url.port, context=stack.context, timeout=20)
    for method, path, name in found:
        for bad in (*NO_IDS, "a" * 64) if name == "id" else NO_IDS:
            address = path.replace(f"{{{name}}}", bad)
            for other, value in right.items():
                address = address.replace(f"{{{other}}}", value)
            # Not httpx, which would put such an address right before it sends it.
            connection.request(method, address, b"{}", {"Authorization": f"Bearer {stack.token}"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status in REFUSED, (method, address, answer.status, content)
            assert answer.headers.get_all("Set-Cookie") is None
            assert answer.headers["content-type"].startswith(("application/problem+json", "text/plain"))
            if answer.will_close:
                connection.close()
    connection.close()
    assert stack.http.get(f"/v1/devices/{device.id}").headers["etag"] == before
