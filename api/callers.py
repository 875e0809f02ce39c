"""Who asks, and may they? Bearer tokens, each verified by the one verifier that its `iss` names.

Every route has one guard: `Requires(…)`, one of its kinds, or `Public()`. A guard runs before parameters and bodies
are looked at, and `api.openapi` reads from it what the document says about security. What is out of a caller's scope
is not there for it: the answer is the one that an unknown thing has.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from api import headers, problems
from api.services import Services
from fabric import audit
from fabric.audit import Kind
from fabric.errors import NotFound
from fabric.identity import scopes, tokens
from fabric.identity.issued import Caller
from fabric.identity.scopes import Target
from topology import names
from topology.names import DeviceId

JSON = "application/json"

_NAMED = 5  # missing scopes that a refusal names at most
_BELIEVED_FOR = 1.0  # seconds that what was read of a device's groups is believed in a stream
_REMEMBERED = 10_000  # devices of one stream

T = TypeVar("T")


class OutOfReach(NotFound):
    """Refused, in the words that are said of what does not exist."""


class Public:
    """A route that asks for no token. `produces` is its answer's media type."""

    def __init__(self, produces: str = JSON) -> None:
        self.produces = produces

    async def __call__(self, request: Request) -> None:
        """Raises a 406 `Problem`."""
        _negotiate(request, self.produces)


class Requires:
    """A route for callers who may do all of these actions to everything: narrowed scopes don't open it."""

    def __init__(self, *actions: str, produces: str = JSON) -> None:
        unknown = set(actions) - scopes.ACTIONS
        if unknown:
            raise ValueError(f"no such actions: {unknown}")
        self.actions, self.produces = actions, produces

    async def __call__(self, request: Request) -> Caller:
        """Raises `Unauthenticated`, `NotFound` (a device out of scope) or a `Problem` (401, 403, 406)."""
        caller = await authenticate(request)
        await self._check(request, caller)
        _negotiate(request, self.produces)
        return caller

    def admit(self, caller: Caller) -> None:
        """Raises a 403 `Problem`."""
        demand(caller, *self.actions)

    async def _check(self, request: Request, caller: Caller) -> None:  # noqa: ARG002 - others look at it
        self.admit(caller)


class RequiresSome(Requires):
    """A route for callers who may do all of these actions to something; to what, it looks itself."""

    def admit(self, caller: Caller) -> None:
        """Raises a 403 `Problem`."""
        _refuse([action for action in self.actions if not caller.rights.may_some(action)])


class OnDevice(RequiresSome):
    """A route under `/v1/devices/{id}` for callers who may do all of these actions to that device.

    Args:
        name: the path's parameter that says under which name, where the actions' scopes can be narrowed to names.
    """

    def __init__(self, *actions: str, name: str | None = None, produces: str = JSON) -> None:
        super().__init__(*actions, produces=produces)
        self.name = name

    async def _check(self, request: Request, caller: Caller) -> None:
        self.admit(caller)
        path = request.path_params
        for action in self.actions:
            await reach(request, caller, action, path["id"], None if self.name is None else path[self.name])


class DeviceItselfOr(OnDevice):
    """A route under `/v1/devices/{id}` for that device's own token, and for callers with the actions."""

    async def _check(self, request: Request, caller: Caller) -> None:
        if caller.device is None:
            await super()._check(request, caller)
        elif caller.device != request.path_params["id"]:
            raise OutOfReach(no_device(request.path_params["id"]))


class DeviceItself(DeviceItselfOr):
    """A route under `/v1/devices/{id}` for that device's own token only."""

    async def _check(self, request: Request, caller: Caller) -> None:
        if caller.device is None:
            raise problems.Problem("forbidden", "Only the device itself can do this, with a token of its own.")
        await super()._check(request, caller)


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


class Right:
    """The port `fabric.waiting.Right`: a request's right to an answer that lasts.

    Args:
        check: raises unless the caller may still have it; None: a good token is enough.
    """

    def __init__(self, request: Request, check: Callable[[Caller], Awaitable[object]] | None = None) -> None:
        self._request, self._check = request, check

    async def check(self) -> None:
        """Raises what `authenticate` and the check given raise."""
        caller = await authenticate(self._request)
        if self._check is not None:
            await self._check(caller)

    def watched(self, lost: Callable[[], None]) -> AbstractAsyncContextManager[None]:
        """Within it, `lost` is called when the token is revoked."""
        known, (device, token, round) = services(self._request), self._request.state.let_in
        # Not `authenticate`: who revokes asks, and is not to act as this caller from then on.
        return known.lasting.open(device, token, round, lambda: verify(known, token), lost)


async def authenticate(request: Request) -> Caller:
    """Whose token the request carries.

    Raises:
        Unauthenticated: the token does not hold; the text says why.
        Problem: 401, there is not exactly one token.
    """
    given = request.headers.getlist("authorization")
    if len(given) != 1:
        detail = "The request has several 'Authorization' headers; send one." if given else _HOW
        raise problems.unauthenticated(detail, token_given=bool(given))
    scheme, _, token = given[0].partition(" ")
    if scheme.lower() != "bearer":
        raise problems.unauthenticated(_HOW, token_given=False)
    known = services(request)
    round = known.lasting.rounds  # before what is read of the token
    token = token.strip(" ")
    caller = await verify(known, token)
    _acts(known, caller)
    request.state.let_in = caller.device, token, round
    return caller


async def verify(known: Services, token: str) -> Caller:
    """Raises `Unauthenticated`, or `ProviderUnavailable` when a token of that provider can't be judged."""
    examined = tokens.examine(token)
    if examined.iss == known.tokens.issuer:
        return await known.tokens.bearer(examined)
    if names.is_device(examined.iss):
        claims = await known.logins.bearer(examined)
        return Caller(claims.sub, claims.jti, scopes.NOTHING, device=claims.sub, kid=claims.kid)
    if examined.iss in known.external.issuers:
        return await known.external.bearer(examined)
    raise problems.unauthenticated("No verifier is known for the token's 'iss'.", token_given=True)


def _acts(known: Services, caller: Caller) -> None:
    kind = Kind.CALLER if caller.device is None else Kind.DEVICE
    issuer = caller.issuer or caller.device or known.tokens.issuer
    audit.act_as(replace(audit.acting(), kind=kind, subject=caller.identity, issuer=issuer, jti=caller.jti))


def demand(caller: Caller, *needed: str) -> None:
    """Raises a 403 `Problem` that names which of these scopes the caller's rights don't cover."""
    _refuse([scope for scope in needed if not caller.rights.covers(scope)])


async def may(request: Request, caller: Caller, action: str, id: str, name: str | None = None) -> bool:
    """May the caller do this to the device?"""
    return bool(await Sight(request, caller, action).among([DeviceId(id)], lambda device: (device, name)))


async def reach(request: Request, caller: Caller, action: str, id: str, name: str | None = None) -> None:
    """Raises `OutOfReach` unless the caller may do this to the device."""
    if not await may(request, caller, action, id, name):
        raise OutOfReach(no_device(id))


class Sight:
    """What a caller may do something to, of whatever a list or a stream comes upon. Of devices whose groups make the
    difference, these are read; nothing is, for a caller whose scope is not narrowed."""

    def __init__(self, request: Request, caller: Caller, action: str) -> None:
        self._registry, self._rights, self._action = services(request).registry, caller.rights, action
        self._groups: dict[DeviceId, tuple[str, ...]] = {}
        self._until = 0.0

    async def among(self, things: Sequence[T], of: Callable[[T], tuple[DeviceId, str | None]]) -> Sequence[T]:
        """Those whose device and name, as `of` tells them, are within the caller's rights."""
        if self._rights.may(self._action):
            return things
        asked = [of(thing) for thing in things]
        groups = await self._read({device for device, _ in asked}) if self._rights.by_group(self._action) else {}
        return [
            thing
            for thing, (device, name) in zip(things, asked, strict=True)
            if self._rights.may(self._action, Target(device, groups.get(device, ())), name)
        ]

    async def _read(self, devices: set[DeviceId]) -> Mapping[DeviceId, tuple[str, ...]]:
        """Groups by device. A device that is not there has none."""
        now = time.monotonic()
        if now >= self._until or len(self._groups) >= _REMEMBERED:
            self._groups, self._until = {}, now + _BELIEVED_FOR
        if unknown := sorted(devices - self._groups.keys()):
            found = await self._registry.groups(unknown)
            self._groups |= {device: found.get(device, ()) for device in unknown}
        return self._groups


def no_device(id: str) -> NotFound:
    """What is said of every device that the caller can't see, whether or not it exists."""
    return NotFound(f"there is no device {DeviceId(id) if names.is_device(id) else 'of that id'}")


def _refuse(missing: Sequence[str]) -> None:
    if missing:
        raise problems.insufficient_scope(missing[:_NAMED])


_HOW = "Send a token in the header 'Authorization: Bearer …'; POST /v1/tokens or `restante token create` makes one."


def _negotiate(request: Request, produced: str) -> None:
    if not headers.accepts(request.headers.getlist("accept"), produced):
        raise problems.Problem("not-acceptable", f"The answer is {produced}; accept it, or leave 'Accept' out.")
