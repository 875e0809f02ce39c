"""Many devices at once: registered behind the gateway's back, connected over TLS by a few threads."""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fabric.model import Device as Registered
from fabric.model import DeviceKey, EnrollmentCode
from fabric.sql import open_store
from tests.harness.device import Device, new_key
from tests.harness.stack import Document, RunningStack
from topology import enrollment
from topology.names import DeviceId

T = TypeVar("T")
THREADS = 32


def register(stack: RunningStack, prefix: str, many: int, peering: Document) -> list[Device]:
    """So many devices with a key each. They have no mailbox: they only connect."""
    tag = secrets.token_hex(2)
    made = [Device(stack, f"{prefix}-{tag}-{number}", new_key(), peering) for number in range(many)]

    async def store_them() -> None:
        store = await open_store(stack.stack.settings.database)
        try:
            for device in made:
                id, now = DeviceId(device.id), store.clock.now()
                registered = Registered(id, "local", 1, (), {}, enabled=True, created_at=now, version=1)
                code = EnrollmentCode(enrollment.code_hash(secrets.token_bytes(16)), id, now + 60_000_000)
                await store.registry.create_device(registered, code)
                await store.registry.redeem(code.code_hash, DeviceKey(id, device.kid, device.jwk, now), now)
        finally:
            await store.close()

    asyncio.run(store_them())
    return made


def at_once(do: Callable[[Device], T], devices: Iterable[Device]) -> list[T]:
    """Do it with all devices, `THREADS` of them at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(do, devices))


def connected(stack: RunningStack, prefix: str) -> dict[str, bool]:
    """What the fabric says of the devices whose ids begin so."""
    found: dict[str, bool] = {}
    query: dict[str, str | int] = {"limit": 100}
    while True:
        page = stack.ok(stack.http.get("/v1/devices", params=query))
        for each in page["items"]:
            if each["id"].startswith(prefix):
                found[each["id"]] = each["connection"]["state"] == "connected"
        if page["next"] is None:
            return found
        query["cursor"] = page["next"]
