"""A new key for the old one, without a moment in which the device has none.

The next key lies beside the present one until the service has registered it; only then it takes its place, by
one rename. Interrupted anywhere, the present key works, and running it again goes on with the same next key.
"""

import fcntl
import http.client
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jwt

from device_agent import errors, files, https, identity, journal, timekeeping, tls
from device_agent.clock import FabricClock
from device_agent.timekeeping import Times
from topology import enrollment

LOCK_FILE = "rotation.lock"


@dataclass(frozen=True, slots=True)
class Rotated:
    """The new key, and the ones that are good for nothing now."""

    kid: str
    dropped: tuple[str, ...]


def rotate(state_dir: Path, *, drop_old: bool = False) -> Rotated:
    """Replace the device's key; with `drop_old`, the keys that the new one descends from are good for nothing then.

    Raises:
        errors.RotationRefused: the service did not take the key, or did not drop the old one.
        errors.LoginRefused: it does not know this device any more.
        errors.NotEnrolled, errors.StateRefused, errors.AlreadyRunning
        errors.PeerNotTrusted, errors.BadAnswer, errors.Unreachable
    """
    files.private_directory(state_dir)
    with _alone(state_dir):
        present = identity.load(state_dir)
        counts = journal.read_counts(state_dir)
        service = _Service(present, Times(FabricClock(), counts[1] if counts else 0))
        key = identity.make_key(state_dir, identity.NEXT_KEY_FILE)
        dropped: list[str] = []
        try:
            service.register(key)
        except errors.RotationRefused:
            # There may be as many as may be, from rotations before this one.
            dropped = service.drop_others() if drop_old else []
            if not dropped:
                raise
            service.register(key)
        identity.switch_keys(state_dir)
        if drop_old:
            service = _Service(identity.load(state_dir), service.times)
            dropped += service.drop_others()
        return Rotated(key.kid, tuple(dropped))


class _Service:
    """The device's own routes, with tokens of one of its keys."""

    def __init__(self, who: identity.Identity, times: Times) -> None:
        self._who, self.times = who, times
        self._service = https.parse_url(who.peering.api_url)
        self._keys = f"/v1/devices/{who.device}/keys"

    def register(self, key: identity.DeviceKey) -> None:
        def attempt() -> None:
            claims = {"device": self._who.device, "parent": self._who.key.kid, "iat": self.times.now() // 1000}
            headers = {"typ": enrollment.KEY_PROOF_TYPE, "kid": key.kid}
            proof = jwt.encode(claims, key.private, algorithm=enrollment.ALGORITHM, headers=headers)
            status, answer = self._ask("POST", self._keys, {"public_key": key.jwk, "proof": proof})
            if status not in (http.client.OK, http.client.CREATED):
                raise self._refused("the new key", status, answer)

        self._rightly(attempt)

    def drop_others(self) -> list[str]:
        """Drop all active keys that the present one descends from; returns them."""
        return [kid for kid in self._active() if kid != self._who.key.kid and self._drop(kid)]

    def _active(self) -> list[str]:
        status, answer = self._ask("GET", self._keys)
        listed = answer.get("items") if answer is not None and status == http.client.OK else None
        if not isinstance(listed, list) or not all(isinstance(each, dict) and "kid" in each for each in listed):
            raise errors.BadAnswer(f"{self._service.url}{self._keys} answered {status} without keys")
        return [str(each["kid"]) for each in listed]

    def _drop(self, kid: str) -> bool:
        """False when it is not this key's to drop."""
        status, answer = self._ask("DELETE", f"{self._keys}/{kid}")
        if status in (http.client.FORBIDDEN, http.client.NOT_FOUND):
            return False
        if status != http.client.OK:
            raise self._refused("to drop the old key", status, answer)
        return True

    def _ask(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object] | None]:
        """Raises `errors.LoginRefused`."""
        context = tls.pinned(self._who.pins.pem(self.times.floor()), self.times.floor)
        headers = {"Authorization": f"Bearer {self._who.api_token(self.times.now())}"}
        status, content = https.exchange(self._service, context, method, path, body, headers=headers)
        answer = https.json_object(content)
        if status == http.client.UNAUTHORIZED:
            raise errors.LoginRefused(f"{self._service.url} refused this device's token ({https.said(answer)})")
        return status, answer

    def _rightly(self, attempt: Callable[[], None]) -> None:
        authority = self._who.pins.pem(self.times.floor())
        timekeeping.with_right_time(self._service, authority, self.times, attempt)

    def _refused(self, what: str, status: int, answer: dict[str, object] | None) -> errors.AgentError:
        text = f"{self._service.url} refused {what} with {status} ({https.said(answer)})"
        if status >= http.client.INTERNAL_SERVER_ERROR:
            return errors.Unreachable(f"{text}; try again later")
        hint = ". With --drop-old there is room" if status == http.client.CONFLICT else ""
        return errors.RotationRefused(f"{text}; the present key is as good as before{hint}")


@contextmanager
def _alone(state_dir: Path) -> Iterator[None]:
    descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise errors.AlreadyRunning(f"another rotation runs on {state_dir}; let it end first") from error
        yield
    finally:
        os.close(descriptor)
