"""Tokens of callers, and the keys that verify them."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api import answers, bodies, openapi, schemas
from api.callers import Public, Requires, demand, services
from api.problems import Problem
from fabric.errors import NotFound, Unauthenticated
from fabric.identity.issued import Caller

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
    """Shown this once. Its scopes and its life lie within those of the token it is asked with."""
    given = await bodies.model(request, schemas.NewToken)
    demand(caller, *given.scopes)
    known = services(request)
    minter = await known.registry.token(caller.jti)
    if minter is None:
        raise Unauthenticated("the token was revoked")
    left = (minter.expires_at - known.clock.now()) // _SECOND - _MARGIN
    life = given.life if "life" in given.model_fields_set else min(schemas.TOKEN_LIFE_DEFAULT, left)
    if life > left:
        longest = f"'life' may be {max(left, 0)} at most"
        raise Problem("forbidden", f"The token would outlive the one it is made with; {longest}.")
    token, kept = await known.tokens.mint(given.subject, tuple(given.scopes), life)
    return answers.answer(answers.token(kept) | {"token": token}, 201, {"Cache-Control": "no-store"})


@router.get("/v1/tokens", response_model=schemas.TokensPage, summary="List tokens", **openapi.operation(_WRITE))
async def listing(
    request: Request, page: Annotated[schemas.Page, Query()], _: Annotated[Caller, Depends(_WRITE)]
) -> Response:
    """What is kept of them: never the token itself."""
    after = answers.read_cursor(page.cursor, schemas.UUID7)
    found = await services(request).registry.tokens(after, page.limit)
    following = answers.cursor(found[-1].jti) if len(found) == page.limit else None
    return answers.page([answers.token(each) for each in found], following)


@router.delete(
    "/v1/tokens/{jti}", status_code=204, summary="Revoke a token", **openapi.operation(_WRITE, refusals=(404,))
)
async def revoke(request: Request, jti: schemas.Uuid, _: Annotated[Caller, Depends(_WRITE)]) -> Response:
    """It is refused within a second, everywhere. Revoking it again changes nothing."""
    known = services(request)
    if await known.registry.revoke_token(jti, known.clock.now()) is None:
        raise NotFound(f"there is no token {jti}")
    return Response(status_code=204)


@router.get(
    "/.well-known/jwks.json",
    response_model=schemas.JwksDocument,
    summary="Read the keys that verify the fabric's tokens",
    **openapi.operation(_OPEN),
)
async def jwks(request: Request, _: Annotated[None, Depends(_OPEN)]) -> Response:
    """A JWK set (RFC 7517)."""
    return answers.answer(services(request).token_keys, 200, {"Cache-Control": "public, max-age=300"})
