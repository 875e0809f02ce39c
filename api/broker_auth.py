"""The broker's questions, `POST /broker/auth/user|vhost|resource|topic`, as a bare ASGI app for speed.

RabbitMQ's HTTP auth backend sends a form and reads the answer's text. The answer is `allow` or `deny` and
nothing else: no tags (a tag can be `administrator`), no reason, no echo. Whatever goes wrong is a `deny`.
Only the login looks anything up; the other three are functions of names (`topology.access`), which the
broker caches. It does not cache refusals, and asks about a routing key again after a minute: so this is where a
device's refusals and telemetry channels are counted.

Each answer ends its connection. The broker's HTTP client sends a question behind up to five others on a connection that
was kept, so one login that waits for its takeover would hold up those of other devices.

To be served on an internal listener, with `lifespan="off"` and `server_header=False`.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from starlette.types import Receive, Scope, Send

from api import logs
from fabric.errors import FabricError, Temporary
from fabric.identity.meters import Meter
from fabric.measures import Histogram
from topology import access, enrollment, names
from topology.names import DeviceId

MAX_FORM = 8 * 1024  # bytes
MAX_FIELDS = 64
LOGIN_TIMEOUT = 2.5  # seconds: under the broker's own time-out for a question
BODY_TIMEOUT = 2.5  # seconds

_PREFIX = "/broker/auth/"
_TEXT = (b"content-type", b"text/plain")
_LAST = (b"connection", b"close")
_ENCODED = re.compile(rb"(?:[A-Za-z0-9._~!*'(),;:@$/?\[\]#+-]|%[0-9A-Fa-f]{2})*")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")

Form = Mapping[str, str]

log = logging.getLogger(__name__)


class Logins(Protocol):
    """The one login decision (`fabric.identity.login.DeviceLogins`)."""

    async def login(self, username: str, password: str) -> object:
        """Raises `Unauthenticated` or `Temporary`."""
        ...


class Watch(Protocol):
    """Who is told what logged-in devices ask for (`fabric.guarding.FloodGuard`); what it says changes no answer."""

    def count(self, device: DeviceId, meter: Meter) -> object: ...

    def use_channel(self, device: DeviceId, channel: str) -> object: ...


class Denied(Exception):
    """The answer is `deny`; the text is for the log, and has no secret in it."""


class BrokerAuth:
    """`vhost` is the cell's; a question about any other is denied.

    Attributes:
        answers: how long each took, by question and answer.
    """

    def __init__(self, logins: Logins, watch: Watch, vhost: str) -> None:
        self._logins, self._watch, self._vhost = logins, watch, vhost
        self._pure: Final[Mapping[str, Callable[[Form], bool]]] = {
            "vhost": self._may_enter,
            "resource": self._may_use,
            "topic": self._may_write,
        }
        self.answers: Mapping[tuple[str, str], Histogram] = {
            (question, answer): Histogram() for question in ("user", *self._pure) for answer in ("allow", "deny")
        }
        self._away_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app; never raises for what was sent."""
        if scope["type"] != "http":
            return
        question = scope["path"].removeprefix(_PREFIX)
        if not scope["path"].startswith(_PREFIX) or question not in ("user", *self._pure):
            await _answer(send, 404, b"not found")
        elif scope["method"] != "POST":
            await _answer(send, 405, b"method not allowed", (b"allow", b"POST"))
        else:
            began = time.perf_counter()
            answer = "allow" if await self._decide(question, receive) else "deny"
            self.answers[question, answer].observe(time.perf_counter() - began)
            await _answer(send, 200, answer.encode())

    async def _decide(self, question: str, receive: Receive) -> bool:
        form: Form = {}
        try:
            form = parse(await _body(receive))
            _check_name(form, self._vhost)
            if question == "user":
                await self._login(form)
            else:
                self._ask(question, form)
            return True
        except Denied as denial:
            _log_denial(question, form, str(denial))
            # A refused login is not counted: whoever reaches the broker could lock any device out.
            if question != "user" and names.is_device(form.get("username", "")):
                self._watch.count(DeviceId(form["username"]), Meter.REFUSALS)
        except Exception:  # the one who is asked for access says no
            log.exception("broker-auth.bug question=%s", question)
        return False

    async def _login(self, form: Form) -> None:
        password = form.get("password", "")
        if not password:
            raise Denied("no password")
        if len(password.encode()) > enrollment.MAX_TOKEN_BYTES:
            raise Denied(f"a password of more than {enrollment.MAX_TOKEN_BYTES} bytes")
        try:
            async with asyncio.timeout(LOGIN_TIMEOUT):
                await self._logins.login(form["username"], password)
        except (TimeoutError, Temporary) as error:
            self._note_away(error)
            raise Denied("the registry is away") from error
        except FabricError as error:
            raise Denied(str(error)) from error
        self._note_back()

    def _may_enter(self, form: Form) -> bool:
        return access.vhost(form["username"], _field(form, "vhost"))

    def _may_use(self, form: Form) -> bool:
        kind, name, permission = (_field(form, field) for field in ("resource", "name", "permission"))
        return access.resource(form["username"], _field(form, "vhost"), kind, name, permission)

    def _may_write(self, form: Form) -> bool:
        if _field(form, "resource") != "topic":
            return False
        name, permission, key = (_field(form, field) for field in ("name", "permission", "routing_key"))
        return access.topic(form["username"], _field(form, "vhost"), name, permission, key)

    def _ask(self, question: str, form: Form) -> None:
        if not self._pure[question](form):
            raise Denied("not one of its rights")
        parsed = names.parse_uplink_key(form["routing_key"]) if question == "topic" else None
        if parsed is not None and parsed[0] == "telemetry":
            self._watch.use_channel(parsed[1], parsed[2] or "")

    def _note_away(self, error: Exception) -> None:
        level = logging.WARNING if self._away_since is None else logging.DEBUG
        self._away_since = self._away_since or time.monotonic()
        log.log(level, "broker-auth.registry-away error=%s", logs.shown(str(error) or type(error).__name__))

    def _note_back(self) -> None:
        if self._away_since is not None:
            log.info("broker-auth.registry-back after=%.1f", time.monotonic() - self._away_since)
            self._away_since = None


def parse(body: bytes) -> Form:
    """The fields of a form (`application/x-www-form-urlencoded`), read strictly.

    Raises:
        Denied: too many fields, one twice, or bytes that are no encoded UTF-8.
    """
    parts = body.split(b"&")
    if len(parts) > MAX_FIELDS:
        raise Denied(f"more than {MAX_FIELDS} fields")
    form: dict[str, str] = {}
    for part in parts:
        name, separator, value = part.partition(b"=")
        if not name or not separator:
            raise Denied("not a form")
        decoded = _decode(name)
        if decoded in form:
            raise Denied("a field is repeated")
        form[decoded] = _decode(value)
    return form


def _decode(encoded: bytes) -> str:
    if not _ENCODED.fullmatch(encoded):
        raise Denied("a field is not percent-encoded")
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), encoded.replace(b"+", b" "))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Denied("a field is not UTF-8") from None


def _check_name(form: Form, vhost: str) -> None:
    """What is denied before anything is looked up, whatever the question."""
    if not names.is_device(_field(form, "username")):
        raise Denied("the user name is no device id")
    if form.get("vhost", vhost) != vhost:
        raise Denied("another vhost")


def _field(form: Form, name: str) -> str:
    """An absent field is no empty one. Names that matter here are ASCII: others match nothing."""
    value = form.get(name)
    if value is None:
        raise Denied(f"no field '{name}'")
    if not value.isascii():
        raise Denied(f"'{name}' is not ASCII")
    return value


async def _body(receive: Receive) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Denied("the broker went away")
                body += bytes(message.get("body", b""))
                if len(body) > MAX_FORM:
                    raise Denied(f"a form of more than {MAX_FORM} bytes")
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise Denied("the form did not arrive in time") from None


def _log_denial(question: str, form: Form, reason: str) -> None:
    said = " ".join(
        f"{name}={logs.shown(form[name])}"
        for name in ("username", "vhost", "resource", "name", "permission", "routing_key")
        if name in form
    )
    log.info("broker-auth.denied question=%s reason=%s %s", question, logs.shown(reason), said)


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_TEXT, length, _LAST, *headers]})
    await send({"type": "http.response.body", "body": body})
