"""A journal in memory, for simulated devices by the thousand: what it knows ends with its process."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from device_agent.journal import EVICT_MARGIN, MAX_ENTRIES, Entry, Interrupted, Journal, State, Word
from topology import names, wire


@dataclass(slots=True)
class _Kept:
    state: State
    name: str
    not_after: int
    started_at: int
    reruns: int = 0
    request: wire.Command | None = None
    outcome: wire.Outcome | None = None


class MemoryJournal(Journal):
    """The agent's journal as a dictionary, with the same bound of entries."""

    def __init__(self) -> None:
        # Not the parent's: there is no database.
        self.agent = secrets.token_urlsafe(18)
        self._kept: dict[names.CommandId, _Kept] = {}
        self._incarnation: str | None = None
        self._fabric_time = 0

    @property
    def has_lazy_marks(self) -> bool:
        return False

    def find(self, command: names.CommandId) -> Entry | None:
        kept = self._kept.get(command)
        return None if kept is None else Entry(command, kept.state)

    def room(self, now: int) -> bool:
        if len(self._kept) >= MAX_ENTRIES:
            open_ = (State.STARTED, State.DONE)
            self._kept = {
                command: kept
                for command, kept in self._kept.items()
                if kept.state in open_ or kept.not_after >= now - EVICT_MARGIN
            }
        return len(self._kept) < MAX_ENTRIES

    def start(self, command: wire.Command, now: int, *, keep_request: bool) -> None:
        request = command if keep_request else None
        self._kept[command.id] = _Kept(State.STARTED, command.name, command.not_after, now, 0, request)

    def refuse(self, command: wire.Command, now: int) -> None:
        self._kept[command.id] = _Kept(State.REFUSED, command.name, command.not_after, now)

    def reject(self, command: wire.Command, outcome: wire.Outcome) -> None:
        self._kept[command.id] = _Kept(State.DONE, command.name, command.not_after, outcome.at, outcome=outcome)

    def finish(self, outcome: wire.Outcome) -> None:
        kept = self._kept[outcome.command]
        kept.state, kept.request, kept.outcome = State.DONE, None, outcome

    def rerun(self, command: names.CommandId) -> None:
        self._kept[command].reruns += 1

    def doubt(self, commands: Iterable[names.CommandId]) -> None:
        for command in commands:
            self._kept[command].state = State.DOUBT

    def reported(self, command: names.CommandId) -> None:
        kept = self._kept.get(command)
        if kept is not None and kept.state is State.DONE:
            kept.state = State.REPORTED

    def flush(self) -> None:
        return

    def interrupted(self) -> list[Interrupted]:
        found = [
            Interrupted(command, kept.name, kept.not_after, kept.started_at, kept.reruns, kept.request)
            for command, kept in self._kept.items()
            if kept.state is State.STARTED
        ]
        return sorted(found, key=lambda it: (it.started_at, it.command))

    def unreported(self, limit: int, besides: Iterable[names.CommandId] = ()) -> list[Word]:
        skip = set(besides)
        found = [
            kept.outcome
            for command, kept in self._kept.items()
            if kept.state is State.DONE and kept.outcome is not None and command not in skip
        ]
        # Nothing is ever in doubt: what a crash interrupts, it also forgets.
        return list(sorted(found, key=lambda it: (it.at, it.command), reverse=True)[:limit])

    def word(self, command: names.CommandId) -> Word | None:
        kept = self._kept.get(command)
        return None if kept is None else kept.outcome

    def incarnation(self) -> str | None:
        return self._incarnation

    def meet(self, incarnation: str) -> None:
        for kept in self._kept.values():
            if kept.state is State.REPORTED:
                kept.state = State.DONE
        self._incarnation = incarnation

    def last_fabric_time(self) -> int:
        return self._fabric_time

    def store_fabric_time(self, now: int) -> None:
        self._fabric_time = now

    def counts(self) -> dict[str, int]:
        counts = {str(state): 0 for state in State}
        for kept in self._kept.values():
            counts[kept.state] += 1
        return counts

    def close(self) -> None:
        return
