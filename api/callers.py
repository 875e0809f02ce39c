"""Who asks, and may they? Bearer tokens, each verified by the one verifier that its `iss` names.

Every route has one guard: `Requires(…)` or `Public()`. A guard runs before parameters and bodies are
looked at, and `api.openapi` reads from it what the document says about security.
"""

from fastapi import Request

from api import headers, problems
from api.services import Services
from fabric.errors import NotFound
from fabric.identity import scopes, tokens
from fabric.identity.issued import Caller
from topology import names
from topology.names import DeviceId

JSON = "application/json"


class Public:
    """A route that asks for no token. `produces` is its answer's media type."""

    def __init__(self, produces: str = JSON) -> None:
        self.produces = produces

    async def __call__(self, request: Request) -> None:
        """Raises a 406 `Problem`."""
        _negotiate(request, self.produces)


class Requires:
    """A route for callers whose token has all of these actions."""

    def __init__(self, *actions: str, produces: str = JSON) -> None:
        unknown = set(actions) - scopes.ACTIONS
        if unknown:
            raise ValueError(f"no such actions: {unknown}")
        self.actions, self.produces = actions, produces

    async def __call__(self, request: Request) -> Caller:
        """Raises `Unauthenticated` or a `Problem` (401, 403, 406)."""
        caller = await authenticate(request)
        demand(caller, *self.actions)
        _negotiate(request, self.produces)
        return caller


class DeviceItselfOr(Requires):
    """A route under `/v1/devices/{id}` for that device's own token, and for callers with the actions."""

    async def __call__(self, request: Request) -> Caller:
        """Raises `Unauthenticated`, `NotFound` (a device at another's address) or a `Problem` (401, 403, 406)."""
        caller = await authenticate(request)
        if caller.device is None:
            demand(caller, *self.actions)
        elif caller.device != request.path_params["id"]:
            # The same words as for a device that does not exist.
            raise no_device(request.path_params["id"])
        _negotiate(request, self.produces)
        return caller


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


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
    return await verify(services(request), token.strip(" "))


async def verify(known: Services, token: str) -> Caller:
    """Raises `Unauthenticated`."""
    examined = tokens.examine(token)
    if examined.iss == known.tokens.issuer:
        return await known.tokens.bearer(examined)
    if names.is_device(examined.iss):
        claims = await known.logins.bearer(examined)
        return Caller(claims.sub, claims.jti, scopes.NOTHING, device=claims.sub)
    raise problems.unauthenticated("No verifier is known for the token's 'iss'.", token_given=True)


def demand(caller: Caller, *actions: str) -> None:
    """Raises a 403 `Problem` that names what is missing."""
    missing = [action for action in actions if not caller.rights.may(action)]
    if missing:
        raise problems.insufficient_scope(missing)


def no_device(id: str) -> NotFound:
    """What is said of every device that the caller can't see, whether or not it exists."""
    return NotFound(f"there is no device {DeviceId(id) if names.is_device(id) else 'of that id'}")


_HOW = "Send a token in the header 'Authorization: Bearer …'; POST /v1/tokens or `restante token create` makes one."


def _negotiate(request: Request, produced: str) -> None:
    if not headers.accepts(request.headers.getlist("accept"), produced):
        raise problems.Problem("not-acceptable", f"The answer is {produced}; accept it, or leave 'Accept' out.")
