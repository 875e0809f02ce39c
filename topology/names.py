"""The only builders of names and routing keys, and their grammar.

A device id, like every word of a channel, subject, group or command name, uses lower-case ASCII
only; whatever falls outside is refused before it is looked up anywhere. Service accounts carry a
dot in their name, so that no account can ever be a device id.
"""

import re
from typing import NewType

DeviceId = NewType("DeviceId", str)
CommandId = NewType("CommandId", str)

VHOST = "devices"

MAIL = "mail"
NOTICES = "notices"
UPLINK = "uplink"
RETURNED = "returned"
WAKE = "wake"
CONTROL = "control"

REPORTS = "reports"
CLAIMS = "claims"
INQUIRIES = "inquiries"
TELEMETRY = "telemetry"
EVENTS = "events"
CLOSURES = "closures"

SESSIONS = "sessions"

BROKER_EVENTS = "amq.rabbitmq.event"  # the event exchange of the broker's plugin
OPENED, CLOSED = "connection.created", "connection.closed"  # its keys

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"

DEVICE_ID = r"[a-z0-9][a-z0-9_-]{0,62}"
NAME_LIMIT = 128  # characters of a dotted name
ROUTING_KEY_LIMIT = 255  # bytes of an AMQP short string

_WORD = r"[a-z0-9][a-z0-9_-]*"
DOTTED_NAME = rf"{_WORD}(?:\.{_WORD})*"

_device = re.compile(DEVICE_ID, re.ASCII)
_dotted = re.compile(DOTTED_NAME, re.ASCII)
_uuid7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.ASCII)


class NameRefused(ValueError):
    """A name outside the grammar; the message says what the grammar is."""


def is_device(text: str) -> bool:
    return _device.fullmatch(text) is not None


def is_dotted(text: str) -> bool:
    return len(text) <= NAME_LIMIT and _dotted.fullmatch(text) is not None


def is_command_id(text: str) -> bool:
    return _uuid7.fullmatch(text) is not None


def device(text: str) -> DeviceId:
    """The text as a device id.

    Raises:
        NameRefused: it is not 1 to 63 characters of `a-z 0-9 _ -`, the first a letter or a digit.
    """
    if not is_device(text):
        raise NameRefused(
            "a device id is 1 to 63 characters of a-z, 0-9, '_' and '-', and starts with a letter or digit"
        )
    return DeviceId(text)


def dotted(text: str, what: str) -> str:
    """The text as a channel, subject, group or command name (`what` says which, for the error).

    Raises:
        NameRefused: it is not dot-separated words of the device alphabet, 128 characters at most.
    """
    if not is_dotted(text):
        raise NameRefused(f"a {what} is dot-separated words of a-z, 0-9, '_' and '-', {NAME_LIMIT} characters at most")
    return text


def mailbox(device_id: DeviceId) -> str:
    return f"mailbox.{device_id}"


def mailbox_owner(queue: str) -> DeviceId | None:
    """The device whose mailbox this queue is, or None when the queue is no mailbox."""
    prefix, _, owner = queue.partition(".")
    return DeviceId(owner) if prefix == "mailbox" and is_device(owner) else None


def group_key(group: str) -> str:
    return f"group.{group}"


def receipt_key(device_id: DeviceId) -> str:
    return f"receipt.{device_id}"


def outcome_key(device_id: DeviceId) -> str:
    return f"outcome.{device_id}"


def claim_key(device_id: DeviceId) -> str:
    return f"claim.{device_id}"


def hello_key(device_id: DeviceId) -> str:
    return f"hello.{device_id}"


def telemetry_key(device_id: DeviceId, channel: str) -> str:
    return f"telemetry.{device_id}.{channel}"


def inquiry_key(device_id: DeviceId, subject: str) -> str:
    return f"inquiry.{device_id}.{subject}"


# What may stand after the device id in a key of each kind: nothing, or a dotted name.
_UPLINK_KINDS = {"receipt": False, "outcome": False, "claim": False, "hello": False, "telemetry": True, "inquiry": True}


def parse_uplink_key(key: str) -> tuple[str, DeviceId, str | None] | None:
    """`(kind, device, channel or subject)` of a key on `uplink`; None for a key that does not exist there."""
    if len(key) > ROUTING_KEY_LIMIT or not key.isascii():
        return None
    kind, _, rest = key.partition(".")
    owner, dot, tail = rest.partition(".")
    named = _UPLINK_KINDS.get(kind)
    if named is None or not is_device(owner):
        return None
    if named:
        return (kind, DeviceId(owner), tail) if is_dotted(tail) else None
    return None if dot else (kind, DeviceId(owner), None)
