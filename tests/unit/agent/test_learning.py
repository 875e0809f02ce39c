"""What an agent learns of the keys that sign commands is kept, and nothing else of its peering is touched."""

import dataclasses
import itertools
import json
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator import authority
from device_agent import errors, identity, pins
from fabric import keyring
from fabric.signing import SigningKey, signing_key

NOW = 1_800_000_000
AUTHORITY = authority.make_authority("ours", ["localhost"], now=datetime.now(UTC))
PINS = pins.one(AUTHORITY.certificate_pem.decode())
FIRST, SECOND, THIRD = (signing_key(ec.generate_private_key(ec.SECP256R1())) for _ in range(3))


def news(*signers: SigningKey) -> tuple[str, ...]:
    """That each of them is followed by the next one."""
    ring = keyring.ring(signers[0], NOW)
    for number, (signer, made) in enumerate(itertools.pairwise(signers), 1):
        after = keyring.rotated(ring, made, NOW + number * 1_000, 100, 10_000)
        ring = keyring.announced(ring, after, signer)
    return ring.announcements


@pytest.fixture
def state(tmp_path: Path) -> Path:
    answer: dict[str, Any] = {
        "device_id": "garage-7",
        "generation": 1,
        "amqps_url": "amqps://localhost:1/devices",
        "api_url": "https://localhost:1",
        "audience": {"mq": "restante/mq/local", "api": "restante/api"},
        "signing_keys": {"keys": [FIRST.public]},
    }
    tmp_path.chmod(0o700)
    identity.make_key(tmp_path)
    identity.store_peering(tmp_path, answer, PINS)
    return tmp_path


def test_the_chain_is_followed_and_kept(state: Path) -> None:
    before = identity.load(state)
    learnt = identity.learn(state, news(FIRST, SECOND, THIRD), NOW * 1000)
    assert set(learnt.peering.signing_keys.keys) == {FIRST.kid, SECOND.kid, THIRD.kid}
    again = identity.load(state)
    assert again.peering.signing_keys.document() == learnt.peering.signing_keys.document()
    assert dataclasses.replace(again.peering, signing_keys=before.peering.signing_keys) == before.peering
    assert stat.S_IMODE((state / identity.PEERING_FILE).stat().st_mode) == 0o600


def test_what_is_not_to_be_believed_changes_nothing(state: Path) -> None:
    before = (state / identity.PEERING_FILE).read_bytes()
    for forged in (news(SECOND, THIRD), (*news(FIRST, SECOND), "nonsense"), ("",)):
        with pytest.raises(errors.KeysRefused):
            identity.learn(state, forged, NOW * 1000)
        assert (state / identity.PEERING_FILE).read_bytes() == before


def test_what_is_known_is_not_written_again(state: Path) -> None:
    told = news(FIRST, SECOND)
    identity.learn(state, told, NOW * 1000)
    before = (state / identity.PEERING_FILE).stat()
    assert identity.learn(state, told, NOW * 1000).peering.signing_keys.version == NOW + 1_000
    assert (state / identity.PEERING_FILE).stat().st_ino == before.st_ino


def test_a_new_enrollment_is_the_base_of_what_is_learnt_after_it(state: Path) -> None:
    """Though the agent that learns still has the peering before it in memory."""
    kept = json.loads((state / identity.PEERING_FILE).read_text())
    identity.store_peering(state, kept | {"generation": 2, "signing_keys": {"keys": [SECOND.public]}}, PINS)
    with pytest.raises(errors.KeysRefused):
        identity.learn(state, news(FIRST, SECOND), NOW * 1000)
    learnt = identity.learn(state, news(SECOND, THIRD), NOW * 1000)
    assert learnt.peering.generation == 2
    assert set(learnt.peering.signing_keys.keys) == {SECOND.kid, THIRD.kid}


def test_a_directory_that_cannot_be_written_is_said(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("device_agent.files.os.fsync", full)
    with pytest.raises(errors.StateRefused, match="No space left"):
        identity.learn(state, news(FIRST, SECOND), NOW * 1000)
    monkeypatch.undo()
    assert set(identity.load(state).peering.signing_keys.keys) == {FIRST.kid}


def test_keys_of_before_there_were_versions_are_a_beginning(state: Path) -> None:
    assert identity.load(state).peering.signing_keys.version == 0
    assert json.loads((state / identity.PEERING_FILE).read_text())["signing_keys"] == {"keys": [FIRST.public]}
