"""Who this device is: its key, which never leaves it, and the one service it is peered with.

State directory: `device.key` (P-256, made here) and `peering.json` (what enrollment answered, and the pinned
authorities); while keys are rotated `device.key.next`. All are 0600.
"""

import base64
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from device_agent import errors, files, pins, trust
from device_agent.pins import Pins
from device_agent.trust import Trust
from topology import enrollment, names, wire

KEY_FILE = "device.key"
NEXT_KEY_FILE = "device.key.next"
PEERING_FILE = "peering.json"
_KEPT = ("device_id", "generation", "amqps_url", "api_url", "audience", "signing_keys")
_PINS = "authorities"
_ES256 = ECAlgorithm(ECAlgorithm.SHA256)


@dataclass(frozen=True, slots=True)
class Peering:
    """The service this device belongs to; `signing_keys` are the keys whose commands it believes.

    `generation` is the device's: the commands of an earlier one were meant for whoever held the name before.
    """

    device: names.DeviceId
    generation: int
    amqps_host: str
    amqps_port: int
    vhost: str
    api_url: str
    mq_audience: str
    api_audience: str
    signing_keys: Trust


@dataclass(frozen=True, slots=True)
class DeviceKey:
    private: ec.EllipticCurvePrivateKey
    jwk: dict[str, str]
    kid: str


@dataclass(frozen=True, slots=True)
class Identity:
    key: DeviceKey
    peering: Peering
    pins: Pins

    @property
    def device(self) -> names.DeviceId:
        return self.peering.device

    def amqp_token(self, now_ms: int) -> str:
        """A fresh token for one AMQP connection; `now_ms` is the best known time (fabric's, or floored)."""
        return self._token(self.peering.mq_audience, now_ms, enrollment.AMQP_TOKEN_LIFE)

    def api_token(self, now_ms: int) -> str:
        return self._token(self.peering.api_audience, now_ms, enrollment.HTTP_TOKEN_LIFE)

    def verify(self, command: wire.Command, now_ms: int) -> bool:
        """Was this command signed by the service, for this generation of this device, exactly as it is? `now_ms` is
        the fabric's time."""
        key = self.peering.signing_keys.key(command.sig_kid, now_ms)
        if key is None or command.generation != self.peering.generation:
            return False
        try:
            signature = base64.urlsafe_b64decode(command.sig + "=" * (-len(command.sig) % 4))
        except ValueError:
            return False
        return bool(_ES256.verify(wire.signing_input(command, self.device), key, signature))

    def _token(self, audience: str, now_ms: int, life: int) -> str:
        issued = now_ms // 1000
        claims = {
            "iss": self.device,
            "sub": self.device,
            "aud": audience,
            "iat": issued,
            "exp": issued + life,
            "jti": secrets.token_urlsafe(16),
        }
        headers = {"typ": enrollment.DEVICE_TOKEN_TYPE, "kid": self.key.kid}
        return jwt.encode(claims, self.key.private, algorithm=enrollment.ALGORITHM, headers=headers)


def load(state_dir: Path) -> Identity:
    """The enrolled identity.

    Raises:
        errors.NotEnrolled: there is none here.
        errors.StateRefused: a file is open to others, or is not what it should be.
    """
    try:
        key = load_key(state_dir)
        raw = files.read_private(state_dir / PEERING_FILE)
    except FileNotFoundError as error:
        raise errors.NotEnrolled(
            f"{state_dir} holds no enrolled device; run `restante-agent enroll` with a ticket first"
        ) from error
    try:
        kept = json.loads(raw)
        for name, what in (("generation", "the device's generation"), (_PINS, "the authorities that it is pinned to")):
            if isinstance(kept, dict) and name not in kept:
                raise errors.StateRefused(
                    f"{state_dir / PEERING_FILE} does not say {what}: an earlier version of the agent made it."
                    " Run `restante-agent enroll` with a new ticket; the key and the journal are kept"
                )
        peering = parse_peering(kept)
        pinned = pins.parse(kept[_PINS])
    except (ValueError, errors.BadAnswer) as error:
        raise errors.StateRefused(f"{state_dir / PEERING_FILE} is damaged ({error}); enroll again") from error
    return Identity(key, peering, pinned)


def enrolled_device(state_dir: Path) -> str | None:
    """The device this directory belongs to, if that can be read; less is asked of the files than by `load`.

    Raises:
        errors.StateRefused: the file is open to others.
    """
    try:
        kept = json.loads(files.read_private(state_dir / PEERING_FILE))
    except (FileNotFoundError, ValueError):
        return None
    device = kept.get("device_id") if isinstance(kept, dict) else None
    return device if isinstance(device, str) else None


def load_key(state_dir: Path, name: str = KEY_FILE) -> DeviceKey:
    """Raises `FileNotFoundError` or `errors.StateRefused`."""
    path = state_dir / name
    content = files.read_private(path)
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise errors.StateRefused(
            f"{path} is no private key; restore it, or enroll anew in an empty directory"
        ) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise errors.StateRefused(f"{path} is not a P-256 key; restore it, or enroll anew in an empty directory")
    return _device_key(private)


def make_key(state_dir: Path, name: str = KEY_FILE) -> DeviceKey:
    """The key of this directory, made now if there is none yet. Of two who make one at once, both get the same."""
    try:
        return load_key(state_dir, name)
    except FileNotFoundError:
        pass
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        files.write_private(state_dir / name, pem, new=True)
    except FileExistsError:
        return load_key(state_dir, name)
    return _device_key(private)


def switch_keys(state_dir: Path) -> None:
    """Put the next key in the place of the present one, at once and durably."""
    (state_dir / NEXT_KEY_FILE).replace(state_dir / KEY_FILE)
    files.sync_directory(state_dir)


def store_peering(state_dir: Path, answer: dict[str, Any], pinned: Pins) -> None:
    """Keep what enrollment answered, and the pins with which it was asked."""
    with files.alone_in(state_dir):
        _write(state_dir, {name: answer[name] for name in _KEPT} | {_PINS: pinned.document()})


def learn(state_dir: Path, announcements: Sequence[str], now_ms: int) -> Identity:
    """Follow the announcements from the signing keys in the file, keep what they lead to, and return the identity with
    it.

    Raises:
        errors.KeysRefused: they are not to be believed.
        errors.NotEnrolled, errors.StateRefused: the identity can't be read or kept.
    """

    def followed(present: Identity) -> Identity:
        keys = present.peering.signing_keys.follow(announcements, now_ms)
        return replace(present, peering=replace(present.peering, signing_keys=keys))

    return _learnt(state_dir, followed)


def learn_authorities(state_dir: Path, announcements: Sequence[str], now_ms: int) -> Identity:
    """The same for the authorities that this device is pinned to.

    Raises:
        errors.AuthoritiesRefused: they are not to be believed.
        errors.NotEnrolled, errors.StateRefused: the identity can't be read or kept.
    """
    return _learnt(state_dir, lambda present: replace(present, pins=present.pins.follow(announcements, now_ms)))


def _learnt(state_dir: Path, followed: Callable[[Identity], Identity]) -> Identity:
    try:
        with files.alone_in(state_dir):
            present = load(state_dir)
            after = followed(present)
            if _versions(after) != _versions(present):
                kept = json.loads(files.read_private(state_dir / PEERING_FILE))
                keys, pinned = after.peering.signing_keys.document(), after.pins.document()
                _write(state_dir, kept | {"signing_keys": keys, _PINS: pinned})
    except OSError as error:
        raise errors.StateRefused(f"what was learnt can't be kept in {state_dir}: {error.strerror}") from error
    return after


def _versions(who: Identity) -> tuple[int, int]:
    return who.peering.signing_keys.version, who.pins.version


def _write(state_dir: Path, kept: dict[str, Any]) -> None:
    files.write_private(state_dir / PEERING_FILE, json.dumps(kept, indent=1).encode())


def parse_peering(answer: object) -> Peering:
    """The peering in an enrollment answer (or in the file kept of it).

    Raises:
        errors.BadAnswer: something in it is missing or outside the contract.
    """
    if not isinstance(answer, dict):
        raise errors.BadAnswer("the answer is not a JSON object")
    device = _text(answer, "device_id")
    if not names.is_device(device):
        raise errors.BadAnswer("'device_id' is no device id")
    audience = answer.get("audience")
    if not isinstance(audience, dict):
        raise errors.BadAnswer("'audience' is not an object")
    host, port, vhost = _amqps(_text(answer, "amqps_url"))
    generation = answer.get("generation")
    if not isinstance(generation, int) or isinstance(generation, bool) or generation < 1:
        raise errors.BadAnswer("'generation' is missing or no positive number")
    return Peering(
        device=names.DeviceId(device),
        generation=generation,
        amqps_host=host,
        amqps_port=port,
        vhost=vhost,
        api_url=_text(answer, "api_url"),
        mq_audience=_text(audience, "mq"),
        api_audience=_text(audience, "api"),
        signing_keys=trust.parse(answer.get("signing_keys")),
    )


def _device_key(private: ec.EllipticCurvePrivateKey) -> DeviceKey:
    full = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
    jwk = {name: str(full[name]) for name in ("crv", "kty", "x", "y")}
    return DeviceKey(private, jwk, enrollment.thumbprint(jwk))


def _amqps(url: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(url)
        port = parts.port or 5671
    except ValueError as error:
        raise errors.BadAnswer("'amqps_url' is no URL") from error
    if parts.scheme != "amqps" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise errors.BadAnswer("'amqps_url' is not of the form amqps://host:port/vhost")
    return parts.hostname, port, unquote(parts.path.removeprefix("/")) or names.VHOST


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 500:
        raise errors.BadAnswer(f"'{name}' is missing or no text")
    return value
