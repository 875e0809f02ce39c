"""The rings of signing keys: whatever is done to them in whatever order, and whenever one looks."""

import dataclasses
import json
from contextlib import suppress

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent import errors, trust
from fabric import keyring
from fabric.errors import Conflict, Invalid, NotFound
from fabric.keyring import Keys, Ring, State
from fabric.signing import SigningKey, jwks, signing_key
from topology import enrollment

BEGIN = 1_800_000_000
LEAD, OVERLAP = 120, 1_000
POOL = [signing_key(ec.generate_private_key(ec.SECP256R1())) for _ in range(40)]
BY_KID = {key.kid: key for key in POOL}


class World:
    """A ring that changes, and devices that know it from some moment on."""

    def __init__(self) -> None:
        self.now, self._spare = BEGIN, iter(POOL)
        self.ring = keyring.ring(next(self._spare), self.now)
        self.leaked: set[str] = set()

    def rotate(self, overlap: int = OVERLAP) -> None:
        self._take(keyring.rotated(self.ring, next(self._spare), self.now, LEAD, overlap))

    def retire(self, kid: str) -> None:
        self._take(keyring.retired(self.ring, kid, next(self._spare), self.now, 3))
        self.leaked.add(kid)

    def _take(self, after: Ring) -> None:
        self.ring = keyring.announced(self.ring, after, BY_KID[self.ring.newest.kid])

    def keys(self) -> Keys:
        return Keys(self.ring, BY_KID, lambda: self.now * 1_000_000)

    def device(self) -> trust.Trust:
        return trust.parse(self.keys().trusted())

    def tell(self, device: trust.Trust) -> trust.Trust:
        return device.follow(self.keys().announcements(device.version), self.now * 1000)

    def states(self) -> list[State]:
        return [self.ring.state(key, self.now) for key in self.ring.good(self.now)]


def test_a_next_key_is_published_first_then_signs_and_the_old_one_counts_for_a_while() -> None:
    world = World()
    first = world.ring.newest
    world.rotate()
    second = world.ring.newest
    assert world.states() == [State.CURRENT, State.NEXT]
    assert world.keys().signing().kid == first.kid
    assert [key["kid"] for key in world.keys().published()["keys"]] == [first.kid, second.kid]
    world.now += LEAD - 1
    assert world.keys().signing().kid == first.kid
    world.now += 1
    assert world.states() == [State.RETIRED, State.CURRENT]
    assert world.keys().signing().kid == second.kid
    world.now += OVERLAP - 1
    assert world.keys().public(first.kid) == first.public
    world.now += 1
    assert world.keys().public(first.kid) is None
    assert [key["kid"] for key in world.keys().published()["keys"]] == [second.kid]


def test_one_next_key_at_a_time_and_no_more_keys_than_devices_take() -> None:
    world = World()
    for _ in range(enrollment.MAX_SIGNING_KEYS - 1):
        world.rotate(100 * OVERLAP)
        with pytest.raises(Conflict, match="waits"):
            world.rotate()
        world.now += LEAD
    assert len(world.ring.announcements[-1]) <= enrollment.MAX_ANNOUNCEMENT
    with pytest.raises(Conflict, match="retire one"):
        world.rotate()


@pytest.mark.parametrize("next_waits", [True, False])
def test_the_key_that_signs_is_retired_when_its_successor_signs(next_waits: bool) -> None:
    world = World()
    leaked = world.ring.newest.kid
    if next_waits:
        world.rotate()
    world.retire(leaked)
    assert world.keys().signing().kid == leaked
    world.now += 3
    assert world.keys().signing().kid == world.ring.newest.kid != leaked
    assert world.keys().public(leaked) is None


def test_a_key_that_only_verifies_is_retired_at_once_and_so_is_the_next() -> None:
    world = World()
    first = world.ring.newest.kid
    world.rotate()
    second = world.ring.newest.kid
    world.retire(second)
    assert world.keys().public(second) is None
    assert world.states() == [State.CURRENT, State.NEXT]
    assert world.keys().signing().kid == first
    world.now += LEAD
    world.retire(first)
    assert world.keys().public(first) is None
    assert world.states() == [State.CURRENT]
    with pytest.raises(NotFound):
        world.retire(first)


steps = st.lists(
    st.tuples(st.sampled_from(["rotate", "retire", "hear", "enroll"]), st.integers(0, 2 * LEAD), st.integers(0, 3)),
    max_size=12,
)


@settings(max_examples=50)  # each signs and verifies
@given(steps)
def test_whatever_is_done_somebody_signs_and_devices_follow(done: list[tuple[str, int, int]]) -> None:
    world = World()
    devices = [world.device()]
    for what, later, which in done:
        world.now += later
        good = world.ring.good(world.now)
        try:
            if what == "rotate":
                world.rotate()
            elif what == "retire":
                world.retire(good[which % len(good)].kid)
            elif what == "hear":
                devices[which % len(devices)] = world.tell(devices[which % len(devices)])
            else:
                devices.append(world.device())
        except Conflict:
            pass  # one waits already
        signs = world.keys().signing().kid
        assert world.keys().public(signs) is not None
        assert keyring.decode(keyring.encode(world.ring)) == world.ring
        assert world.ring.newest.until is None
    behind = [device for device in devices if len(world.ring.announcements) < enrollment.MAX_ANNOUNCEMENTS]
    for device in behind:
        told = world.tell(device)
        assert told.version == world.ring.version
        listed = {key.kid for key in world.ring.good(world.now)}
        assert {kid for kid in told.keys if told.key(kid, world.now * 1000) is not None} == listed
    world.now += 3
    assert not world.leaked & {key.kid for key in world.ring.good(world.now)}


def test_a_device_that_was_away_for_as_many_changes_as_are_kept_follows_and_for_one_more_does_not() -> None:
    world = World()
    lost, device = world.device(), None
    for _ in range(enrollment.MAX_ANNOUNCEMENTS + 1):
        world.rotate()
        device = device or world.device()
        world.now += LEAD + OVERLAP
    assert device is not None
    assert world.tell(device).key(world.ring.newest.kid, world.now * 1000) is not None
    with pytest.raises(errors.KeysRefused, match="away for too many"):
        world.tell(lost)


def _changed(text: str, at: int) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


def test_only_those_who_are_trusted_are_believed() -> None:
    world = World()
    device, leaked = world.device(), world.ring.newest.kid
    forger = World()
    forger.ring = dataclasses.replace(world.ring, announcements=())
    before = forger.ring
    after = keyring.rotated(before, POOL[30], world.now, LEAD, OVERLAP)
    own = keyring.ring(POOL[31], world.now)
    by_another = keyring.announced(own, dataclasses.replace(after, announcements=()), POOL[31]).announcements
    with pytest.raises(errors.KeysRefused):
        device.follow(by_another, world.now * 1000)
    (true,) = keyring.announced(before, after, BY_KID[leaked]).announcements
    for at in (5, len(true) // 2, len(true) - 5):
        with pytest.raises(errors.KeysRefused):
            device.follow([_changed(true, at)], world.now * 1000)
    # One who has the leaked key: believed by who has not heard of it, by nobody who has.
    world.retire(leaked)
    world.now += 3
    heard = world.tell(device)
    forged = keyring.announced(before, dataclasses.replace(after, version=world.ring.version + 1), BY_KID[leaked])
    with pytest.raises(errors.KeysRefused):
        heard.follow(forged.announcements, world.now * 1000)
    assert heard.key(leaked, world.now * 1000) is None
    assert heard.follow([true], world.now * 1000) is heard  # an older one changes nothing


def _listed(**changed: object) -> dict[str, object]:
    return {"keys": [POOL[0].public | changed], "version": 1}


OTHER: dict[str, dict[str, object]] = {
    "another point": {"x": "A" * 43},
    "a short coordinate": {"x": POOL[0].public["x"][:-1]},
    "a padded coordinate": {"x": POOL[0].public["x"] + "="},
    "a number": {"x": 1},
    "another curve": {"crv": "P-384"},
    "another kind": {"kty": "oct"},
    "a private key": {"d": "A" * 43},
    "a negative end": {"exp": -1},
    "a text as end": {"exp": "soon"},
    "a truth as end": {"exp": True},
}


@pytest.mark.parametrize("what", OTHER)
def test_a_list_of_other_things_than_public_keys_is_refused(what: str) -> None:
    with pytest.raises(errors.BadAnswer):
        trust.parse(_listed(**OTHER[what]))


def test_a_list_of_too_many_keys_is_refused() -> None:
    with pytest.raises(errors.BadAnswer):
        trust.parse(jwks(*POOL[: enrollment.MAX_SIGNING_KEYS + 1]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
kept = trust.parse(jwks(POOL[0]))


def _jws(signer: SigningKey, claims: dict[str, object], headers: dict[str, object]) -> str:
    return jwt.encode(claims, signer.private, algorithm=enrollment.ALGORITHM, headers=headers)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_refused_as_news(text: str) -> None:
    with pytest.raises(errors.KeysRefused):
        kept.follow([text], BEGIN)


@settings(max_examples=50)  # each signs and verifies
@given(
    st.dictionaries(st.sampled_from(["keys", "version", "exp", "iat", "iss"]), json_values),
    st.dictionaries(st.sampled_from(["kid", "typ", "crit", "b64"]), json_values),
)
def test_no_claims_or_headers_do_more_than_be_refused(claims: dict[str, object], headers: dict[str, object]) -> None:
    try:
        text = _jws(POOL[0], claims, {"kid": POOL[0].kid, "typ": enrollment.KEYS_TYPE, **headers})
    except Exception:  # noqa: BLE001 - what can't be made can't be sent
        return
    with suppress(errors.KeysRefused):
        assert kept.follow([text], BEGIN).version >= kept.version


@given(json_values)
def test_any_document_is_a_trust_or_refused(value: object) -> None:
    for given_ in (value, {"keys": value}, {"keys": [value]}, {"keys": [POOL[0].public], "version": value}):
        with suppress(errors.BadAnswer):
            parsed = trust.parse(given_)
            assert trust.parse(parsed.document()).keys.keys() == parsed.keys.keys()


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_a_ring_or_refused(raw: bytes) -> None:
    with pytest.raises(Invalid):
        keyring.decode(raw)
