"""What exists on a broker: exchanges, queues, bindings and policies, as values.

Declaring is someone else's job (`fabric.amqp.declarer`, `fabric.management`); it is idempotent, so
these values are the whole truth. RabbitMQ's names are used for arguments and policy keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from topology import names

Scalar = str | int | bool

DEFAULT_BACKLOG = 50  # commands a device may have waiting
LARGEST_BACKLOG = 250  # that a device may be given
NOTIFICATION_ALLOWANCE = 100  # notifications beside them
LONGEST_WAIT = 7 * 24 * 3600 * 1000  # ms: the longest `ttl` of any mail
SHARED_QUEUE_LIMIT = 500_000  # messages; bounds what a stopped worker can leave on the broker
SEGMENT_BYTES = 16_000_000  # streams drop whole segments: the bound is only as fine as this


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: Literal["direct", "topic", "fanout"]


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    arguments: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Binding:
    exchange: str
    queue: str
    key: str


@dataclass(frozen=True, slots=True)
class Policy:
    """A RabbitMQ policy; `apply_to` and `definition` are the broker's own vocabulary."""

    name: str
    pattern: str
    apply_to: str
    definition: Mapping[str, Scalar]


def _quorum(name: str) -> Queue:
    # A report must outlive any number of killed consumers (the default delivery limit drops it),
    # and a full queue must refuse the publisher rather than forget the oldest.
    return Queue(
        name,
        {
            "x-queue-type": "quorum",
            "x-delivery-limit": -1,
            "x-overflow": "reject-publish",
            "x-max-length": SHARED_QUEUE_LIMIT,
        },
    )


def _stream(name: str, max_bytes: int, max_age: str) -> Queue:
    return Queue(
        name,
        {
            "x-queue-type": "stream",
            "x-max-length-bytes": max_bytes,
            "x-max-age": max_age,
            "x-stream-max-segment-size-bytes": SEGMENT_BYTES,
        },
    )


EXCHANGES = (
    Exchange(names.MAIL, "direct"),
    Exchange(names.NOTICES, "topic"),
    Exchange(names.UPLINK, "topic"),
    Exchange(names.RETURNED, "topic"),
    Exchange(names.WAKE, "fanout"),
    Exchange(names.CONTROL, "direct"),
)

QUEUES = (
    _quorum(names.REPORTS),
    _quorum(names.INQUIRIES),
    _quorum(names.RETURNED),
    # A claim or a hello is a question whose asker waits: after 10 s it has asked again.
    Queue(
        names.CLAIMS,
        {"x-queue-type": "classic", "x-message-ttl": 10_000, "x-max-length": 10_000, "x-overflow": "reject-publish"},
    ),
    # A gateway waits for a closure two seconds or so, and leaves it to the ledger then.
    Queue(
        names.CLOSURES,
        {"x-queue-type": "classic", "x-message-ttl": 5_000, "x-max-length": 10_000, "x-overflow": "reject-publish"},
    ),
    # Beginnings and ends of connections, which only make sense in their order. What a stopped worker misses for longer
    # is in the broker's listing.
    Queue(
        names.SESSIONS,
        {
            "x-queue-type": "classic",
            "x-single-active-consumer": True,
            "x-message-ttl": 60_000,
            "x-max-length": 50_000,
        },
    ),
    _stream(names.TELEMETRY, 1_000_000_000, "7D"),
    _stream(names.EVENTS, 500_000_000, "7D"),
)

BINDINGS = (
    Binding(names.UPLINK, names.REPORTS, "receipt.*"),
    Binding(names.UPLINK, names.REPORTS, "outcome.*"),
    Binding(names.UPLINK, names.CLAIMS, "claim.*"),
    Binding(names.UPLINK, names.CLAIMS, "hello.*"),
    Binding(names.UPLINK, names.INQUIRIES, "inquiry.*.#"),
    Binding(names.UPLINK, names.TELEMETRY, "telemetry.*.#"),
    Binding(names.RETURNED, names.RETURNED, "#"),
    Binding(names.CONTROL, names.CLOSURES, names.CLOSURES),
    Binding(names.BROKER_EVENTS, names.SESSIONS, names.OPENED),
    Binding(names.BROKER_EVENTS, names.SESSIONS, names.CLOSED),
)


def policies(largest_backlog: int) -> tuple[Policy, ...]:
    """The policies, where no mailbox may hold more than `largest_backlog` commands.

    The ledger keeps each device to its own limit; the broker's is the last resort, with room for copies that
    were published again. (It doesn't count what is unacked.)
    """
    return (
        Policy(
            "mailbox",
            r"^mailbox\.",
            "classic_queues",
            {
                "message-ttl": LONGEST_WAIT,
                "dead-letter-exchange": names.RETURNED,
                "max-length": 4 * largest_backlog + NOTIFICATION_ALLOWANCE,
                "overflow": "reject-publish-dlx",
            },
        ),
    )


MAILBOX = Queue("", {"x-queue-type": "classic", "x-single-active-consumer": True})
"""Of every device: the limits come from the policy, which can change later; arguments can't."""


def mailbox(device_id: names.DeviceId) -> Queue:
    return replace(MAILBOX, name=names.mailbox(device_id))


def mailbox_binding(device_id: names.DeviceId) -> Binding:
    return Binding(names.MAIL, names.mailbox(device_id), device_id)
