"""Lists in pages: where the next one begins, sealed, and no page that costs more than a few reads."""

import base64
import binascii
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from fastapi import Request

from api import schemas
from api.problems import invalid
from fabric.identity.issued import Caller

STEP = 100  # things of one read, when those that the caller may not see are left out
STEPS = 10  # reads of one page at most

T = TypeVar("T")


class Cursors:
    """Cursors that only the caller who was given them can use, for the list and the filter that they are of.

    They are encrypted (AES-SIV, RFC 5297), since a page may end at a thing that the caller must not know of. `secret`
    holds at least 256 random bits, and outlives every rotation of keys.
    """

    def __init__(self, secret: str) -> None:
        self._sealing = AESSIV(hashlib.sha512(secret.encode()).digest())

    def seal(self, last: str, bound_to: Sequence[object]) -> str:
        sealed = self._sealing.encrypt(last.encode(), [_text(bound_to)])
        return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    def open(self, cursor: str | None, bound_to: Sequence[object]) -> str | None:
        """Raises a 422 `Problem` for any other cursor than one that `seal` made for this."""
        if cursor is None:
            return None
        try:
            sealed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)
            last = self._sealing.decrypt(sealed, [_text(bound_to)]).decode()
        except (binascii.Error, ValueError, InvalidTag):
            last = ""
        # Decoding overlooks some spare bits; another spelling is another cursor.
        if self.seal(last, bound_to) != cursor:
            raise invalid([("query:cursor", "Use the 'next' of the page before, as it was given.")])
        return last


async def read(
    request: Request,
    caller: Caller,
    query: schemas.Page,
    page: Callable[[str | None, int], Awaitable[Sequence[T]]],
    key: Callable[[T], str],
    seen: Callable[[Sequence[T]], Awaitable[Sequence[T]]] | None = None,
) -> tuple[list[T], str | None]:
    """One page of a list, and the cursor of the next, if there may be one.

    Args:
        page: reads so many things behind one, in the list's order; `key` is what it knows a thing by.
        seen: those of them that the caller may see; None for all. A page may then be short, and even empty.

    Raises:
        Problem: 422, a cursor of another caller, list or filter.
    """
    cursors = request.app.state.services.cursors
    bound_to = (caller.identity, request.url.path, query.model_dump(mode="json", exclude={"cursor", "limit"}))
    after = cursors.open(query.cursor, bound_to)
    size = query.limit if seen is None else STEP
    given: list[T] = []
    for step in range(1, STEPS + 1):
        found = await page(after, size)
        for thing in found if seen is None else await seen(found):
            given.append(thing)
            if len(given) == query.limit:
                return given, cursors.seal(key(thing), bound_to)
        if len(found) < size:
            break
        after = key(found[-1])
        if step == STEPS:
            return given, cursors.seal(after, bound_to)
    return given, None


def _text(bound_to: Sequence[object]) -> bytes:
    return json.dumps(bound_to, sort_keys=True).encode()
