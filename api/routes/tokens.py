"""Tokens of callers, and the keys that verify them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, openapi, paging, schemas
from api.callers import Public, Requires, demand, services
from api.problems import Problem
from fabric import keyring, presenting
from fabric.identity.issued import Caller, identity
from fabric.identity.revocation import Disowned

router = APIRouter(tags=["tokens"])

_WRITE = Requires("tokens:write")
_OPEN = Public()
_SECOND = 1_000_000  # µs
_MARGIN = 1  # seconds: `mint` looks at the clock after we did


@router.post(
    "/v1/tokens",
    status_code=201,
    response_model=schemas.NewTokenDocument,
    summary="Make a token",
    **openapi.operation(_WRITE, body={"application/json": schemas.NewToken}),
)
async def mint(request: Request, caller: Annotated[Caller, Depends(_WRITE)]) -> Response:
    """Shown this once. Its scopes and its life lie within those of the token it is asked with, and it is revoked with
    that one. Who is in a group may change: a scope for a group covers none for its devices."""
    given = await bodies.model(request, schemas.NewToken)
    demand(caller, *given.scopes)
    known = services(request)
    left = caller.ends - known.clock.now() // _SECOND - _MARGIN
    life = given.life if "life" in given.model_fields_set else min(schemas.TOKEN_LIFE_DEFAULT, left)
    if life > left:
        longest = f"'life' may be {max(left, 0)} at most"
        raise Problem("forbidden", f"The token would outlive the one it is made with; {longest}.")
    token, kept = await known.tokens.mint(given.subject, tuple(given.scopes), life, caller)
    return answers.answer(answers.token(kept) | {"token": token}, 201, {"Cache-Control": "no-store"})


@router.get("/v1/tokens", response_model=schemas.TokensPage, summary="List tokens", **openapi.operation(_WRITE))
async def listing(
    request: Request, page: Annotated[schemas.Page, Query()], caller: Annotated[Caller, Depends(_WRITE)]
) -> Response:
    """What is kept of them: never the token itself."""
    registry = services(request).registry
    found, following = await paging.read(request, caller, page, registry.tokens, lambda each: each.jti)
    return answers.page([answers.token(each) for each in found], following)


@router.delete(
    "/v1/tokens",
    response_model=schemas.DisownedDocument,
    summary="Revoke all tokens of a subject",
    **openapi.operation(_WRITE),
)
async def revoke_all(
    request: Request, query: Annotated[schemas.Tokens, Query()], caller: Annotated[Caller, Depends(_WRITE)]
) -> Response:
    """And all that were made with them, whoever they are for. Nothing is open by them when the answer comes, or it says
    until when. Tokens that are made afterwards are good. With `issuer`, it is that external provider's subject, of
    which tokens are good that were issued over a minute later. `purge` needs `commands:send`."""
    _may_purge(caller, query)
    subject = query.subject if query.issuer is None else identity(query.issuer, query.subject)
    return await _disowned(request, await services(request).revocation.subject(subject), query)


@router.delete(
    "/v1/tokens/{jti}",
    response_model=schemas.DisownedDocument,
    summary="Revoke a token",
    **openapi.operation(_WRITE, refusals=(404,)),
)
async def revoke(
    request: Request,
    jti: schemas.Uuid,
    query: Annotated[schemas.Purge, Query()],
    caller: Annotated[Caller, Depends(_WRITE)],
) -> Response:
    """And all that were made with it. Nothing is open by them when the answer comes, or it says until when. Revoking it
    again revokes nothing. `purge` needs `commands:send`."""
    _may_purge(caller, query)
    return await _disowned(request, await services(request).revocation.token(jti), query)


@router.get(
    "/.well-known/jwks.json",
    response_model=schemas.JwksDocument,
    summary="Read the keys that verify the fabric's tokens",
    **openapi.operation(_OPEN),
)
async def jwks(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """A JWK set (RFC 7517). The next key is in it before anything is signed with it, and a retired one for as long as
    what it signed counts."""
    cached = f"public, max-age={keyring.CACHED_FOR}"
    return answers.answer(services(request).token_keys.published(), 200, {"Cache-Control": cached})


def _may_purge(caller: Caller, query: schemas.Purge) -> None:
    """Raises a 403 `Problem`: whoever withdraws a command could have sent it."""
    if query.purge:
        demand(caller, "commands:send")


async def _disowned(request: Request, done: Disowned, query: schemas.Purge) -> Response:
    commands = services(request).commands
    purged = await commands.purge(done.subjects) if query.purge else 0
    return answers.answer(
        {
            "revoked": done.tokens,
            "pending_until": presenting.optional_time(done.pending_until),
            "queued": await commands.waiting_of(done.subjects),
            "purged": purged,
        }
    )
