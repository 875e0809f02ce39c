"""Logins are decided a few at a time: whoever can't be served soon is turned away before anything is done for it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fabric.errors import Unauthenticated
from fabric.identity import login
from fabric.identity.login import Audiences, DeviceLogins
from topology import enrollment

TOKEN = jwt.encode(
    {"iss": "pump-17", "sub": "pump-17"},
    ec.generate_private_key(ec.SECP256R1()),
    algorithm="ES256",
    headers={"typ": enrollment.DEVICE_TOKEN_TYPE, "kid": "k"},
)


class Slow:
    """A registry that answers when it is told to, and knows no keys."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = asyncio.Event()

    async def keys(self, _: str) -> Sequence[Any]:
        self.asked += 1
        await self.answers.wait()
        return ()


def logins(registry: Any) -> DeviceLogins:
    nobody: Any = None
    return DeviceLogins(registry, nobody, Audiences("mq", "api"), nobody)


async def test_who_waits_too_long_for_a_turn_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "TURN_WITHIN", 0.01)
    registry = Slow()
    asked = logins(registry)
    first = [asyncio.create_task(asked.login("pump-17", TOKEN)) for _ in range(login.AT_ONCE)]
    await asyncio.sleep(0)  # all of them begin
    assert registry.asked == login.AT_ONCE
    with pytest.raises(Unauthenticated, match="at once"):
        await asked.login("pump-17", TOKEN)
    assert registry.asked == login.AT_ONCE, "nothing was done for it"
    registry.answers.set()
    for one in first:
        with pytest.raises(Unauthenticated, match="no such key"):
            await one
    with pytest.raises(Unauthenticated, match="no such key"):  # the turns have come back
        await asked.login("pump-17", TOKEN)


async def test_who_gives_up_gives_its_turn_back() -> None:
    registry = Slow()
    asked = logins(registry)
    for _ in range(3 * login.AT_ONCE):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asked.login("pump-17", TOKEN)
    registry.answers.set()
    with pytest.raises(Unauthenticated, match="no such key"):
        await asked.login("pump-17", TOKEN)
