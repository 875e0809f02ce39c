"""Devices written into the registry and the broker of a stack in bulk: thousands a second instead of dozens."""

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa
from pamqp import base, commands
from pamqp.common import FieldTable
from sqlalchemy.exc import IntegrityError

from api.operator.secrets import account_password
from api.settings import Settings
from bench.connection import Connection
from bench.enrolled import TAKEN, Enrolled, Kept, Own, Registrar, Say, Unusable, device_ids, new_own
from fabric.clock import Clock
from fabric.command import Micros
from fabric.model import Device, DeviceKey, DomainEvent
from fabric.signing import signing_key
from fabric.sql import identity, rows, schema
from fabric.sql.engine import Database
from fabric.sql.fold import INSERT_EVENTS
from topology import access, layout, names

AT_ONCE = 1_000  # devices of one transaction
DECLARE_TIMEOUT = 120.0  # seconds for all mailboxes


async def enrolled_on(
    settings: Settings,
    authority: Path,
    token: str,
    prefix: str,
    count: int,
    say: Say,
    kept: Kept | None = None,
    known: Enrolled | None = None,
) -> Enrolled:
    """So many devices of a stack on this machine, as it runs: those that are kept or known, and new ones.

    Raises:
        Unusable: devices of these names exist, and their keys are not here.
        fabric.errors.FabricError: the registry is away.
        OSError: the broker is.
    """
    known = known or (kept.load() if kept is not None else None) or Enrolled({}, ())
    have, answer = {own.id: own for own in known.devices}, known.answer
    missing = [id for id in device_ids(prefix, count) if id not in have]
    if missing:
        registrar = Registrar(settings.api_url, authority, token)
        try:
            answer, first = await asyncio.to_thread(registrar.enroll, missing[0])
        finally:
            registrar.close()
        fresh = [first, *(await _register(settings, missing[1:]))]
        await _declare_mailboxes(settings, authority, missing[1:])
        say(f"registered {len(missing)} devices")
        if kept is not None:
            kept.add(Enrolled(answer, tuple(fresh)))
        have |= {own.id: own for own in fresh}
    return Enrolled(answer, tuple(have[id] for id in device_ids(prefix, count)))


async def _register(settings: Settings, ids: Sequence[names.DeviceId]) -> list[Own]:
    database = Database(settings.database)
    try:
        clock = Clock(database.time_offset)
        await clock.synchronize()
        made: list[Own] = []
        for start in range(0, len(ids), AT_ONCE):
            batch = [new_own(id) for id in ids[start : start + AT_ONCE]]
            now = clock.now()
            await database.write(partial(_insert, cell=settings.cell, batch=batch, now=now))
            made += batch
        return made
    finally:
        await database.close()


def _insert(connection: sa.Connection, cell: str, batch: Iterable[Own], now: Micros) -> None:
    devices, keys, events = [], [], []
    for own in batch:
        device = Device(own.id, cell, own.generation, (), {}, enabled=True, created_at=now, version=1)
        key = signing_key(own.private)
        devices.append(device)
        keys.append(DeviceKey(own.id, key.kid, dict(key.public), now))
        made = {"groups": (), "labels": {}, "generation": own.generation}
        events.append(DomainEvent("device.created", own.id, now, made))
        events.append(DomainEvent("device.enrolled", own.id, now, {"kid": key.kid, "generation": own.generation}))
    try:
        connection.execute(sa.insert(schema.generations), [{"device": it.id, "last": it.generation} for it in devices])
    except IntegrityError:
        raise Unusable(TAKEN) from None
    connection.execute(sa.insert(schema.devices), [{**rows.new_device(it), "enrolled_at": now} for it in devices])
    connection.execute(sa.insert(schema.device_keys), [identity.new_key(key, key.device) for key in keys])
    INSERT_EVENTS.run(connection, [rows.domain_event(event, 1) for event in events])


async def _declare_mailboxes(settings: Settings, authority: Path, ids: Sequence[names.DeviceId]) -> None:
    if ids:
        declarer = _Declarer(ids)
        host, port = _place(settings.amqps_url)
        context = ssl.create_default_context(cafile=authority)
        password = account_password(settings.state_dir, access.WORKER)
        connection = Connection(declarer, ("127.0.0.1", port), host, context, (access.WORKER, password), names.VHOST)
        declarer.connection = connection
        await connection.dial()
        await asyncio.wait_for(declarer.done, DECLARE_TIMEOUT)
        connection.close()


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 5671


class _Declarer:
    """All mailboxes without waiting for each; the last answer says that all are there."""

    def __init__(self, ids: Sequence[names.DeviceId]) -> None:
        self._ids = ids
        self.connection: Connection | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def opened(self) -> None:
        assert self.connection is not None
        self.connection.send(1, commands.Channel.Open())

    def answered(self, channel: int, method: base.Frame) -> None:
        assert self.connection is not None
        if isinstance(method, commands.Channel.OpenOk):
            methods: list[base.Frame] = []
            for id in self._ids:
                queue, binding = layout.mailbox(id), layout.mailbox_binding(id)
                arguments: FieldTable = dict(queue.arguments)
                methods.append(commands.Queue.Declare(0, queue.name, durable=True, nowait=True, arguments=arguments))
                methods.append(commands.Queue.Bind(0, queue.name, binding.exchange, binding.key, nowait=True))
            last = commands.Queue.Declare(0, names.mailbox(self._ids[-1]), passive=True)
            self.connection.send(channel, *methods, last)
        elif isinstance(method, commands.Queue.DeclareOk):
            self._end(None)
        elif isinstance(method, commands.Channel.Close):
            self._end(Unusable(f"the mailboxes can't be declared: {method.reply_text}"))

    def delivered(self, *_: object) -> None:
        """Nothing is consumed."""

    def lost(self, error: Exception) -> None:
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
