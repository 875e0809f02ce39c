"""The commands that a rebuild publishes again, page by page."""

from fabric.command import Cancelled, Claimed, Confirmed, Republished
from fabric.ports import Waiting
from fabric.sql import Store
from tests.integration.sql.values import AGENT, PUMP, SECOND, accept, add_device, change, draft, now
from topology.names import DeviceId

OTHER = DeviceId("gate-1")


async def test_what_waits_is_listed_by_device_and_seq_in_pages(store: Store) -> None:
    await add_device(store.registry)
    await add_device(store.registry, OTHER)
    at = now()
    pumps = [await accept(store.ledger) for _ in range(3)]
    gates = [await accept(store.ledger, draft(OTHER)) for _ in range(2)]
    await change(store.ledger, pumps[1].id, Confirmed(1))
    await change(store.ledger, pumps[2].id, Republished(1, "retry"), Confirmed(2))
    expected = [
        Waiting(gates[0].id, OTHER, 1, 1),
        Waiting(gates[1].id, OTHER, 2, 1),
        Waiting(pumps[0].id, PUMP, 1, 1),
        Waiting(pumps[1].id, PUMP, 2, 1),
        Waiting(pumps[2].id, PUMP, 3, 2),
    ]
    by = at + SECOND
    after: Waiting | None = None
    seen: list[Waiting] = []
    while page := await store.ledger.waiting("cell-1", accepted_by=by, after=after, limit=2):
        assert len(page) <= 2
        seen += page
        after = page[-1]
    assert seen == expected
    assert await store.ledger.waiting("cell-2", accepted_by=by, after=None, limit=10) == []


async def test_what_need_not_or_must_not_be_published_is_left_out(store: Store) -> None:
    await add_device(store.registry)
    at = now()
    await accept(store.ledger, draft(deadline=at - SECOND, accepted_at=at - 2 * SECOND))
    picked_up, cancelled, later = [await accept(store.ledger) for _ in range(3)]
    await change(store.ledger, picked_up.id, Claimed(AGENT))
    await change(store.ledger, cancelled.id, Cancelled("issuer"))
    assert await store.ledger.waiting("cell-1", accepted_by=later.accepted_at - 1, after=None, limit=10) == []
    found = await store.ledger.waiting("cell-1", accepted_by=later.accepted_at, after=None, limit=10)
    assert [it.command for it in found] == [later.id]


async def test_what_waits_of_some_issuers_is_found(store: Store) -> None:
    await add_device(store.registry)
    waits = {await accept(store.ledger, draft(issuer=issuer)) for issuer in ("billing", "billing", "ops", "other")}
    picked_up, cancelled = [await accept(store.ledger) for _ in range(2)]
    await change(store.ledger, picked_up.id, Claimed(AGENT))
    await change(store.ledger, cancelled.id, Cancelled("issuer"))
    of = {issuer: {it.id for it in waits if it.issuer == issuer} for issuer in ("billing", "ops")}
    assert set(await store.ledger.waiting_of(["billing"], 10)) == of["billing"]
    assert set(await store.ledger.waiting_of(["billing", "nobody", "ops"], 10)) == of["billing"] | of["ops"]
    assert len(await store.ledger.waiting_of(["billing", "ops"], 2)) == 2
