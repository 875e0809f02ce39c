"""The broker's questions: exactly `allow` or `deny`, whatever is asked."""

import asyncio
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import broker_auth
from api.broker_auth import BrokerAuth
from fabric.errors import Temporary, Unauthenticated
from topology import names

TOKEN = "a-token"
BASE = {"username": "pump-17", "vhost": "devices"}
USER = {"username": "pump-17", "password": TOKEN}
WRITE_TOPIC = BASE | {
    "resource": "topic",
    "name": "uplink",
    "permission": "write",
    "routing_key": "telemetry.pump-17.temperature",
}


class Login:
    """Stands at the end of the decision that has tests of its own: what is seen here is who reaches it."""

    def __init__(self, error: Exception | None = None, wait: float = 0) -> None:
        self.asked: list[tuple[str, str]] = []
        self._error, self._wait = error, wait

    async def login(self, username: str, password: str) -> object:
        self.asked.append((username, password))
        await asyncio.sleep(self._wait)
        if self._error:
            raise self._error
        if password != TOKEN:
            raise Unauthenticated("another token")
        return object()


class Watch:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def count(self, device: str, meter: str) -> None:
        self.told.append((device, meter))

    def use_channel(self, device: str, channel: str) -> None:
        self.told.append((device, f"channel {channel}"))


def ask(
    question: str,
    form: dict[str, str] | bytes,
    login: Login | None = None,
    method: str = "POST",
    chunks: int = 1,
    prefix: str = "/broker/auth/",
    watch: "Watch | None" = None,
) -> tuple[int, bytes]:
    body = form if isinstance(form, bytes) else urlencode(form).encode()
    size = -(-len(body) // chunks) or 1
    pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": prefix + question, "headers": []}
    asyncio.run(BrokerAuth(login or Login(), watch or Watch(), names.VHOST)(scope, receive, send))
    start, end = sent
    assert dict(start["headers"])[b"content-type"] == b"text/plain"
    return start["status"], end["body"]


ALLOW, DENY = (200, b"allow"), (200, b"deny")


def test_a_device_with_its_token_logs_in() -> None:
    login = Login()
    assert ask("user", USER, login) == ALLOW
    assert ask("user", USER | {"tags": "administrator", "variable_map.vhost": "x"}, login, chunks=5) == ALLOW
    assert login.asked == [("pump-17", TOKEN)] * 2


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"&",
        b"username",
        b"username=pump-17",
        b"username=pump-17&password=",
        b"username=pump-17&password=%",
        b"username=pump-17&password=%zz",
        b"username=pump-17&password=%ff",
        b"username=pump-17&password=a=b",
        b"username=pump-17&password=\xc3\xa4",
        b"username=pump-17&password=a-token&password=a-token",
        b"username=pump-17&username=pump-18&password=a-token",
        b"username=pump-17&username%20=x&%75sername=pump-17&password=a-token",
        b"username=pump-17%0a&password=a-token",
        b"username=pump-17%00&password=a-token",
        b"username=+pump-17&password=a-token",
        b"username=Pump-17&password=a-token",
        b"username=p%C3%BCmp&password=a-token",
        b"username=%EF%BC%91&password=a-token",
        b"username=&password=a-token",
        b"username=fabric.worker&password=a-token",
        b"username=guest.&password=a-token",
        b"username=" + b"a" * 64 + b"&password=a-token",
        b"username=pump-17&password=" + b"a" * 3073,
        b"username=pump-17&password=" + b"a" * 9000,
        b"username=pump-17&password=a-token&vhost=%2F",
        b"username=pump-17&password=a-token" + b"&x=" * 70,
        urlencode([("username", "pump-17"), ("password", "a-token"), *((f"x{n}", "") for n in range(70))]).encode(),
    ],
)
def test_what_is_denied_before_any_lookup(form: bytes) -> None:
    login = Login()
    assert ask("user", form, login) == DENY
    assert not login.asked


@pytest.mark.parametrize("error", [Unauthenticated("no"), Temporary("away"), RuntimeError("a bug"), TimeoutError()])
def test_whatever_goes_wrong_is_a_denial(error: Exception) -> None:
    assert ask("user", USER, Login(error)) == DENY


def test_a_slow_login_is_a_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_auth, "LOGIN_TIMEOUT", 0.01)
    assert ask("user", USER, Login(wait=5)) == DENY


def test_other_paths_and_methods() -> None:
    assert ask("user", USER, method="GET")[0] == 405
    assert ask("users", USER)[0] == 404
    assert ask("", USER)[0] == 404
    assert ask("user/", USER)[0] == 404
    assert ask("user", USER, prefix="/")[0] == 404


@pytest.mark.parametrize(
    ("question", "form", "answer"),
    [
        ("vhost", BASE | {"ip": "192.0.2.1"}, ALLOW),
        ("vhost", BASE | {"vhost": "/"}, DENY),
        ("vhost", {"username": "pump-17"}, DENY),
        ("resource", BASE | {"resource": "queue", "name": "mailbox.pump-17", "permission": "read"}, ALLOW),
        ("resource", BASE | {"resource": "queue", "name": "amq.rabbitmq.reply-to", "permission": "read"}, ALLOW),
        ("resource", BASE | {"resource": "exchange", "name": "uplink", "permission": "write"}, ALLOW),
        ("resource", BASE | {"resource": "queue", "name": "mailbox.pump-18", "permission": "read"}, DENY),
        ("resource", BASE | {"resource": "queue", "name": "mailbox.pump-17", "permission": "configure"}, DENY),
        ("resource", BASE | {"resource": "queue", "name": "mailbox.pump-17", "permission": "write"}, DENY),
        ("resource", BASE | {"resource": "exchange", "name": "", "permission": "write"}, DENY),
        ("resource", BASE | {"resource": "exchange", "name": "amq.default", "permission": "write"}, DENY),
        ("resource", BASE | {"resource": "exchange", "name": "mail", "permission": "write"}, DENY),
        ("resource", BASE | {"resource": "exchange", "name": "uplink", "permission": "read"}, DENY),
        ("resource", BASE | {"resource": "exchange", "name": "uplink"}, DENY),
        ("topic", WRITE_TOPIC, ALLOW),
        ("topic", WRITE_TOPIC | {"variable_map.username": "pump-17"}, ALLOW),
        ("topic", WRITE_TOPIC | {"routing_key": "receipt.pump-17"}, ALLOW),
        ("topic", WRITE_TOPIC | {"routing_key": "receipt.pump-17.x"}, DENY),
        ("topic", WRITE_TOPIC | {"routing_key": "telemetry.pump-18.temperature"}, DENY),
        ("topic", WRITE_TOPIC | {"routing_key": "telemetry.pump-17.#"}, DENY),
        ("topic", WRITE_TOPIC | {"routing_key": "telemetry.pump-17.a\n"}, DENY),
        ("topic", WRITE_TOPIC | {"routing_key": "telemetry.pump-17.\u0661"}, DENY),
        ("topic", WRITE_TOPIC | {"routing_key": ""}, DENY),
        ("topic", WRITE_TOPIC | {"permission": "read"}, DENY),
        ("topic", WRITE_TOPIC | {"name": "notices"}, DENY),
        ("topic", WRITE_TOPIC | {"resource": "exchange"}, DENY),
        ("topic", WRITE_TOPIC | {"username": "fabric.gateway"}, DENY),
    ],
)
def test_rights_follow_from_names(question: str, form: dict[str, str], answer: tuple[int, bytes]) -> None:
    login = Login()
    assert ask(question, form, login) == answer
    assert not login.asked


FIELDS = st.sampled_from(
    ["username", "password", "vhost", "resource", "name", "permission", "routing_key", "tags", "ip"]
)
VALUES = st.sampled_from([*USER.values(), *WRITE_TOPIC.values(), "mailbox.pump-17", "queue", "read", "exchange", "/"])
FORMS = st.lists(st.tuples(FIELDS, VALUES | st.text(max_size=8)), max_size=9).map(lambda form: urlencode(form).encode())
BYTES = st.binary(max_size=200) | st.text(alphabet="username=password&%+0aF.-", max_size=120).map(str.encode)


@given(st.sampled_from(["user", "vhost", "resource", "topic"]), FORMS | BYTES, st.integers(1, 3))
def test_the_answer_is_allow_or_deny(question: str, form: bytes, chunks: int) -> None:
    status, answer = ask(question, form, chunks=chunks)
    assert (status, answer) in (ALLOW, DENY)
    if answer == b"allow":
        parsed = broker_auth.parse(form)
        assert names.is_device(parsed["username"])
        assert question != "user" or parsed["password"] == TOKEN


@given(BYTES)
def test_a_form_is_parsed_or_denied(body: bytes) -> None:
    with suppress(broker_auth.Denied):
        broker_auth.parse(body)


def test_what_a_logged_in_device_asks_for_is_told() -> None:
    watch = Watch()
    assert ask("topic", WRITE_TOPIC, watch=watch) == ALLOW
    assert ask("topic", WRITE_TOPIC | {"routing_key": "receipt.pump-17"}, watch=watch) == ALLOW
    assert ask("vhost", BASE, watch=watch) == ALLOW
    assert watch.told == [("pump-17", "channel temperature")]
    refused = BASE | {"resource": "queue", "name": "mailbox.door-1", "permission": "read"}
    assert ask("resource", refused, watch=watch) == DENY
    assert ask("vhost", BASE | {"vhost": "other"}, watch=watch) == DENY
    assert watch.told[1:] == [("pump-17", "refusals")] * 2


def test_a_refused_login_counts_against_nobody() -> None:
    watch = Watch()
    assert ask("user", USER | {"password": "guessed"}, watch=watch) == DENY
    assert ask("resource", {"username": "fabric.worker"}, watch=watch) == DENY
    assert watch.told == []
