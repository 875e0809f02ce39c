"""Who may touch what on a broker: the service accounts, and the answers to the broker's questions.

The answers about `vhost`, `resource` and `topic` are pure functions of names, so the broker may
cache them for ever; whether a device exists and may log in is decided at login alone.
"""

from dataclasses import dataclass

from topology import names

WORKER = "fabric.worker"
GATEWAY = "fabric.gateway"
ADMIN = "fabric.admin"
BACKEND = "backend.reader"


@dataclass(frozen=True, slots=True)
class Account:
    """A service account of the broker's internal backend; permissions are RabbitMQ's regular expressions."""

    name: str
    tags: tuple[str, ...]
    configure: str
    write: str
    read: str


ACCOUNTS = (
    # Declares the topology, publishes mail, reads every report, answers at direct reply-to addresses
    # (which takes write on the default exchange).
    Account(WORKER, (), configure=".*", write=".*", read=".*"),
    # Publishes mail and telemetry, declares mailboxes, asks workers to close connections, binds its own wake
    # queue, reads streams. Wake-ups need no more than the right to write `wake`, which only it and the worker have;
    # what is asked on `control` and answered on `wake` says from which of the two it comes.
    Account(
        GATEWAY,
        (),
        configure=r"^(mailbox\..*|wake\..*)$",
        write=r"^(mail|notices|uplink|control|wake|wake\..*|mailbox\..*)$",
        read=r"^(mail|notices|wake|wake\..*|mailbox\..*|telemetry|events)$",
    ),
    # The broker's administrator: connections, policies. Used over the management API by the worker
    # only, and touches no message.
    Account(ADMIN, ("administrator",), configure="^$", write="^$", read="^$"),
    # Reads the streams, each of its connections at an offset of its own; writes nothing, so it answers nobody.
    Account(BACKEND, (), configure="^$", write="^$", read=r"^(telemetry|events)$"),
)

FABRIC_ACCOUNTS = frozenset({WORKER, GATEWAY})
"""Accounts that may publish on a device's behalf what came over HTTP."""


def vhost(username: str, name: str) -> bool:
    """May this user enter this vhost? Only devices are asked about, and they have one."""
    return names.is_device(username) and name == names.VHOST


def resource(username: str, vhost_name: str, kind: str, name: str, permission: str) -> bool:
    """May this device configure, write or read this exchange or queue?

    A device reads its own mailbox and its own direct reply-to address, and writes `uplink`.
    """
    if not vhost(username, vhost_name):
        return False
    match kind, permission:
        case "queue", "read":
            return name == names.mailbox(names.DeviceId(username)) or _is_direct_reply_to(name)
        case "exchange", "write":
            return name == names.UPLINK
        case _:
            return False


def topic(username: str, vhost_name: str, name: str, permission: str, routing_key: str) -> bool:
    """May this device write this routing key? Only keys of the contract that carry its own id."""
    if not vhost(username, vhost_name) or name != names.UPLINK or permission != "write":
        return False
    parsed = names.parse_uplink_key(routing_key)
    return parsed is not None and parsed[1] == username


def sender_is_genuine(kind: str, device_id: str, user_id: str | None) -> bool:
    """Is the broker-checked `user_id` of an uplink message one that may write this kind of key?

    What a device says of its own commands comes from that device only; telemetry and inquiries may
    also have come over HTTP, through the gateway's account.
    """
    if user_id == device_id:
        return True
    return kind in ("telemetry", "inquiry") and user_id == GATEWAY


def _is_direct_reply_to(name: str) -> bool:
    return name == names.DIRECT_REPLY_TO
