"""The ledger is the transition table and nothing else: any events, in any batches, end as the pure fold does."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric import command as life
from fabric.command import State, accept, step
from fabric.model import Accept, Accepted, Change, Changed
from fabric.sql.engine import Database
from fabric.sql.ledger import SqlLedger
from fabric.sql.registry import SqlRegistry
from fabric.sql.revocations import SqlRevocations
from tests.integration.sql.values import PUMP, ROOMY, SECOND, add_device, draft

START = 1_000_000_000
TTL = 20 * SECOND
COMMANDS = 3

_agents = st.sampled_from(["agent-0001", "agent-0002"])
_attempts = st.integers(1, 3)
_characters = st.characters(codec="utf-8", exclude_characters="\x00")
_events = st.one_of(
    st.builds(life.Confirmed, _attempts),
    st.builds(life.NotConfirmed, _attempts, st.sampled_from(["nack", "timeout"])),
    st.builds(life.Returned, _attempts),
    st.builds(life.DeadLettered, _attempts, st.sampled_from(["maxlen", "expired", "rejected"]), st.booleans()),
    st.builds(life.Receipted, _agents, st.booleans(), st.none() | st.text(_characters)),
    st.builds(life.Claimed, _agents),
    st.builds(
        life.Answered,
        _agents,
        st.sampled_from([State.SUCCEEDED, State.FAILED, State.REJECTED]),
        st.sampled_from([None, "expired", "jammed"]),
        st.just("text/plain"),
        st.binary(max_size=4),
    ),
    st.builds(life.Cancelled, st.sampled_from(["issuer", "superseded"])),
    st.builds(life.DeadlinePassed),
    st.builds(life.ResponseDue),
    st.builds(life.Republished, _attempts, st.just("retry")),
    st.builds(life.DeviceDeleted),
)  # fmt: skip
# Batches of (command, event), each after a pause.
_batches = st.lists(
    st.tuples(
        st.integers(0, 15 * SECOND),
        st.lists(st.tuples(st.integers(0, COMMANDS - 1), _events), min_size=1, max_size=6),
    ),
    max_size=6,
)


@dataclass
class Bench:
    """A ledger whose clock and chance are held still."""

    runner: asyncio.Runner
    ledger: SqlLedger
    clock: list[int]


@pytest.fixture
def bench(url: str) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        clock = [START]
        database = Database(url)

        async def start() -> SqlLedger:
            await add_device(SqlRegistry(database, lambda: clock[0], SqlRevocations(database, None)))
            ledger = SqlLedger(database, lambda: clock[0], jitter=lambda: 0.5)
            ledger.start()
            return ledger

        ledger = runner.run(start())
        yield Bench(runner, ledger, clock)
        runner.run(ledger.close())
        runner.run(database.close())


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=_batches)
def test_any_events_in_any_batches_end_as_the_pure_fold(
    bench: Bench, batches: list[tuple[int, list[tuple[int, life.Event]]]]
) -> None:
    bench.clock[0] = START
    given_commands = [draft(accepted_at=START, deadline=START + TTL, claim=number == 1) for number in range(COMMANDS)]

    async def run() -> None:
        results = await bench.ledger.write(*(Accept(command, ROOMY) for command in given_commands))
        numbers = [result.command.seq for result in results if isinstance(result, Accepted)]
        folded = []
        for command, seq in zip(given_commands, numbers, strict=True):
            after, entry = accept(replace(command, seq=seq))
            folded.append((after, [entry]))
        for pause, batch in batches:
            bench.clock[0] += pause
            writes = [Change(given_commands[number].id, event, PUMP) for number, event in batch]
            for result, (number, event) in zip(
                await asyncio.gather(*(bench.ledger.write(write) for write in writes)), batch, strict=True
            ):
                before, entries = folded[number]
                expected = step(before, event, bench.clock[0], jitter=0.5)
                (changed,) = result
                assert isinstance(changed, Changed)
                assert changed.step == expected
                assert bool(changed.timeline) == expected.settled
                folded[number] = expected.command, entries + ([expected.entry] if expected.entry else [])
        for command, entries in folded:
            found = await bench.ledger.command(command.id)
            assert found is not None
            assert found[0] == command
            assert [row.entry for row in found[1]] == entries

    bench.runner.run(run())
