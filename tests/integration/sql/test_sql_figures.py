"""How full the ledger is, and what became of commands, on both databases."""

import re

import sqlalchemy as sa

from fabric.command import DeadlinePassed, Receipted, ResponseDue, State
from fabric.measures import Figures, Histogram, Promise
from fabric.sql import Store, figures, rows, schema
from fabric.sql.engine import create_engine
from tests.integration.sql.values import (
    AGENT,
    PUMP,
    SECOND,
    SUCCEEDED,
    accept,
    add_device,
    all_events,
    change,
    draft,
    now,
)

OPEN = {State.ACCEPTED, State.QUEUED, State.DELIVERED, State.RUNNING}


async def test_an_empty_ledger_is_all_zeros(store: Store) -> None:
    assert await store.figures.read() == Figures(dict.fromkeys(OPEN, 0), 0.0, 0, 0, 0, 0, 0)


async def test_it_counts_what_is_open(store: Store) -> None:
    await add_device(store.registry)
    waiting, running, settled = [
        await accept(store.ledger, draft(accepted_at=now() - age * SECOND)) for age in (90, 600, 600)
    ]
    await change(store.ledger, running.id, Receipted(AGENT, running=True))
    await change(store.ledger, settled.id, SUCCEEDED)
    read = await store.figures.read()
    assert (read.open[waiting.state], read.open[State.RUNNING], sum(read.open.values())) == (1, 1, 2)
    assert 90 <= read.oldest_waiting < 600
    events = read.unsequenced
    assert events == 6  # the device, three acceptances, a receipt, an outcome
    while await store.ledger.sequence("test", 1, 1000):
        pass
    read = await store.figures.read()
    assert (read.unsequenced, read.unpublished, read.published) == (0, events, 0)
    await all_events(store.ledger)
    read = await store.figures.read()
    assert (read.unsequenced, read.unpublished, read.published) == (0, 0, events)


def test_what_is_settled_is_not_read(url: str) -> None:
    """However many settled commands and old events there are, the plans go by the indexes of what is open."""
    engine = create_engine(url, connections=1, autocommit=True)
    settled = [rows.new_command(draft(seq=seq, state=State.SUCCEEDED)) for seq in range(2000)]
    old = [
        {"position": n, "kind": "device.created", "device": PUMP, "version": 1, "at": 1, "document": "{}"}
        for n in range(1, 2000)
    ]
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    with engine.connect() as connection:
        connection.execute(sa.insert(schema.commands), settled)
        connection.execute(sa.insert(schema.events), old)
        connection.exec_driver_sql("ANALYZE")
        for prepared in (figures._OPEN, figures._COUNTS):
            text = prepared._statement.compile(engine, compile_kwargs={"literal_binds": True})
            plan = " ".join(map(str, connection.exec_driver_sql(f"{explain} {text}")))
            assert not re.search(r"Seq Scan on (events|commands)|SCAN (events|commands)(?! USING)", plan), plan
    engine.dispose()


async def test_lives_are_measured_as_they_are_committed(store: Store) -> None:
    lives = store.ledger.lives
    await add_device(store.registry)
    at = now()
    late = await accept(store.ledger, draft(accepted_at=at - 20 * SECOND, deadline=at - 2 * SECOND))
    await change(store.ledger, late.id, DeadlinePassed())
    silent = await accept(store.ledger, draft(response_timeout=0))
    await change(store.ledger, silent.id, Receipted(AGENT, running=True))
    await change(store.ledger, silent.id, ResponseDue())
    await change(store.ledger, silent.id, ResponseDue())  # changes nothing
    await change(store.ledger, silent.id, SUCCEEDED)
    counted = {state: sum(histogram.counts) for state, histogram in lives.entered.items() if any(histogram.counts)}
    assert counted == {
        State.ACCEPTED: 2, State.EXPIRED: 1, State.RUNNING: 1, State.UNANSWERED: 1, State.SUCCEEDED: 1,
    }  # fmt: skip
    assert 20 <= lives.entered[State.EXPIRED].total < 80
    assert [sum(lives.late[promise].counts) for promise in Promise] == [1, 1]
    assert 2 <= lives.late[Promise.DEADLINE].total < 60
    assert 0 <= lives.late[Promise.RESPONSE].total < 60


def test_a_histogram_counts_up_to_its_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.0, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(seconds)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 7.5)
