"""Enrollment (SECURITY.md, rule 7): a ticket becomes a peering.

The authority is fetched over a connection that carries nothing else, compared with the digest in the
ticket, and pinned; only a second connection, verified against it, ever carries the code. Running it again
with the same ticket and key gives the same answer.
"""

import http.client
from pathlib import Path
from typing import Any

import jwt

from device_agent import errors, files, https, identity, journal, log, pins, successors, timekeeping, tls
from device_agent.clock import FabricClock
from device_agent.pins import Pins
from device_agent.timekeeping import Times
from topology import enrollment

_PEM = "application/x-pem-file"


def enroll(state_dir: Path, api_url: str, ticket_text: str) -> identity.Identity:
    """Trade the ticket for a peering, kept in `state_dir`.

    Raises:
        errors.InvalidValue: the ticket or the URL is not one.
        errors.PeerNotTrusted: the service is not the one the ticket names (a subclass says why).
        errors.EnrollmentRefused: the service said no.
        errors.BadAnswer, errors.Unreachable, errors.StateRefused
    """
    service = https.parse_url(api_url)
    try:
        ticket = enrollment.decode_ticket(ticket_text)
    except enrollment.BadTicket as error:
        raise errors.InvalidValue(str(error)) from None
    files.private_directory(state_dir)
    counts = journal.read_counts(state_dir)
    times = Times(FabricClock(), counts[1] if counts else 0)
    pinned = fetch_authority(service, ticket.authority_digest, times.floor())
    authority = pinned.pem(times.floor())
    key = identity.make_key(state_dir)
    answer = timekeeping.with_right_time(
        service, authority, times, lambda: _request_enrollment(service, authority, ticket, key, times)
    )
    peering = identity.parse_peering(answer)
    pinned = _as_of(answer, pinned)
    _same_device(state_dir, peering)
    identity.store_peering(state_dir, answer, pinned)
    return identity.Identity(key, peering, pinned)


def fetch_authority(service: https.Service, digest: bytes, now_ms: int) -> Pins:
    """The service's authority, if it is the one with this SHA-256, or what that one announced as its successor.

    Raises:
        errors.WrongAuthority: it is another one.
        errors.BadAnswer, errors.Unreachable
    """
    status, body = https.exchange(service, tls.unverified(), "GET", "/v1/authority", accept=_PEM)
    if status != http.client.OK:
        raise errors.BadAnswer(
            f"{service.url}/v1/authority answered {status} instead of a certificate; check the address"
        )
    shown = pins.one(body.decode("ascii", "replace"))
    if shown.pins[0].digest == digest:
        return shown
    try:
        told = successors.ask(service)
        if (named := pins.named(digest, told)) is not None:
            return named.follow(told, now_ms)
    except errors.AgentError as error:
        log.debug("authorities.unanswered", because=str(error))
    raise errors.WrongAuthority(
        f"the authority of {service.url} is not the one the ticket names: the ticket is for another service, or"
        " the connection is intercepted. Nothing was sent. Check the address and ask for a new ticket"
    )


def _request_enrollment(
    service: https.Service, authority: str, ticket: enrollment.Ticket, key: identity.DeviceKey, times: Times
) -> dict[str, Any]:
    claims = {"code_hash": enrollment.code_hash(ticket.code), "iat": times.now() // 1000}
    proof = jwt.encode(
        claims, key.private, algorithm=enrollment.ALGORITHM, headers={"typ": enrollment.PROOF_TYPE, "kid": key.kid}
    )
    request = {"code": enrollment.encode_code(ticket.code), "public_key": key.jwk, "proof": proof}
    status, body = https.exchange(service, tls.pinned(authority, times.floor), "POST", "/v1/enroll", request)
    answer = https.json_object(body)
    if status not in (http.client.OK, http.client.CREATED):
        raise _refusal(service, status, answer)
    if answer is None:
        raise errors.BadAnswer(f"{service.url} answered the enrollment with something that is not a JSON object")
    return answer


def _refusal(service: https.Service, status: int, answer: dict[str, Any] | None) -> errors.AgentError:
    said = https.said(answer)
    text = f"{service.url} refused the enrollment with {status}" + (f" ({said})" if said else "")
    if 300 <= status < 400:
        return errors.BadAnswer(f"{text}; redirects are not followed: use the service's own address")
    if status == http.client.GONE:
        return errors.EnrollmentRefused(f"{text}; the ticket is used, expired or withdrawn: ask for a new one")
    if status >= 500 or status == http.client.TOO_MANY_REQUESTS:
        return errors.Unreachable(f"{text}; try again later with the same ticket")
    return errors.EnrollmentRefused(f"{text}; ask for a new ticket if this one can't be right")


def _as_of(answer: dict[str, Any], pinned: Pins) -> Pins:
    """The pins, with the version from which on their successors are news."""
    given, version = answer.get("authority"), answer.get("authorities_version", 0)
    try:
        same = isinstance(given, str) and pins.one(given).pins[0] in pinned.pins
    except errors.BadAnswer:
        same = False
    if not same:
        raise errors.WrongAuthority(
            "the authority in the enrollment's answer is not the one the ticket names; nothing was kept."
            " The service is misconfigured or compromised: tell whoever runs it"
        )
    return pins.parse(pinned.document() | {"version": version}) if pinned.version == 0 else pinned


def _same_device(state_dir: Path, peering: identity.Peering) -> None:
    # Only the name matters: a file that an earlier version wrote must not keep the device from enrolling again.
    present = identity.enrolled_device(state_dir)
    if present not in (None, peering.device):
        raise errors.StateRefused(
            f"{state_dir} already holds device {log.escape(present)}, and the ticket is for {peering.device};"
            " use a state directory of its own for each device"
        )
