"""Who is connected: what broker's events and listings make of sessions, and when a device's presence changes.

A session is one connection of a device; node, name and opening time are its epoch. Presence follows from the
sessions alone: a device is connected while it has one that has not ended. So the late end of an old connection
never marks a live device offline. Pure.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fabric.command import Micros
from fabric.model import DomainEvent
from topology.names import DeviceId

STATISTICS_EVERY: Micros = 10_000_000  # `collect_statistics_interval` of deploy/rabbitmq/rabbitmq.conf
AGE: Micros = 2 * STATISTICS_EVERY  # of what is in them, at most: a connection tells it, and it is collected
SETTLED_AFTER = AGE  # until they must show a connection
REPLACED_FOR: Micros = 2_000_000  # that a newcomer may take from its login to its own session
LISTED_EVERY = STATISTICS_EVERY / 1e6  # seconds: more often there is nothing new
LISTED_AT_LEAST_EVERY = 60.0  # seconds
LISTING_SHARE = 0.05  # of the time: of ten thousand connections a listing costs the broker seconds of a processor
METERED: Micros = 30_000_000  # as deep as the bucket is that the traffic is taken from: `LISTED_EVERY` and `AGE`
REMEMBERED: Micros = 600_000_000  # that an ended session is kept, so that what is said late about it is understood

Epoch = tuple[str, str, Micros]


@dataclass(frozen=True, slots=True)
class Session:
    """One connection of a device.

    Attributes:
        device, cell: whose it is, and to which broker.
        node, name, opened_at: its epoch, as the broker has it: `10.0.0.7:49152 -> 10.0.0.1:5671` and the like.
        pid: the broker's process, which the event of its end names; None when its beginning was only seen in a listing.
        seen_at: when the fabric heard of it.
        replaced_at: when a newcomer's login had it closed. A half-open one may take half a minute to end.
        ended_at: when the fabric heard that it was over.
    """

    device: DeviceId
    cell: str
    node: str
    name: str
    opened_at: Micros
    pid: str | None
    seen_at: Micros
    replaced_at: Micros | None = None
    ended_at: Micros | None = None

    @property
    def epoch(self) -> Epoch:
        return self.node, self.name, self.opened_at

    @property
    def live(self) -> bool:
        return self.ended_at is None

    @property
    def peer(self) -> str:
        """Where it comes from, address and port."""
        return self.name.partition(" -> ")[0]


@dataclass(frozen=True, slots=True)
class Opened:
    session: Session
    at: Micros


@dataclass(frozen=True, slots=True)
class Closed:
    """The broker's event of an end, which names neither user nor opening time."""

    node: str
    name: str
    pid: str
    at: Micros


@dataclass(frozen=True, slots=True)
class Lost:
    """A session that the broker does not list any more."""

    session: Session
    at: Micros


Change = Opened | Closed | Lost


@dataclass(frozen=True, slots=True)
class Folded:
    """`fresh` and `changed` are sessions to write; `presence` is `(connected, since)` of the devices that changed."""

    fresh: tuple[Session, ...]
    changed: tuple[Session, ...]
    presence: Mapping[DeviceId, tuple[bool, Micros]]
    events: tuple[DomainEvent, ...]
    live: Mapping[DeviceId, int]


def fold(connected: Mapping[DeviceId, bool], known: Iterable[Session], changes: Sequence[Change]) -> Folded:
    """Apply changes in their order.

    Args:
        connected: the presence of every device concerned; one that is not in it does not exist.
        known: their sessions, and those that have ended and are named in a change.
        changes: what was heard. Hearing it again changes nothing.
    """
    return _Fold(connected, known).run(changes)


@dataclass(frozen=True, slots=True)
class Listed:
    """A connection in the broker's statistics. `octets` went over it, in both directions."""

    user: str
    node: str
    name: str
    opened_at: Micros
    octets: int

    @property
    def epoch(self) -> Epoch:
        return self.node, self.name, self.opened_at


def compare(
    cell: str, known: Iterable[Session], listed: Collection[Listed], missing: Collection[Epoch], now: Micros
) -> tuple[list[Change], set[Epoch]]:
    """What events must have been lost, by the broker's listing; and what was missing in it.

    Args:
        cell: of the broker that listed.
        known: the live sessions of its cell.
        listed: its connections of devices.
        missing: what the last comparison missed: once may be the statistics' delay.
        now: the time.
    """
    there = {each.epoch: each for each in listed}
    changes: list[Change] = []
    still_missing: set[Epoch] = set()
    for session in known:
        if session.replaced_at is not None and now - session.replaced_at > REPLACED_FOR:
            changes.append(Lost(session, now))
        elif session.epoch not in there and now - session.seen_at > SETTLED_AFTER:
            still_missing.add(session.epoch)
            if session.epoch in missing:
                changes.append(Lost(session, now))
    live = {session.epoch for session in known}
    changes += [
        Opened(Session(DeviceId(each.user), cell, each.node, each.name, each.opened_at, None, now), each.opened_at)
        for epoch, each in there.items()
        if epoch not in live
    ]
    return changes, still_missing


@dataclass(frozen=True, slots=True)
class Life:
    """A node between its start and its end.

    Attributes:
        creation: what tells it from the node's other lives; it is in the name of each of its processes.
        since: when the first event of it was sent, by the broker's clock.
    """

    creation: str
    since: Micros


def creation(pid: str) -> str | None:
    """Of which life of its node a process is: `1796031610` of `<rabbit@host.1796031610.1652.0>`. None if it is none."""
    parts = pid.rsplit(".", 3)
    return parts[1] if len(parts) == 4 else None


def outlived(known: Iterable[Session], lives: Mapping[str, Life], now: Micros) -> list[Lost]:
    """The ends of the sessions whose node has started again since. A node that dies tells of none of them."""
    return [Lost(each, now) for each in known if each.node in lives and _is_of_another(each, lives[each.node])]


def _is_of_another(session: Session, life: Life) -> bool:
    # Events that come again tell of an earlier life: what began after them is not judged by them.
    return session.opened_at < life.since and creation(session.pid or "") not in (None, life.creation)


def pause_after(took: float) -> float:
    """Seconds until the broker is asked again for its listing, which took it so many."""
    return min(max(LISTED_EVERY, took / LISTING_SHARE), LISTED_AT_LEAST_EVERY)


def recent(octets: int, span: Micros) -> int:
    """How many of the octets that a connection moved between two listings are metered at once: those of no more time
    than a bucket is deep. Else whoever keeps to the limit would be over it when the listings are far apart. The first
    may have been as old as can be, and the second new."""
    return octets * METERED // max(METERED, span + AGE)


def surplus(known: Iterable[Session]) -> list[Session]:
    """All live sessions of a device but its newest: logins that crossed, neither of which could close the other."""
    newest: dict[DeviceId, Session] = {}
    older = []
    for session in sorted(known, key=lambda it: it.opened_at):
        if session.device in newest:
            older.append(newest[session.device])
        newest[session.device] = session
    return older


class _Fold:
    def __init__(self, connected: Mapping[DeviceId, bool], known: Iterable[Session]) -> None:
        self._connected = dict(connected)
        self._sessions: dict[Epoch, Session] = {}
        self._of: dict[DeviceId, set[Epoch]] = {id: set() for id in connected}  # live ones
        self._called: dict[tuple[str, str], set[Epoch]] = {}  # live ones, by node and name
        for session in known:
            self._add(session)
        self._before = dict(self._sessions)
        self._presence: dict[DeviceId, tuple[bool, Micros]] = {}
        self._events: list[DomainEvent] = []

    def run(self, changes: Sequence[Change]) -> Folded:
        for change in changes:
            match change:
                case Opened(session, at):
                    self._open(session, at)
                case Closed(at=at):
                    self._end(self._named(change), at)
                case Lost(session, at):
                    self._end(self._sessions.get(session.epoch), at)
        return Folded(
            tuple(it for epoch, it in self._sessions.items() if epoch not in self._before),
            tuple(it for epoch, it in self._sessions.items() if self._before.get(epoch, it) != it),
            self._presence,
            tuple(self._events),
            {id: len(live) for id, live in self._of.items()},
        )

    def _open(self, session: Session, at: Micros) -> None:
        if session.device not in self._connected:
            return
        known = self._sessions.get(session.epoch)
        if known is not None:
            if known.pid is None and session.pid is not None:
                self._sessions[session.epoch] = replace(known, pid=session.pid)
            return
        for epoch in list(self._of[session.device]):
            if self._sessions[epoch].replaced_at is not None:
                self._drop(self._sessions[epoch], at)
        self._add(session)
        self._refresh(session, at)

    def _end(self, session: Session | None, at: Micros) -> None:
        if session is not None and session.live and session.device in self._of:
            self._drop(session, at)
            self._refresh(session, at)

    def _named(self, closed: Closed) -> Session | None:
        for epoch in self._called.get((closed.node, closed.name), ()):
            if self._sessions[epoch].pid in (None, closed.pid):
                return self._sessions[epoch]
        return None

    def _add(self, session: Session) -> None:
        self._sessions[session.epoch] = session
        if session.live and session.device in self._of:
            self._of[session.device].add(session.epoch)
            self._called.setdefault((session.node, session.name), set()).add(session.epoch)

    def _drop(self, session: Session, at: Micros) -> None:
        self._sessions[session.epoch] = replace(session, ended_at=at)
        self._of[session.device].discard(session.epoch)
        self._called[session.node, session.name].discard(session.epoch)

    def _refresh(self, session: Session, at: Micros) -> None:
        device = session.device
        is_connected = bool(self._of[device])
        if is_connected is not self._connected[device]:
            self._connected[device] = is_connected
            self._presence[device] = (is_connected, at)
            kind = "device.connected" if is_connected else "device.disconnected"
            self._events.append(DomainEvent(kind, device, at, {"peer": session.peer}))
