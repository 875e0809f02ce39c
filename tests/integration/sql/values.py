"""Values that the tests of the SQL adapter share."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from fabric.command import Answered, Command, Entry, Micros, State
from fabric.identity.admission import Admission, Attempt, use_of
from fabric.identity.meters import Limits
from fabric.model import Accept, Accepted, Change, Changed, Device, EnrollmentCode, Result
from fabric.ports import Ledger, Registry
from fabric.sql import Store, schema
from fabric.sql.engine import create_engine
from topology.names import CommandId, DeviceId

SECOND: Micros = 1_000_000
PUMP = DeviceId("pump-17")
AGENT = "agent-0001"
ROOMY = 1_000_000  # a backlog that is no matter
MANY_LOGINS = Limits(logins=100)
SUCCEEDED = Answered(AGENT, State.SUCCEEDED, None, "application/json", b"{}")


def now() -> Micros:
    return time.time_ns() // 1000


def draft(device: DeviceId = PUMP, **changes: Any) -> Command:
    """A command as a gateway hands it to the ledger."""
    at = now()
    given = {
        "id": CommandId(str(uuid.uuid4())),
        "device": device,
        "generation": 1,
        "seq": 0,
        "name": "door.close",
        "body": b'{"speed": 1}',
        "content_type": "application/json",
        "issuer": "billing",
        "claim": False,
        "supersedes": None,
        "accepted_at": at,
        "deadline": at + 60 * SECOND,
        "response_timeout": 30 * SECOND,
        "sig": "signature",
        "sig_kid": "kid",
        "traceparent": None,
    }
    return Command(**{**given, **changes})


def new_device(id: DeviceId = PUMP) -> Device:
    return Device(id, "cell-1", 1, ("garage",), {"floor": "2"}, enabled=True, created_at=now(), version=1)


def code(device: DeviceId = PUMP, code_hash: str | None = None, expires_in: Micros = 3600 * SECOND) -> EnrollmentCode:
    return EnrollmentCode(code_hash or uuid.uuid4().hex, device, now() + expires_in)


async def add_device(registry: Registry, id: DeviceId = PUMP) -> Device:
    return await registry.create_device(new_device(id), code(id))


async def log_in(
    store: Store,
    jti: str,
    at: Micros,
    device: DeviceId = PUMP,
    kid: str = "a",
    life: Micros = 120 * SECOND,
    limits: Limits = MANY_LOGINS,
) -> Admission:
    """As a question of the broker about a token does."""
    return await store.sessions.admit(Attempt(device, kid, use_of(jti), at + life, at), limits)


async def accept(ledger: Ledger, command: Command | None = None) -> Command:
    (result,) = await ledger.write(Accept(command or draft(), ROOMY))
    assert isinstance(result, Accepted)
    return result.command


async def change(ledger: Ledger, id: CommandId, *events: Any, device: DeviceId | None = None) -> list[Changed]:
    return changed(await ledger.write(*(Change(id, event, device) for event in events)))


def changed(results: Sequence[Result]) -> list[Changed]:
    assert all(isinstance(result, Changed) for result in results)
    return [result for result in results if isinstance(result, Changed)]


async def stored(ledger: Ledger, id: CommandId) -> Command:
    found = await ledger.command(id)
    assert found is not None
    return found[0]


async def timeline(ledger: Ledger, id: CommandId) -> list[Entry]:
    found = await ledger.command(id)
    assert found is not None
    return [row.entry for row in found[1]]


async def all_events(ledger: Ledger) -> list[tuple[str, str]]:
    """Kind and device of every event there is, in order; sequences them."""
    while await ledger.sequence("test", 1, 1000):
        pass
    await ledger.sequenced("test", 1, await ledger.last_position())
    return [(row.kind, row.device) for row in await ledger.events(0, 100_000)]


def rows(url: str, query: "sa.Select[Any] | str") -> list["sa.Row[Any]"]:
    """What a query finds, over a connection of its own."""
    engine = create_engine(url, connections=1)
    with engine.connect() as connection:
        found = connection.execute(sa.text(query) if isinstance(query, str) else query).all()
    engine.dispose()
    return list(found)


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url, connections=1, autocommit=True)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def command_count(url: str) -> int:
    return int(rows(url, sa.select(sa.func.count()).select_from(schema.commands))[0][0])
