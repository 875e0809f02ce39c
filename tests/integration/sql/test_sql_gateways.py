"""The leases of gateways, on both databases."""

from fabric.sql import Store

LEASE = 5


async def test_a_gateway_is_live_as_long_as_it_renews_its_lease(store: Store) -> None:
    gateways = store.gateways
    assert await gateways.live(1) == []
    await gateways.renew("one", 1, LEASE)
    await gateways.renew("two", 3, LEASE)
    assert sorted(await gateways.live(5)) == ["one", "two"]
    assert await gateways.live(6) == ["two"], "not at the lease's end"
    await gateways.renew("one", 7, LEASE)
    assert sorted(await gateways.live(7)) == ["one", "two"]
    await gateways.leave("one")
    await gateways.leave("nobody")
    assert await gateways.live(7) == ["two"]
