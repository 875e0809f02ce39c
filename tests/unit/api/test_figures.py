"""Metrics of a process whose ledger is away: they are shown, and say so."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.operator import metrics as shown
from api.operator.figures import PROBLEMS, Everywhere, LedgerFigures
from api.operator.metrics import Metrics
from fabric.command import State
from fabric.errors import LedgerUnavailable
from fabric.measures import Figures, Histogram, Lives

FULL = Figures({State.QUEUED: 3}, 2.5, 4, 5, 6, 7, 8)


class Source:
    """A ledger's figures, as long as it answers."""

    def __init__(self) -> None:
        self.there = True

    async def read(self) -> Figures:
        if not self.there:
            raise LedgerUnavailable("away")
        return FULL


class Counting:
    fates: Mapping[str, Histogram] = {}
    exceeded: Mapping[str, int] = {"reports": 2}
    throttled: Mapping[str, int] = {}


async def fine() -> Mapping[str, str]:
    return {}


async def raises() -> Mapping[str, str]:
    raise LedgerUnavailable("away")


async def hangs() -> Mapping[str, str]:
    await asyncio.sleep(3600)
    return {}


def make(ready: Callable[[], Awaitable[Mapping[str, str]]], source: Source) -> Metrics:
    held = LedgerFigures(source)  # type: ignore[arg-type]  # this is what it uses of it
    counting = Counting()
    made = Everywhere(Path("/nowhere"), ready, Lives(), counting, counting).metrics(held.look)  # type: ignore[arg-type]
    held.show(made)
    return made


async def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families((await metrics.text()).decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


async def test_what_is_counted_and_read_is_shown() -> None:
    found = await read(make(fine, Source()))
    assert found["restante_commands_open", "queued"] == 3
    assert found["restante_oldest_waiting_seconds",] == 2.5
    assert (found["restante_outbox_events", "unsequenced"], found["restante_outbox_events", "unpublished"]) == (4, 5)
    assert found["restante_flood_exceeded_total", "reports"] == 2
    assert [found["restante_problem", each] for each in PROBLEMS] == [0] * len(PROBLEMS)


@pytest.mark.parametrize("ready", [pytest.param(raises, id="says-so"), pytest.param(hangs, id="hangs")])
async def test_a_ledger_that_is_away_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, ready: Callable[[], Awaitable[Mapping[str, str]]]
) -> None:
    monkeypatch.setattr(shown, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(shown, "LOOK_TIMEOUT", 0.05)
    source = Source()
    metrics = make(ready, source)
    assert (await read(metrics))["restante_commands_open", "queued"] == 3
    source.there = False
    found = await read(metrics)
    assert found["restante_problem", "ledger"] == 1
    assert found["restante_problem", "topology"] == 0
    assert not [name for name, *_ in found if name == "restante_commands_open"]


async def test_the_ledger_is_not_asked_at_each_scrape() -> None:
    asked = 0

    async def counted() -> Mapping[str, str]:
        nonlocal asked
        asked += 1
        return {}

    metrics = make(counted, Source())
    await asyncio.gather(*(metrics.text() for _ in range(20)))
    assert asked == 1
