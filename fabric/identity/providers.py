"""External identity providers: what is believed of a token that one of them signed. Pure.

Claims follow RFC 9068. A caller's rights are what its scopes and the provider's `max_scope` have in common; its
identity is the provider's issuer and the subject, together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from fabric.errors import Unauthenticated
from fabric.identity import scopes, tokens
from fabric.identity.issued import Caller, identity
from fabric.identity.jwks import Key
from fabric.identity.tokens import Unverified
from topology import wire

LONGEST_LIFE = 3600  # seconds from `iat` that a token counts, however long it says
LONGEST_LEEWAY = 60  # seconds
# Claims that change whose token it is, or ask for a proof beside it: to overlook one would be to widen the token.
_NOT_UNDERSTOOD = ("act", "cnf")


@dataclass(frozen=True, slots=True)
class Provider:
    """Whom to believe, and how far.

    Attributes:
        issuer: the `iss` of its tokens, byte for byte.
        audience: the `aud`, or one of it.
        jwks_url: where its keys are.
        max_scope: what its callers may do at most; scopes, separated by spaces.
        algorithms: of its signatures.
        typ: the `typ` of its tokens' headers.
        scope_claim: the claim with the scopes: a text that spaces separate, or an array.
        scope_prefix: what stands before those of its scopes that are meant for us; the others count for nothing.
        allow_private: networks of ours in which `jwks_url` may be.
        authority: who vouches for its host, in PEM; None: the system's authorities.
        leeway: seconds that its clock may differ.
    """

    issuer: str
    audience: str
    jwks_url: str
    max_scope: str
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    typ: str = tokens.ISSUED_TOKEN_TYPE
    scope_claim: str = "scope"
    scope_prefix: str = ""
    allow_private: tuple[IPv4Network | IPv6Network, ...] = ()
    authority: Path | None = None
    leeway: int = LONGEST_LEEWAY


def verify(provider: Provider, token: Unverified, key: Key, now: int) -> Caller:
    """Who asks with a token of this provider, and until when.

    Args:
        key: the provider's, of the token's `kid`.
        now: epoch seconds on the fabric's clock.

    Raises:
        Unauthenticated: says what does not hold.
    """
    if token.typ != provider.typ:
        raise Unauthenticated(f"the token's 'typ' is not '{provider.typ}', which is accepted of its issuer")
    if token.alg not in provider.algorithms or token.alg not in key.algorithms:
        raise Unauthenticated("the token's 'alg' is not accepted of its issuer, or not for its key")
    claims = tokens.signed_claims(token, key.public, ("iss", "sub", "aud", "iat", "exp"))
    audience = claims["aud"]
    if provider.audience not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthenticated("the token is for another audience")
    if present := [name for name in _NOT_UNDERSTOOD if name in claims]:
        raise Unauthenticated(f"the token has the claim '{present[0]}', which is not understood here")
    known_as = identity(provider.issuer, token.sub)
    if not known_as.isascii() or len(known_as) > wire.MAX_ISSUER:
        raise Unauthenticated(
            f"issuer and subject of the token are not ASCII, {wire.MAX_ISSUER - 1} characters at most"
        )
    iat, exp = tokens.time(claims, "iat"), tokens.time(claims, "exp")
    nbf = tokens.time(claims, "nbf") if "nbf" in claims else iat
    if exp <= iat:
        raise Unauthenticated("the token ends before it begins")
    if max(iat, nbf) > now + provider.leeway:
        raise Unauthenticated("the token is not valid yet; compare the clocks of its issuer and of the fabric")
    ends = min(exp, iat + LONGEST_LIFE)
    if now >= ends + provider.leeway:
        raise Unauthenticated(f"the token has expired; {LONGEST_LIFE} s after its 'iat' it counts no more in any case")
    ceiling = scopes.parse(provider.max_scope)
    rights = scopes.parse(_granted(claims, provider)).within(ceiling)
    return Caller(token.sub, token.jti, rights, issuer=provider.issuer, issued_at=iat, ends=ends)


def _granted(claims: Mapping[str, object], provider: Provider) -> str:
    """The scopes in our grammar's words."""
    given = claims.get(provider.scope_claim)
    # An entry of an array is one scope: what has a space in it is malformed.
    entries = given.split(" ") if isinstance(given, str) else given if isinstance(given, list) else []
    prefix = provider.scope_prefix
    ours = [each.removeprefix(prefix) for each in entries if isinstance(each, str) and each.startswith(prefix)]
    return " ".join(each for each in ours if " " not in each)
