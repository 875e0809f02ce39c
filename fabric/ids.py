"""Ids that sort by time."""

import secrets
import uuid

from topology.names import CommandId


def command_id(now_ms: int) -> CommandId:
    """A UUIDv7 (RFC 9562, section 5.7) for this epoch millisecond."""
    return CommandId(uuid7(now_ms))


def uuid7(now_ms: int) -> str:
    tail = secrets.randbits(74)
    value = (now_ms & (2**48 - 1)) << 80 | 7 << 76 | (tail >> 62) << 64 | 0b10 << 62 | tail & (2**62 - 1)
    return str(uuid.UUID(int=value))
