"""The rings of signing keys as files: made, read, watched, and changed by `restante keys`.

The ring itself, `keys/<purpose>.json`, holds nothing secret: workers need no more. Each private key is a file of its
own, `secrets/<purpose>/<kid>.pem`, 0600, from before the ring names it until some time after it has signed last. A
change is the replacement of the one file; interrupted anywhere, there is the ring before or the ring after.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator.authority import AuthorityError
from api.operator.secrets import private_directory, replace_private
from fabric import keyring
from fabric.clock import Clock
from fabric.errors import Invalid, Temporary
from fabric.keyring import Keys, Ring, State
from fabric.signing import SigningKey, signing_key

READ_EVERY = 1.0  # seconds between looks at the files
_KEPT = 300  # seconds that a private key stays after it has signed last: clocks differ


class Purpose(StrEnum):
    TOKENS = "tokens"
    COMMANDS = "commands"


@dataclass(frozen=True, slots=True)
class RingFiles:
    """Where a ring is under a state directory."""

    state_dir: Path
    purpose: Purpose

    @property
    def ring(self) -> Path:
        return self.state_dir / "keys" / f"{self.purpose}.json"

    @property
    def private(self) -> Path:
        return self.state_dir / "secrets" / self.purpose.value

    @property
    def only(self) -> Path:
        """The one key of the layout before there were rings."""
        return self.state_dir / "secrets" / f"{self.purpose}.pem"

    def pem(self, kid: str) -> Path:
        return self.private / f"{kid}.pem"


def prepare(files: RingFiles, log: Callable[[str], None]) -> None:
    """Make a ring with one key, if there is none; remove private keys that sign no more.

    Raises:
        AuthorityError: what is there can't be read.
    """
    now = int(time.time())
    with _alone(files):
        if not files.ring.exists():
            first = _load(files.only) if files.only.exists() else signing_key(_new())
            _keep(files, first)
            replace_private(files.ring, keyring.encode(keyring.ring(first, now)))
            log(f"made the ring of keys that sign {files.purpose}")
        files.only.unlink(missing_ok=True)
        _tidy(files, read(files), now)


def read(files: RingFiles) -> Ring:
    """Raises `AuthorityError`, saying to run `restante setup`."""
    try:
        return keyring.decode(files.ring.read_bytes())
    except (OSError, Invalid) as error:
        raise AuthorityError(
            f"The signing keys {files.ring} can't be read ({error}); run `restante setup`, or restore the file."
        ) from error


def open_keys(files: RingFiles, clock: Callable[[], int], *, private: bool = True) -> Keys:
    """The keys as they are in the files at present; `clock` tells microseconds.

    Args:
        private: with what it takes to sign.

    Raises:
        AuthorityError: they can't be read, or a private key is missing that will be needed.
    """
    ring = read(files)
    return Keys(ring, _held(files, ring, clock() // 1_000_000) if private else {}, clock)


class Watch:
    """Keys that follow their files while the process runs: `look` is to be called once every `READ_EVERY`.

    Raises:
        AuthorityError: at the start, as `open_keys`.
    """

    def __init__(self, files: RingFiles, clock: Clock, *, private: bool = True) -> None:
        self._files, self._clock, self._private = files, clock, private
        self.keys = open_keys(files, clock.now, private=private)
        self._seen = b""
        self.problem = False

    async def look(self) -> None:
        """Raises `Temporary`: the files can't be read. The keys stay what they were."""
        try:
            found = self._files.ring.read_bytes()
            if found != self._seen:
                ring = keyring.decode(found)
                held = _held(self._files, ring, self._clock.now() // 1_000_000) if self._private else {}
                self.keys.replace(ring, held)
                self._seen = found
        except (OSError, Invalid, AuthorityError) as error:
            self.problem = True
            raise Temporary(f"the ring of keys that sign {self._files.purpose}: {error}") from error
        self.problem = False


def rotate(files: RingFiles, now: int, lead: int, overlap: int) -> Ring:
    """Give the ring a successor of its newest key.

    Raises:
        Conflict: one waits already, or the ring is full.
        AuthorityError: the files can't be read.
    """
    return _change(files, now, lambda ring, made: keyring.rotated(ring, made, now, lead, overlap))


def retire(files: RingFiles, kid: str, now: int, lead: int) -> Ring:
    """Let nothing count that this key has signed; see `keyring.retired`.

    Raises:
        NotFound: it is not in the ring.
        Conflict: the ring is full.
        AuthorityError: the files can't be read.
    """
    return _change(files, now, lambda ring, made: keyring.retired(ring, kid, made, now, lead))


def _change(files: RingFiles, now: int, change: Callable[[Ring, SigningKey], Ring]) -> Ring:
    with _alone(files):
        before, made = read(files), signing_key(_new())
        after = change(before, made)
        if files.purpose is Purpose.COMMANDS:
            after = keyring.announced(before, after, _load(files.pem(before.newest.kid)))
        if after.newest.kid == made.kid:
            _keep(files, made)
        replace_private(files.ring, keyring.encode(after))
        _tidy(files, after, now)
        return after


@contextmanager
def _alone(files: RingFiles) -> Iterator[None]:
    for directory in (files.private.parent, files.private, files.ring.parent):
        private_directory(directory)
    descriptor = os.open(files.ring.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _held(files: RingFiles, ring: Ring, now: int) -> Mapping[str, SigningKey]:
    """The private keys that sign, now or later."""
    return {key.kid: _load(files.pem(key.kid)) for key in ring.keys[ring.keys.index(ring.current(now)) :]}


def _keep(files: RingFiles, key: SigningKey) -> None:
    pem = key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    replace_private(files.pem(key.kid), pem)


def _tidy(files: RingFiles, ring: Ring, now: int) -> None:
    """Remove what an interrupted change left, and what signs no more; with it nobody can sign in its name."""
    needed = {key.kid for key in ring.keys if ring.state(key, now - _KEPT) is not State.RETIRED}
    for path in files.private.iterdir():
        if path.suffix != ".pem" or path.stem not in needed:
            path.unlink()


def _new() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _load(path: Path) -> SigningKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityError(f"The signing key {path} can't be read ({error}); restore it.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AuthorityError(f"{path} is not a P-256 key.")
    return signing_key(key)
