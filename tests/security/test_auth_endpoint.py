"""The broker's auth endpoint, asked directly: the answer is `allow` or `deny`, and `deny` unless all is well."""

import socket
import time
from collections.abc import Mapping
from urllib.parse import quote, urlencode

import httpx
import pytest

from tests.harness.device import Device
from tests.harness.stack import RunningStack
from topology import access, layout, names

QUESTIONS = ("user", "vhost", "resource", "topic")
Fields = Mapping[str, str]


class Endpoint:
    def __init__(self, stack: RunningStack) -> None:
        settings = stack.stack.settings
        self.address = (settings.auth_host, settings.auth_port)
        self.http = httpx.Client(base_url=f"http://{settings.auth_host}:{settings.auth_port}/broker/auth", timeout=10)

    def ask(self, question: str, form: bytes | Fields) -> bytes:
        """The answer, checked to be nothing but one of the two words."""
        body = form if isinstance(form, bytes) else urlencode(form).encode()
        answer = self.http.post(
            f"/{question}", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert answer.status_code == 200
        assert answer.content in (b"allow", b"deny"), answer.content
        assert answer.headers["content-type"] == "text/plain"
        assert set(answer.headers) <= {"content-type", "content-length", "date", "connection"}
        assert answer.headers["connection"] == "close", "no question waits behind another"
        return answer.content


@pytest.fixture(scope="module")
def endpoint(stack: RunningStack) -> Endpoint:
    return Endpoint(stack)


def allowed(device: Device, question: str) -> dict[str, str]:
    """The fields of a question whose answer is `allow`."""
    common = {"username": device.id, "vhost": names.VHOST}
    match question:
        case "user":
            return {"username": device.id, "password": device.token()}
        case "vhost":
            return common | {"ip": "127.0.0.1", "tags": ""}
        case "resource":
            return common | {"resource": "queue", "name": device.mailbox, "permission": "read", "tags": ""}
        case _:
            return common | {
                "resource": "topic",
                "name": names.UPLINK,
                "permission": "write",
                "routing_key": f"receipt.{device.id}",
                "tags": "",
            }


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_control(endpoint: Endpoint, attacker: Device, question: str) -> None:
    assert endpoint.ask(question, allowed(attacker, question)) == b"allow"


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "name",
    [
        *(account.name for account in access.ACCOUNTS),
        "",
        " ",
        "ATTACKER",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "a.b",
        "*",
        ".*",
        "a" * 64,
        "-a",
        "_a",
        "a/../b",
        "ａ",
        "администратор",
    ],
)
def test_a_name_outside_the_grammar_is_denied_whatever_else_is_right(
    endpoint: Endpoint, attacker: Device, question: str, name: str
) -> None:
    fields = allowed(attacker, question) | {"username": name}
    if question == "resource":
        fields["name"] = f"mailbox.{name}"
    if question == "topic":
        fields["routing_key"] = f"receipt.{name}"
    assert endpoint.ask(question, fields) == b"deny"


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_field_matters(endpoint: Endpoint, attacker: Device, question: str) -> None:
    """Absent, empty or said twice: denied. `tags` and `ip` are the broker's business."""
    fields = allowed(attacker, question)
    needed = [name for name in fields if name not in ("tags", "ip")]
    for name in needed:
        without = {other: value for other, value in fields.items() if other != name}
        assert endpoint.ask(question, without) == b"deny", f"without {name}"
        assert endpoint.ask(question, fields | {name: ""}) == b"deny", f"empty {name}"
    for name, value in fields.items():
        whole = urlencode(fields).encode()
        twice = f"{name}={quote(value, safe='')}".encode()
        assert endpoint.ask(question, whole + b"&" + twice) == b"deny", f"{name} twice"
        assert endpoint.ask(question, twice + b"&" + whole) == b"deny", f"{name} twice"
        hidden = f"%{ord(name[0]):02x}{name[1:]}={quote(value, safe='')}".encode()
        assert endpoint.ask(question, whole + b"&" + hidden) == b"deny", f"{name} twice, encoded"


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("vhost", ["/", "other", "DEVICES", "devices/", "devices\n", "devices ", "%64evices", ""])
def test_another_vhost_is_denied(endpoint: Endpoint, attacker: Device, question: str, vhost: str) -> None:
    assert endpoint.ask(question, allowed(attacker, question) | {"vhost": vhost}) == b"deny"


def test_passwords_that_are_none(endpoint: Endpoint, attacker: Device, victim: Device, stack: RunningStack) -> None:
    token = attacker.token()
    for password in (
        "",
        " ",
        attacker.id,
        "null",
        stack.token,
        attacker.api_token(),
        victim.token(),
        f" {attacker.token()}",
        f"{attacker.token()}\n",
        f"{attacker.token()}\0",
        token + "A" * (3073 - len(token)),
        "A" * 3073,
        "é" * 1600,
        "..",
        "{}.{}.{}",
        "e30.e30.e30",
    ):
        assert endpoint.ask("user", {"username": attacker.id, "password": password}) == b"deny", password[:40]
    assert endpoint.ask("user", {"username": victim.id, "password": attacker.token()}) == b"deny"
    assert endpoint.ask("user", {"username": "guest", "password": "guest"}) == b"deny"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"&",
        b"=",
        b"username",
        b"username=%",
        b"username=%G0",
        b"username=%ff&vhost=devices",
        b"username=%C0%AF&vhost=devices",
        b"\xff\xfe=\x00",
        b"username=a;vhost=devices",
        b'{"username": "a", "vhost": "devices"}',
        b"username[]=a&vhost=devices",
        b"&".join(b"f%d=1" % number for number in range(100)),
        b"username=" + b"a" * 200_000,
        b"a=" * 5_000,
    ],
    ids=lambda body: body[:24].decode("ascii", "replace"),
)
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_no_form_is_denied(endpoint: Endpoint, question: str, body: bytes) -> None:
    assert endpoint.ask(question, body) == b"deny"


def test_encoding_widens_nothing(endpoint: Endpoint, attacker: Device, victim: Device) -> None:
    """What is decoded once is one value: an encoded separator makes no field, a doubly encoded one no name."""
    tail = f"&vhost={names.VHOST}&resource=topic&name={names.UPLINK}&permission=write&routing_key="
    head = f"username={attacker.id}"
    assert endpoint.ask("topic", f"{head}{tail}receipt.{attacker.id}".encode()) == b"allow"
    assert endpoint.ask("topic", f"{head}{tail}%72eceipt%2E{attacker.id}".encode()) == b"allow"
    for key in (
        f"receipt.{victim.id}",
        f"receipt.{attacker.id}%0A",
        f"receipt.{attacker.id}%00",
        f"receipt.{attacker.id}%26routing_key%3Dreceipt.{victim.id}",
        f"receipt%252E{attacker.id}",
        f"receipt.{attacker.id}+",
        f"telemetry.{attacker.id}.%FF",
        f"telemetry.{attacker.id}.%EF%BD%81",
        f"telemetry.{attacker.id}.{'a' * 129}",
    ):
        assert endpoint.ask("topic", f"{head}{tail}{key}".encode()) == b"deny", key
    smuggled = f"username={attacker.id}%26username%3D{victim.id}{tail}receipt.{victim.id}"
    assert endpoint.ask("topic", smuggled.encode()) == b"deny"


@pytest.mark.parametrize("permission", ["read", "write", "configure", "READ", "*", "read\n"])
@pytest.mark.parametrize("kind", ["queue", "exchange", "topic", "Queue"])
def test_there_are_two_resources(
    endpoint: Endpoint, attacker: Device, victim: Device, kind: str, permission: str
) -> None:
    """Of all names, kinds and permissions: read one's own mailbox and reply address, write `uplink`."""
    everything = {
        attacker.mailbox,
        victim.mailbox,
        f"{attacker.mailbox}\n",
        f"{attacker.mailbox}.x",
        attacker.mailbox.upper(),
        names.DIRECT_REPLY_TO,
        f"{names.DIRECT_REPLY_TO}.g1h2",
        *(each.name for each in (*layout.EXCHANGES, *layout.QUEUES)),
        names.BROKER_EVENTS,
        "",
        "amq.default",
        "amq.topic",
        "uplink\n",
        ".*",
    }
    granted = {
        name
        for name in everything
        if endpoint.ask(
            "resource", allowed(attacker, "resource") | {"resource": kind, "name": name, "permission": permission}
        )
        == b"allow"
    }
    rights = {("queue", "read"): {attacker.mailbox, names.DIRECT_REPLY_TO}, ("exchange", "write"): {names.UPLINK}}
    assert granted == rights.get((kind, permission), set())


def test_only_posts_are_answered(endpoint: Endpoint, attacker: Device) -> None:
    for question in QUESTIONS:
        fields = allowed(attacker, question)
        for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
            answer = endpoint.http.request(method, f"/{question}", params=fields)
            assert answer.status_code == 405, method
            assert b"allow" not in answer.content.replace(b"method not allowed", b"")
    for path in ("/", "/users", "/user/", "/user/../vhost", "//user", "/%75ser/x"):
        answer = endpoint.http.post(path, data=allowed(attacker, "user"))
        assert answer.status_code in (404, 405) or answer.content == b"deny", path


def test_the_fields_of_the_address_are_not_read(endpoint: Endpoint, attacker: Device) -> None:
    for question in QUESTIONS:
        answer = endpoint.http.post(f"/{question}", params=allowed(attacker, question))
        assert answer.content == b"deny"


def test_half_a_question_is_denied_in_time(endpoint: Endpoint, attacker: Device) -> None:
    """A body that never ends does not hold the answer back past the broker's patience (4 s)."""
    with socket.create_connection(endpoint.address, 10) as client:
        began = time.monotonic()
        client.sendall(
            b"POST /broker/auth/user HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nusername="
            + attacker.id.encode()
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\ndeny"):
            more = client.recv(4096)
            assert more, answer
            answer += more
        assert time.monotonic() - began < 4.0
