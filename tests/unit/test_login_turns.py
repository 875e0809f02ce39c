"""Logins are decided a few at a time: whoever can't be served soon is turned away before anything is done for it. The
broker's second question about one is answered like the first."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fabric.clock import Clock
from fabric.errors import Unauthenticated
from fabric.identity import login
from fabric.identity.admission import Admission, Attempt
from fabric.identity.login import Audiences, DeviceLogins
from fabric.model import DeviceKey
from topology import enrollment
from topology.names import DeviceId

KEY = ec.generate_private_key(ec.SECP256R1())


def token(jti: str = "a") -> str:
    at = int(time.time())
    claims = {"iss": "pump-17", "sub": "pump-17", "aud": "mq", "jti": jti, "iat": at, "exp": at + 60}
    return jwt.encode(claims, KEY, algorithm="ES256", headers={"typ": enrollment.DEVICE_TOKEN_TYPE, "kid": "k"})


TOKEN = token()


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


# ---- The second question -----------------------------------------------------------------------------


class Known:
    """A registry with the device's key, and admissions that count who asks."""

    def __init__(self) -> None:
        self.decided, self.made_room, self.suspended = 0, 0, False

    async def keys(self, _: str) -> Sequence[DeviceKey]:
        jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key()))
        return [DeviceKey(DeviceId("pump-17"), "k", jwk, 0)]

    async def decide(self, _: Attempt) -> Admission:
        self.decided += 1
        if self.suspended:
            raise Unauthenticated("the device is suspended")
        return Admission()

    async def make_room(self, *_: object) -> None:
        self.made_room += 1


async def on_the_clock() -> int:
    return 0


async def known_logins() -> tuple[Known, DeviceLogins]:
    known: Any = Known()
    clock = Clock(on_the_clock)
    await clock.synchronize()
    return known, DeviceLogins(known, clock, Audiences("mq", "api"), known)


async def test_the_second_question_about_a_login_has_the_answer_of_the_first() -> None:
    known, asked = await known_logins()
    first = token()
    await asked.login("pump-17", first)
    await asked.login("pump-17", first)
    assert (known.decided, known.made_room) == (1, 1)
    await asked.login("pump-17", first)
    assert known.decided == 2, "a third one is of another login"
    await asked.login("pump-17", token("b"))
    assert known.decided == 3, "another token"
    with pytest.raises(Unauthenticated):
        await asked.login("pump-18", first)


async def test_an_answer_is_soon_forgotten_and_a_denial_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = await known_logins()
    first = token()
    monkeypatch.setattr(login, "REMEMBERED", 0.0)
    for _ in range(2):
        await asked.login("pump-17", first)
    assert known.decided == 2
    for number in range(50):
        await asked.login("pump-17", token(str(number)))
    assert len(asked._let_in) <= 2
    monkeypatch.undo()
    known.suspended = True
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="suspended"):
            await asked.login("pump-17", token("c"))
    assert known.decided == 54
