"""How full the ledger is, by a few statements that read indexes and no more than `COUNTED` rows of each."""

from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa

from fabric.command import PICKED_UP, WAITING, Micros, State
from fabric.measures import Figures
from fabric.sql import schema
from fabric.sql.engine import Database
from fabric.sql.log import SEQUENCER
from fabric.sql.prepared import Prepared

COUNTED: Final = 100_000  # rows: what is more than this is bad enough


class SqlFigures:
    def __init__(self, database: Database, clock: Callable[[], Micros]) -> None:
        self._database, self._now = database, clock

    async def read(self) -> Figures:
        """Raises `LedgerUnavailable`."""
        return await self._database.read(self._read)

    def _read(self, connection: sa.Connection) -> Figures:
        found = {State(state): (count, first) for state, count, first in _OPEN.all(connection, {})}
        accepted = [first for state, (_, first) in found.items() if state in WAITING]
        ((position, published),) = _POSITIONS.all(connection, {})
        ((unsequenced, sessions, closures),) = _COUNTS.all(connection, {})
        return Figures(
            open={state: found.get(state, (0, 0))[0] for state in State if state in WAITING | PICKED_UP},
            oldest_waiting=max(self._now() - min(accepted), 0) / 1_000_000 if accepted else 0.0,
            unsequenced=unsequenced,
            unpublished=position - published,
            published=published,
            sessions=sessions,
            closures=closures,
        )


def _some(column: "sa.Column[Any]", condition: str) -> sa.ScalarSelect[Any]:
    rows = sa.select(column).where(sa.text(condition)).limit(sa.literal_column(str(COUNTED))).subquery()
    return sa.select(sa.func.count()).select_from(rows).scalar_subquery()


_commands, _leases = schema.commands.c, schema.leases.c
_open = (
    sa.select(_commands.state, _commands.accepted_at)
    .where(sa.text("due IS NOT NULL"))  # an index's condition, in its own words
    .limit(sa.literal_column(str(COUNTED)))
    .subquery()
)
_OPEN = Prepared(sa.select(_open.c.state, sa.func.count(), sa.func.min(_open.c.accepted_at)).group_by(_open.c.state))
_POSITIONS = Prepared(sa.select(_leases.position, _leases.published).where(_leases.name == SEQUENCER))
_COUNTS = Prepared(
    sa.select(
        _some(schema.events.c.id, "position IS NULL"),
        _some(schema.sessions.c.node, "ended_at IS NULL"),
        _some(schema.closures.c.id, "id IS NOT NULL"),
    )
)
