"""Several processes on one database, and a database server that is killed under them."""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from fabric.command import State
from fabric.errors import LedgerUnavailable
from fabric.sql import Store, migrate, open_store, schema
from fabric.sql.engine import Database
from fabric.sql.ledger import SqlLedger
from tests.harness.postgres import PostgresCluster
from tests.integration.sql.values import (
    PUMP,
    SUCCEEDED,
    accept,
    add_device,
    change,
    draft,
    execute,
    rows,
    stored,
    timeline,
)
from topology.names import CommandId, DeviceId

CONTENDER = Path(__file__).with_name("contender.py")
ROOT = CONTENDER.parents[3]


async def contend(url: str, devices: list[DeviceId], commands: list[CommandId], processes: int) -> list[dict[str, Any]]:
    """What each process was told."""
    started = []
    for number in range(processes):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"tests.integration.sql.{CONTENDER.stem}",
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        told = {"url": url, "name": f"{number:04}", "devices": devices, "commands": commands}
        process.stdin.write(json.dumps(told).encode() + b"\n")
        started.append(process)
    for process in started:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    answers = await asyncio.gather(*(process.communicate(b"go\n") for process in started))
    assert [process.returncode for process in started] == [0] * processes
    return [json.loads(out) for out, _ in answers]


async def test_processes_that_write_at_once_lose_nothing(store: Store, url: str) -> None:
    devices = [DeviceId("a"), DeviceId("b")]
    for device in devices:
        await add_device(store.registry, device)
    fought_over = [(await accept(store.ledger, draft(devices[n % 2]))).id for n in range(12)]
    answers = await contend(url, devices, fought_over, 3)
    # Numbers are unique and without gaps, per device.
    for device in devices:
        given = [seq for answer in answers for owner, seq in answer["accepted"] if owner == device]
        assert sorted(given) == list(range(7, 7 + len(given)))
    # Every change that a process was told of is in the ledger, once, and nothing else is.
    told = Counter((id, version) for answer in answers for id, version in answer["changes"])
    assert set(told.values()) == {1}
    for id in fought_over:
        found = await store.ledger.command(id)
        assert found is not None
        command, log = found
        recorded = [row.version for row in log]
        assert recorded == sorted(set(recorded))
        assert set(recorded) == {1} | {version for of, version in told if of == id}
        assert command.version == recorded[-1]
        assert command.rows == len(log)
        assert command.state is State.SUCCEEDED
    # Each was settled in front of one process only.
    assert Counter(id for answer in answers for id in answer["settled"]) == Counter(fought_over)


async def test_a_killed_server_costs_no_acknowledged_write(monkeypatch: pytest.MonkeyPatch) -> None:
    with PostgresCluster() as cluster:
        url = cluster.new_database()
        migrate(url)
        store = await open_store(url)
        await add_device(store.registry)
        acknowledged: list[CommandId] = []
        refused = 0
        writing = True

        async def write() -> None:
            nonlocal refused
            while writing:
                command = draft()
                try:
                    await accept(store.ledger, command)
                    (result,) = await change(store.ledger, command.id, SUCCEEDED)
                except LedgerUnavailable:
                    refused += 1
                else:
                    # Stepped again or not, it was told to have this outcome.
                    assert result.step.command.state is State.SUCCEEDED
                    acknowledged.append(command.id)

        async def until_more(count: int) -> None:
            wanted = len(acknowledged) + count
            async with asyncio.timeout(20):
                while len(acknowledged) < wanted:  # noqa: ASYNC110 - the writers need not know of it
                    await asyncio.sleep(0.01)

        writers = [asyncio.create_task(write()) for _ in range(8)]
        for _ in range(2):
            await until_more(30)
            await asyncio.to_thread(cluster.kill9)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(cluster.start)
            await until_more(30)
        writing = False
        await asyncio.gather(*writers)
        assert refused == 0  # it came back within the time that a write goes on reconnecting
        assert await store.registry.device(PUMP) is not None
        for id in acknowledged:
            assert (await stored(store.ledger, id)).state is State.SUCCEEDED
        table = schema.commands.c
        numbers = [row.seq for row in rows(url, sa.select(table.seq).order_by(table.seq))]
        assert numbers == list(range(1, len(numbers) + 1))
        settled = rows(url, "SELECT command, count(*) FROM events WHERE kind = 'command.succeeded' GROUP BY command")
        assert {tuple(row)[1] for row in settled} == {1}
        # And when it does not come back, that is said in time.
        monkeypatch.setattr("fabric.sql.engine.RETRY_FOR", 0.2)
        await asyncio.to_thread(cluster.kill9)
        with pytest.raises(LedgerUnavailable):
            await accept(store.ledger)
        with pytest.raises(LedgerUnavailable):
            await store.registry.device(PUMP)
        with pytest.raises(LedgerUnavailable):
            await store.clock.synchronize()
        await store.close()


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_commit_whose_answer_was_lost_is_looked_up(url: str, committed: bool) -> None:
    store = await open_store(url)
    await add_device(store.registry)
    lose, lost = True, 0

    def cut(connection: sa.Connection) -> None:
        """The server ends the session instead of answering, the commit done or not."""
        nonlocal lose, lost
        if not lose:
            return
        lose = False
        lost += 1
        driver = connection.connection.driver_connection
        assert driver is not None
        if committed:
            driver.commit()
        execute(url, f"SELECT pg_terminate_backend({driver.info.backend_pid})")
        if committed:  # the driver knows of its own commit and would not notice
            gone = psycopg.OperationalError("server closed the connection unexpectedly")
            raise sa.exc.OperationalError("COMMIT", {}, gone)

    for engine in (store.ledger._database._batching, store.ledger._database.engine):
        sa.event.listen(engine, "commit", cut)
    first = await accept(store.ledger)
    lose = True
    (result,) = await change(store.ledger, first.id, SUCCEEDED)
    assert result.step.settled
    lose = True
    second = await accept(store.ledger)
    assert (first.seq, second.seq, lost) == (1, 2, 3)
    assert [entry.state for entry in await timeline(store.ledger, first.id)] == [State.ACCEPTED, State.SUCCEEDED]
    # The registry doesn't know whether it is done, and says so.
    lose = True
    with pytest.raises(LedgerUnavailable):
        await store.registry.greet(PUMP, 17, "1.0")
    device = await store.registry.device(PUMP)
    assert device is not None
    assert (device.agent_version == "1.0") is committed
    await store.close()


async def test_two_ledgers_of_one_process_share_a_database(store: Store, url: str) -> None:
    await add_device(store.registry)
    database = Database(url)
    second = SqlLedger(database, store.clock.now)
    second.start()
    accepted = await asyncio.gather(*(accept(ledger) for _ in range(40) for ledger in (store.ledger, second)))
    assert sorted(command.seq for command in accepted) == list(range(1, 81))
    await second.close()
    await database.close()
