"""The succession of authorities as it is announced, and what an agent believes of it."""

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator import authority
from api.operator.authority import Credential
from device_agent import errors, pins
from device_agent.pins import Pins
from fabric import authorities
from fabric.authorities import Authorities, Pinned
from fabric.errors import Conflict, Invalid
from topology import enrollment

NOW = 1_800_000_000
AT = datetime.fromtimestamp(NOW - 1_000, UTC)
WEEK = 7 * 86_400


def made(*hosts: str) -> Credential:
    return authority.make_authority("test", hosts or ("localhost",), now=AT)


A, B, C, X = (made() for _ in range(4))


def known(*trusted: Credential, version: int = 0) -> Pins:
    return pins.parse({"authorities": [{"certificate": b64(each)} for each in trusted], "version": version})


def b64(credential: Credential) -> str:
    return base64.b64encode(credential.certificate_der).decode()


def held(given: Pins) -> list[bytes]:
    return [pin.der for pin in given.pins]


def first() -> Authorities:
    return authorities.alone(A.certificate_der)


def second() -> Authorities:
    return authorities.succeeded(first(), B.certificate_der, A.key, NOW)


def third() -> Authorities:
    return authorities.switched(second(), B.key, NOW + 100, WEEK)


def said(signer: Credential, by: Credential, *listed: object, version: object = NOW, typ: str = "") -> str:
    """An announcement as an attacker writes it: in the name of `by`, with the key of `signer`."""
    headers = {"typ": typ or enrollment.AUTHORITIES_TYPE, "kid": enrollment.authority_id(by.certificate_der)}
    claims = {"version": version, "authorities": list(listed)}
    return jwt.encode(claims, signer.key, algorithm="ES256", headers=headers)


def cert(credential: Credential, **more: object) -> dict[str, object]:
    return {"certificate": b64(credential), **more}


def test_a_device_follows_from_one_authority_to_the_next() -> None:
    learnt = known(A).follow(second().announcements, NOW * 1000)
    assert held(learnt) == [A.certificate_der, B.certificate_der]
    switched = learnt.follow(third().announcements, NOW * 1000)
    assert held(switched) == held(learnt)
    assert switched.version == third().version > learnt.version
    ends = (NOW + 100 + WEEK) * 1000
    assert switched.pem(ends - 1) == (A.certificate_pem + B.certificate_pem).decode()
    assert switched.pem(ends) == B.certificate_pem.decode()
    assert pins.parse(json.loads(json.dumps(switched.document()))).document() == switched.document()


def test_a_device_that_was_away_follows_all_at_once() -> None:
    assert known(A).follow(third().announcements, NOW * 1000).version == third().version


def test_three_authorities_in_a_row() -> None:
    at = NOW + 200 + WEEK
    fourth = authorities.succeeded(third(), C.certificate_der, B.key, at)
    assert [each.der for each in fourth.listed] == [B.certificate_der, C.certificate_der]
    assert held(known(A).follow(fourth.announcements, at * 1000)) == [B.certificate_der, C.certificate_der]


def test_which_one_serves_and_what_who_knows_it_alone_has_heard() -> None:
    """Enrolled by a ticket of any moment, a device follows from then on."""
    for present, serving in ((first(), A), (second(), A), (third(), B)):
        assert present.serving.der == serving.certificate_der
        assert Pinned(present).digest == authority.fingerprint(serving.certificate)
        enrolled = known(serving, version=present.serving_version)
        told = Pinned(present).announcements(enrolled.version)
        assert held(enrolled.follow(told, NOW * 1000))[-1] == present.newest.der
    later = authorities.succeeded(third(), C.certificate_der, B.key, NOW + 200 + WEEK)
    enrolled = known(B, version=third().serving_version)
    assert held(enrolled.follow(later.announcements, NOW * 1000))[-1] == C.certificate_der


def test_who_knows_the_present_list_is_told_nothing() -> None:
    present = third()
    assert Pinned(present).announcements(present.version) == ()
    assert Pinned(present).announcements(second().version) == present.announcements


def test_a_ticket_of_before_leads_to_the_successor() -> None:
    start = pins.named(authority.fingerprint(A.certificate), third().announcements)
    assert start is not None
    assert held(start) == [A.certificate_der]
    assert held(start.follow(third().announcements, NOW * 1000))[-1] == B.certificate_der
    assert pins.named(authority.fingerprint(X.certificate), third().announcements) is None


def _altered() -> Iterator[tuple[str, Pins, Callable[[], str]]]:
    both = known(A, B, version=NOW - 1)
    yield "a stranger's", known(A), lambda: said(X, X, cert(A), cert(X))
    yield "a stranger's, in the name of the present one", known(A), lambda: said(X, A, cert(A), cert(X))
    yield "of the one that is succeeded", both, lambda: said(A, A, cert(A), cert(X))
    yield "of the one that is succeeded, in the successor's name", both, lambda: said(A, B, cert(A), cert(X))
    yield "of one that was dropped", known(B), lambda: said(A, A, cert(X))
    yield "that is a command's keys'", known(A), lambda: said(A, A, cert(A), cert(B), typ=enrollment.KEYS_TYPE)
    yield "with three", known(A), lambda: said(A, A, cert(A), cert(B), cert(C))
    yield "with none", known(A), lambda: said(A, A)
    yield "with an end of all", known(A), lambda: said(A, A, cert(A, exp=1), cert(B, exp=NOW))
    yield "with a server as authority", known(A), lambda: said(A, A, cert(A), cert(server()))
    yield "with no certificate", known(A), lambda: said(A, A, {"certificate": "AAAA"})
    yield "with a number for it", known(A), lambda: said(A, A, {"certificate": 1})
    yield "with a text for a version", known(A), lambda: said(A, A, cert(A), cert(B), version="2")
    yield "that is too long", known(A), lambda: said(A, A, cert(A), cert(B), cert(C), "x" * 6_000)
    yield "that is nonsense", known(A), lambda: "nonsense"
    yield "that is empty", known(A), lambda: ""
    yield "without a signature", known(A), lambda: second().announcements[0].rpartition(".")[0] + "."
    yield "with alg none", known(A), unsigned
    yield "of a version of its own", known(A), lambda: altered(second().announcements[0])


def server() -> Credential:
    return authority.issue(A, ["localhost"], now=AT)


def unsigned() -> str:
    headers = {"typ": enrollment.AUTHORITIES_TYPE, "kid": enrollment.authority_id(A.certificate_der)}
    return jwt.encode({"version": NOW, "authorities": [cert(A), cert(X)]}, "", algorithm="none", headers=headers)


def altered(announcement: str) -> str:
    head, _, signature = announcement.split(".")
    claims = json.dumps({"version": NOW, "authorities": [cert(A), cert(X)]}).encode()
    return ".".join((head, base64.urlsafe_b64encode(claims).rstrip(b"=").decode(), signature))


@pytest.mark.parametrize(("who", "make"), [pytest.param(*each[1:], id=each[0]) for each in _altered()])
def test_news_that_is_not_to_be_believed(who: Pins, make: Callable[[], str]) -> None:
    with pytest.raises(errors.AuthoritiesRefused):
        who.follow([make()], NOW * 1000)


def test_too_much_news_is_refused() -> None:
    with pytest.raises(errors.AuthoritiesRefused, match="more than there can be"):
        known(A).follow(second().announcements * (enrollment.MAX_ANNOUNCEMENTS + 1), NOW * 1000)


def test_old_news_is_passed_over() -> None:
    """Told again, by whomever: a list that was replaced does not come back."""
    now = known(B, version=third().version)
    assert now.follow(third().announcements, NOW * 1000) == now


def test_an_authority_whose_certificate_has_ended_announces_nothing() -> None:
    ended = authority.make_authority("ended", ["localhost"], now=AT, validity=timedelta(seconds=10))
    told = authorities.succeeded(authorities.alone(ended.certificate_der), B.certificate_der, ended.key, NOW)
    with pytest.raises(errors.AuthoritiesRefused, match="has ended"):
        known(ended).follow(told.announcements, NOW * 1000)


def test_steps_out_of_turn_are_refused() -> None:
    with pytest.raises(Conflict, match="no successor waits"):
        authorities.switched(first(), A.key, NOW, WEEK)
    with pytest.raises(Conflict, match="no successor waits"):
        authorities.switched(third(), B.key, NOW, WEEK)
    with pytest.raises(Conflict, match="waits already"):
        authorities.succeeded(second(), C.certificate_der, B.key, NOW)
    with pytest.raises(Conflict, match="still believe the authority before"):
        authorities.succeeded(third(), C.certificate_der, B.key, NOW + 200)
    for signer in (B.key, ec.generate_private_key(ec.SECP256R1())):
        with pytest.raises(ValueError, match="newest authority of the list before"):
            authorities.succeeded(first(), C.certificate_der, signer, NOW)


def test_a_successor_for_very_many_names_is_refused() -> None:
    large = made(*(f"machine-{number}.plant.example.org" for number in range(50)))
    with pytest.raises(Invalid, match="too many names"):
        authorities.succeeded(first(), large.certificate_der, A.key, NOW)


def test_the_largest_news_fits() -> None:
    def of_size(number: int) -> Credential:
        return made(*(f"m{each:03}.example.org" for each in range(number)))

    largest = next(
        each for each in map(of_size, range(70, 0, -1)) if len(each.certificate_der) <= enrollment.MAX_AUTHORITY
    )
    told = authorities.succeeded(authorities.alone(largest.certificate_der), largest.certificate_der, largest.key, NOW)
    assert len(told.announcements[0]) <= enrollment.MAX_AUTHORITIES_NEWS
    assert known(largest).follow(told.announcements, NOW * 1000).version == NOW


@pytest.mark.parametrize("given", [first(), second(), third()], ids=["one", "a successor waits", "switched"])
def test_the_file_reads_back(given: Authorities) -> None:
    assert authorities.decode(authorities.encode(given)) == given


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"\xff", b'{"version": 1, "before": 0, "authorities": [], "announcements": []}']
)
def test_a_file_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(Invalid):
        authorities.decode(raw)


def test_a_list_that_was_restored_goes_on_above_what_was_told() -> None:
    restored = dataclasses.replace(first(), version=0)
    assert authorities.succeeded(restored, C.certificate_der, A.key, NOW + 5_000).version > third().version
