"""Request headers that mean something here, read as their RFCs say. Pure: texts in, values out."""

import re
from collections.abc import Iterable, Sequence

from topology import wire

LONGEST_WAIT = 60  # seconds

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's token
_PREFERENCE = re.compile(rf'({_TOKEN})\s*(?:=\s*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)"))?\s*', re.ASCII)
_ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_LATER_TRACEPARENT = re.compile(r"(?!00|ff)[0-9a-f]{2}-([0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})(?:-.*)?", re.ASCII)
_HEADER_LIMIT = 1000  # characters that are read of a header


def wait(prefer: Iterable[str]) -> int | None:
    """Seconds of the preference `wait` (RFC 7240), 60 at most; None when there is none to honour.

    Preferences that are not understood are ignored, as the RFC demands; of repeated ones the first counts.
    """
    for part in ",".join(prefer)[:_HEADER_LIMIT].split(","):
        found = _PREFERENCE.match(part.strip())
        if found is None or found[1].lower() != "wait":
            continue
        amount = found[2] or found[3] or ""
        if not re.fullmatch(r"[0-9]{1,9}", amount, re.ASCII):
            return None
        return min(int(amount), LONGEST_WAIT) or None
    return None


def entity_tags(if_match: Sequence[str]) -> frozenset[str] | None:
    """The entity tags of `If-Match`, or `{"*"}`; None when the header is absent. Weak ones never match, so
    they may stay among them."""
    if not if_match:
        return None
    text = ",".join(if_match)[:_HEADER_LIMIT].strip()
    return frozenset({"*"}) if text == "*" else frozenset(_ENTITY_TAG.findall(text))


def accepts(accept: Sequence[str], produced: str) -> bool:
    """May an answer of this media type be sent (RFC 9110, section 12.5.1)? Yes, when `accept` is empty."""
    text = ",".join(accept)[:_HEADER_LIMIT].strip().lower()
    if text in ("", "*/*", produced):
        return True
    best: tuple[int, float] | None = None
    for part in text.split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        specificity = {"*/*": 0, f"{produced.partition('/')[0]}/*": 1, produced: 2}.get(media)
        if specificity is not None and (best is None or specificity > best[0]):
            best = (specificity, _quality(parameters))
    return best is not None and best[1] > 0


def traceparent(given: Sequence[str]) -> str | None:
    """The one valid `traceparent` (W3C Trace Context, section 3.2) as version 00, else None: a bad one is left out.

    Of a later version the part that we know is taken, as the specification asks.
    """
    if len(given) != 1:
        return None
    later = _LATER_TRACEPARENT.fullmatch(given[0])
    known = f"00-{later[1]}" if later is not None else given[0]
    return known if wire.is_traceparent(known) else None


def media_type(content_type: str | None) -> str:
    """`type/subtype` in lower case, without its parameters; empty when there is none."""
    return (content_type or "").partition(";")[0].strip().lower()


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, amount = parameter.partition("=")
        if name.strip() == "q":
            return float(amount) if re.fullmatch(r"[01](\.[0-9]{0,3})?", amount.strip(), re.ASCII) else 0.0
    return 1.0
