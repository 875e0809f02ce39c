"""The authority as files: read, watched, and changed by `restante certs ca`.

`authority/ca.pem` is what callers verify with: the certificates that are believed. `authority/ca.key` are the private
keys that are on this machine, none if they were taken off it. From the first succession on `authority/authorities.json`
is the truth about the certificates, and nothing in it is secret.
"""

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator import authority
from api.operator.authority import AuthorityError, Credential
from api.operator.secrets import private_directory, replace_private, write_private
from fabric import authorities
from fabric.authorities import Authorities, Pinned
from fabric.errors import Invalid, Temporary

OVERLAP = 7 * 86_400  # seconds that the one before is believed after a switch
SHORTEST_OVERLAP = 600  # seconds: longer than a broker keeps a certificate that was replaced
LONGEST_OVERLAP = 366 * 86_400
SHORTEST_PASSPHRASE = 8  # characters

_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n.+?\n-----END \1-----\n?", re.DOTALL)

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AuthorityFiles:
    """Where the authority is under a state directory."""

    state_dir: Path

    @property
    def certificates(self) -> Path:
        return self.state_dir / "authority" / "ca.pem"

    @property
    def keys(self) -> Path:
        return self.state_dir / "authority" / "ca.key"

    @property
    def succession(self) -> Path:
        return self.state_dir / "authority" / "authorities.json"


@dataclass(frozen=True, slots=True)
class Unlock:
    """A file that `export` made, and what it was encrypted with."""

    file: Path
    passphrase: bytes


def prepare(files: AuthorityFiles, hosts: list[str], log: Log) -> None:
    """Make an authority for these hosts, if there is none; put right what an interrupted change left.

    Raises:
        AuthorityError: what is there can't be read.
    """
    private_directory(files.certificates.parent)
    with _alone(files):
        if not files.certificates.exists() and not files.succession.exists():
            made = _made(hosts)
            authority.save(made, files.certificates, files.keys)
            log("made an authority of our own")
        _derive(files, read(files))


def adopt(files: AuthorityFiles, given: Path) -> None:
    """Have devices trust the authority in this file, which is not ours.

    Raises:
        AuthorityError: it is not one certificate of an authority, or devices trust another one already.
    """
    try:
        der = authority.pem_to_der(given.read_text("ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise AuthorityError(f"The authority {given} can't be read: {error}.") from None
    certificate = x509.load_der_x509_certificate(der)
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise AuthorityError(f"{given} is not the certificate of an authority.")
    private_directory(files.certificates.parent)
    with _alone(files):
        if (files.certificates.exists() or files.succession.exists()) and read(files).serving.der != der:
            raise AuthorityError(
                f"Devices trust the authority in {files.certificates}, and not the one in {given}. Put the old one"
                f" back, or move {files.certificates.parent} away and enroll all devices again."
            )
        replace_private(files.certificates, authority.der_to_pem(der).encode())


def read(files: AuthorityFiles) -> Authorities:
    """Raises `AuthorityError`, saying to run `restante setup`."""
    try:
        if files.succession.exists():
            return authorities.decode(files.succession.read_bytes())
        return authorities.alone(authority.to_der(authority.load_certificate(files.certificates)))
    except (OSError, Invalid) as error:
        raise AuthorityError(
            f"The authorities {files.succession} can't be read ({error}); run `restante setup`, or restore the file."
        ) from error


def serving(files: AuthorityFiles) -> x509.Certificate:
    """The one that issues the servers' certificates. Raises `AuthorityError`."""
    return x509.load_der_x509_certificate(read(files).serving.der)


class Watch:
    """The authorities, followed while the process runs: `look` is to be called once a second.

    Raises:
        AuthorityError: at the start, as `read`.
    """

    def __init__(self, files: AuthorityFiles) -> None:
        self._files = files
        self.authorities = Pinned(read(files))
        self._seen = b""

    async def look(self) -> None:
        """Raises `Temporary`: the file can't be read. The authorities stay what they were."""
        try:
            found = self._files.succession.read_bytes()
            if found != self._seen:
                self.authorities.replace(authorities.decode(found))
                self._seen = found
        except FileNotFoundError:  # there was no succession yet
            return
        except (OSError, Invalid) as error:
            raise Temporary(f"the authorities {self._files.succession}: {error}") from error


def signer(files: AuthorityFiles, certificate: x509.Certificate, unlock: Unlock | None) -> Credential:
    """An authority with its private key, which is on this machine or in an exported file.

    Raises:
        AuthorityError: it is not there.
    """
    for key in keys(files) if unlock is None else _unlocked(unlock):
        if key.public_key() == certificate.public_key():
            return Credential(certificate, key)
    if unlock is not None:
        raise AuthorityError(f"The key of this authority is not in {unlock.file}.")
    raise AuthorityError(
        f"The authority's key is not in {files.keys}. If it was exported, run `restante certs renew --ca-key FILE`; an"
        " authority that is not ours issues nothing here: replace what it has issued."
    )


def keys(files: AuthorityFiles) -> list[ec.EllipticCurvePrivateKey]:
    """Those that are on this machine. Raises `AuthorityError`."""
    try:
        return _parse(files.keys.read_bytes(), None)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityError(f"{files.keys} does not hold unencrypted private keys in PEM ({error}).") from error


def rotate(files: AuthorityFiles, hosts: list[str], unlock: Unlock | None, log: Log) -> Authorities:
    """Make a successor, for the names of the present authority and these hosts, and announce it. Nothing else changes.

    Raises:
        Conflict: one waits already.
        AuthorityError, Invalid: one sentence.
    """
    with _alone(files):
        before = read(files)
        present = x509.load_der_x509_certificate(before.newest.der)
        by = signer(files, present, unlock)
        made = _made([*authority.hosts_of(present), *hosts])
        after = authorities.succeeded(before, made.certificate_der, by.key, int(time.time()))
        # The key first: an authority that was announced never lacks it.
        _keep(files, [*keys(files), made.key])
        _replace(files, after)
    log(f"the successor {after.newest.id} is announced; connected devices have heard of it within a minute")
    log("`restante certs ca switch` has it issue the certificates")
    return after


def switch(files: AuthorityFiles, overlap: int, unlock: Unlock | None, log: Log) -> Authorities:
    """Have the successor issue the certificates from now on, and announce the end of the one before.

    Raises:
        Conflict: there is none.
        AuthorityError: its key is not there.
    """
    with _alone(files):
        before = read(files)
        by = signer(files, x509.load_der_x509_certificate(before.newest.der), unlock)
        after = authorities.switched(before, by.key, int(time.time()), overlap)
        _replace(files, after)
        _tidy(files, after)
    ends = datetime.fromtimestamp(after.listed[0].until or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    log(f"the authority {after.newest.id} issues the certificates; the one before it is believed until {ends}")
    return after


def export(files: AuthorityFiles, file: Path, passphrase: bytes, log: Log, *, delete: bool) -> None:
    """Write the keys that are on this machine to a new file, encrypted; with `delete`, take them off the machine.

    Raises:
        AuthorityError: there is none, the passphrase is too short, or the file can't be written or read back.
    """
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise AuthorityError(f"A passphrase has {SHORTEST_PASSPHRASE} characters at least.")
    with _alone(files):
        held = keys(files)
        if not held:
            raise AuthorityError(
                f"There is no key in {files.keys}; it was exported and deleted before, or is not ours."
            )
        encryption = serialization.BestAvailableEncryption(passphrase)
        certificates = "".join(authority.der_to_pem(each.der) for each in read(files).listed).encode()
        try:
            write_private(file, b"".join(_pem(key, encryption) for key in held) + certificates)
            _sync(file.parent)
        except OSError as error:
            raise AuthorityError(f"{file} can't be written: {error.strerror}.") from error
        again = _unlocked(Unlock(file, passphrase))
        if [_numbers(key) for key in again] != [_numbers(key) for key in held]:
            raise AuthorityError(f"What was written to {file} does not read back as it was; nothing was deleted.")
        log(f"the authority's key is in {file}, encrypted")
        if delete:
            files.keys.unlink()
            _sync(files.keys.parent)
            log(f"and no more on this machine; `--ca-key {file.name}` of `restante certs` brings it in")


def _made(hosts: list[str]) -> Credential:
    # A name of its own: whoever verifies picks the issuer by its name.
    return authority.make_authority(
        f"Restante authority {secrets.token_hex(4)}", list(dict.fromkeys(hosts)), now=datetime.now(UTC)
    )


def _replace(files: AuthorityFiles, after: Authorities) -> None:
    replace_private(files.succession, authorities.encode(after))
    _derive(files, after)


def _derive(files: AuthorityFiles, present: Authorities) -> None:
    """What callers verify with; the one that serves comes first."""
    good = sorted(present.good(int(time.time())), key=lambda each: each is not present.serving)
    content = "".join(authority.der_to_pem(each.der) for each in good).encode()
    if not files.certificates.exists() or files.certificates.read_bytes() != content:
        replace_private(files.certificates, content)


def _tidy(files: AuthorityFiles, present: Authorities) -> None:
    """Remove the keys that issue no more; with them nobody can issue in their name."""
    held = keys(files)
    newest = x509.load_der_x509_certificate(present.newest.der).public_key()
    if kept := [key for key in held if key.public_key() == newest]:
        _keep(files, kept)
    else:
        files.keys.unlink(missing_ok=True)


def _keep(files: AuthorityFiles, held: list[ec.EllipticCurvePrivateKey]) -> None:
    replace_private(files.keys, b"".join(_pem(key, serialization.NoEncryption()) for key in held))


def _unlocked(given: Unlock) -> list[ec.EllipticCurvePrivateKey]:
    try:
        return _parse(given.file.read_bytes(), given.passphrase)
    except OSError as error:
        raise AuthorityError(f"{given.file} can't be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"{given.file} can't be decrypted; is it the right file and passphrase?") from error


def _parse(content: bytes, passphrase: bytes | None) -> list[ec.EllipticCurvePrivateKey]:
    found = []
    for block in _BLOCK.finditer(content):
        if block[1].endswith(b"PRIVATE KEY"):
            key = serialization.load_pem_private_key(block[0], passphrase)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError("a key is not on an elliptic curve")
            found.append(key)
    if not found:
        raise ValueError("there is no private key in it")
    return found


def _pem(key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _numbers(key: ec.EllipticCurvePrivateKey) -> int:
    return key.private_numbers().private_value


@contextmanager
def _alone(files: AuthorityFiles) -> Iterator[None]:
    try:
        descriptor = os.open(files.certificates.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AuthorityError(f"There is no authority in {files.certificates.parent}; run `restante setup`.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
