"""`restante certs`: the servers' certificates shown and renewed; the authority's key taken off the machine; its
succession.

It works on the state directory alone, so that it can run where there is no network. What changes is taken up by running
processes that share the directory; with compose, `docker compose run --rm setup` hands it out.
"""

import getpass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from api.operator import authority, certificates, setup, succession
from api.operator.authority import AuthorityError
from api.operator.broker_files import replace_certificate
from api.operator.setup import Files
from api.operator.succession import Log, Unlock
from api.settings import Settings
from fabric.errors import Invalid

Document = dict[str, object]


def listing(settings: Settings) -> list[Document]:
    """All authorities that are believed, and all certificates. Raises `AuthorityError`."""
    files, now = Files(settings.state_dir), datetime.now(UTC)
    known = succession.read(files.authorities)
    held = [key.public_key() for key in succession.keys(files.authorities)]
    shown: list[Document] = []
    for each in known.good(int(now.timestamp())):
        certificate = x509.load_der_x509_certificate(each.der)
        state = "serving" if each is known.serving else "retired" if each.until is not None else "next"
        until = certificate.not_valid_after_utc
        if each.until is not None:
            until = min(until, datetime.fromtimestamp(each.until, UTC))
        shown.append(
            {
                "authority": certificate.subject.rfc4514_string(),
                "id": each.id,
                "state": state,
                "names": authority.hosts_of(certificate),
                "until": _time(until),
                "key_is_here": certificate.public_key() in held,
            }
        )
    for path in (files.certificate, files.broker_certificate):
        if path.exists():
            certificate = authority.load_certificate(path)
            shown.append(
                {
                    "certificate": path.stem,
                    "names": authority.hosts_of(certificate),
                    "issuer": certificate.issuer.rfc4514_string(),
                    "until": _time(certificate.not_valid_after_utc),
                    "due": certificates.is_due(certificate, now),
                }
            )
    return shown


def renew(settings: Settings, days: int, log: Log, *, force: bool, unlock: Unlock | None) -> None:
    """Issue the certificates again that have less than a third of their life left, or were not issued by the present
    authority; with `force`, or `days`, all. Certificates that were brought along are taken over from their files.

    Raises:
        Invalid: a number outside its bounds; nothing was done.
        AuthorityError: one sentence.
    """
    if days and not 1 <= days <= certificates.LONGEST_DAYS:
        raise Invalid(f"--days is 1 to {certificates.LONGEST_DAYS}")
    files = Files(settings.state_dir)
    if settings.authority_certificate:
        names = [authority.hosts_of(authority.load_certificate(path)) for path in _present(files)]
        setup.make_certificates(settings, names[0], names[-1], log)
    else:
        wanted = days or (authority.SERVER_VALIDITY.days if force else 0)
        # All of them, whether the one before was due or not.
        done = [
            certificates.keep(files.authorities, path, (), log, unlock=unlock, days=wanted) for path in _present(files)
        ]
        if not any(done):
            log("nothing to do: each certificate has more than a third of its life left")
    node = settings.state_dir / "broker"
    if node.is_dir():
        replace_certificate(node, files.broker_certificate.read_bytes())


def rotate(settings: Settings, hosts: list[str], unlock: Unlock | None, log: Log) -> None:
    """See `succession.rotate`."""
    _ours(settings)
    succession.rotate(Files(settings.state_dir).authorities, hosts, unlock, log)


def switch(settings: Settings, retire_after: int | None, unlock: Unlock | None, log: Log) -> None:
    """See `succession.switch`; issues the certificates, too.

    Raises:
        Invalid: a number outside its bounds; nothing was done.
        Conflict, AuthorityError: one sentence.
    """
    _ours(settings)
    overlap = succession.OVERLAP if retire_after is None else retire_after
    if not succession.SHORTEST_OVERLAP <= overlap <= succession.LONGEST_OVERLAP:
        raise Invalid(f"--retire-after is {succession.SHORTEST_OVERLAP} to {succession.LONGEST_OVERLAP} seconds")
    succession.switch(Files(settings.state_dir).authorities, overlap, unlock, log)
    # Should this be interrupted: whatever the one before has issued is due at the next `renew` or start.
    renew(settings, 0, log, force=False, unlock=unlock)


def export(settings: Settings, file: Path, passphrase_file: Path | None, log: Log, *, delete: bool) -> None:
    """See `succession.export`."""
    passphrase = _passphrase(passphrase_file, twice=True)
    succession.export(Files(settings.state_dir).authorities, file, passphrase, log, delete=delete)


def unlock(key: Path | None, passphrase_file: Path | None) -> Unlock | None:
    """The exported key that was named on the command line, with its passphrase. Raises `AuthorityError`."""
    return None if key is None else Unlock(key, _passphrase(passphrase_file, twice=False))


def _ours(settings: Settings) -> None:
    if settings.authority_certificate:
        raise AuthorityError(
            "'authority_certificate' names an authority that is not ours: nothing can be announced in its name."
        )


def _present(files: Files) -> list[Path]:
    found = [path for path in (files.certificate, files.broker_certificate) if path.exists()]
    if not found:
        raise AuthorityError(f"There is no certificate in {files.certificate.parent}; run `restante setup`.")
    return found


def _passphrase(file: Path | None, *, twice: bool) -> bytes:
    """From a file, or asked for: never an argument, which others see."""
    if file is not None:
        try:
            return file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise AuthorityError(f"The passphrase {file} can't be read: {error.strerror}.") from error
    given = getpass.getpass("passphrase: ")
    if twice and getpass.getpass("again: ") != given:
        raise AuthorityError("The two passphrases differ.")
    return given.encode()


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
