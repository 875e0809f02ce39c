"""`wire.Message` to and from AMQP's basic properties."""

from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.common import FieldTable

from topology.wire import Message

_LONGEST_EXPIRATION = 20  # digits


def properties(message: Message) -> Basic.Properties:
    """The basic properties of a message. Whole numbers become the smallest type that holds them, so that
    epoch ms travel as 64-bit `l`."""
    headers: FieldTable = dict(message.headers)  # type: ignore[arg-type]  # pamqp refuses what it can't encode
    return Basic.Properties(
        content_type=message.content_type,
        headers=headers or None,
        delivery_mode=2 if message.persistent else 1,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=None if message.expiration_ms is None else str(message.expiration_ms),
        message_id=message.message_id,
        message_type=message.type,
        user_id=message.user_id,
    )


def message(delivered: DeliveredMessage) -> Message:
    """The message as it came; what the guard refused is of type `guard.UNDECODABLE`."""
    found = delivered.header.properties
    return Message(
        type=found.message_type,
        headers=found.headers or {},
        body=delivered.body,
        content_type=found.content_type,
        message_id=found.message_id,
        correlation_id=found.correlation_id,
        reply_to=found.reply_to,
        user_id=found.user_id,
        expiration_ms=_milliseconds(found.expiration),
        persistent=found.delivery_mode == 2,
    )


def _milliseconds(text: str | None) -> int | None:
    if text and len(text) <= _LONGEST_EXPIRATION and text.isascii() and text.isdigit():
        return int(text)
    return None
