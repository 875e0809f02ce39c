"""The servers' certificates: the API's and the broker's, issued by our own authority or brought along.

Each is one file with certificate, chain and private key, replaced at once: nobody reads half of a change. A running
gateway takes a new one up by itself (`Reloaded`), a running broker within seconds; connections go on.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from api.operator import authority, succession
from api.operator.authority import AuthorityError
from api.operator.secrets import private_directory, replace_private
from api.operator.succession import AuthorityFiles, Unlock
from api.settings import Settings
from fabric.worker.clocks import keep_running

LOOK_EVERY = 1.0  # seconds between looks at a certificate's file
WARN_EVERY = 86_400.0  # seconds between warnings of one that ends soon
LONGEST_DAYS = 397  # of a certificate, as browsers have it
_LEFT = 3  # one of so many parts of its life is left when a certificate is renewed

Log = Callable[[str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Brought:
    """Files with a certificate and its chain, and its private key, in PEM; they may be one."""

    certificate: Path
    key: Path


def brought(settings: Settings) -> tuple[Brought, Brought] | None:
    """The certificates of API and broker that the operator brought along; None: our own authority issues them.

    Raises:
        AuthorityError: only some of the settings are there.
    """
    if not settings.authority_certificate:
        return None
    if not settings.tls_certificate:
        raise AuthorityError(
            "'authority_certificate' says who issued the certificates, and 'tls_certificate' does not say where they"
            " are; set it, and 'broker_certificate' if the broker has another one."
        )
    api = Brought(Path(settings.tls_certificate), Path(settings.tls_key or settings.tls_certificate))
    if not settings.broker_certificate:
        return api, api
    return api, Brought(Path(settings.broker_certificate), Path(settings.broker_key or settings.broker_certificate))


def adopt(given: Brought, trusted: x509.Certificate, names: Sequence[str], path: Path, log: Log) -> None:
    """Take over a certificate that was brought along, if devices that trust this authority will accept it.

    Raises:
        AuthorityError: they won't; the text says why. Nothing was changed.
    """
    for name in names:
        _try(given, trusted, name)
    content = given.certificate.read_bytes()
    if given.key != given.certificate:
        content = content.rstrip(b"\n") + b"\n" + given.key.read_bytes()
    if not path.exists() or path.read_bytes() != content:
        private_directory(path.parent)
        replace_private(path, content)
        log(f"took over the certificate {given.certificate} for {', '.join(names)}")


def keep(
    files: AuthorityFiles, path: Path, names: Sequence[str], log: Log, *, unlock: Unlock | None = None, days: int = 0
) -> bool:
    """Have our authority issue a certificate for these names, unless there is a good one; whether it did.

    Args:
        names: none: those of the certificate that is there.
        unlock: where the authority's key is, if not in its place.
        days: that a new certificate is good for; 0: as usual, and nothing is done unless it is time.

    Raises:
        AuthorityError: it is needed now, and the authority's key is not there.
    """
    now = datetime.now(UTC)
    present = authority.load_certificate(path) if path.exists() else None
    serving = succession.serving(files)
    wanted = list(names) or authority.hosts_of(present or serving)
    usable = (
        present is not None
        and set(wanted) <= set(authority.hosts_of(present))
        and _issued_by(present, serving)
        and now < present.not_valid_after_utc
    )
    if present is not None and usable and not days and not is_due(present, now):
        return False
    try:
        signer = succession.signer(files, serving, unlock)
    except AuthorityError as error:
        if present is None or not usable or days:
            raise
        log(f"the certificate {path} ends at {_time(present.not_valid_after_utc)}, and is not renewed: {error}")
        return False
    validity = timedelta(days=days) if days else authority.SERVER_VALIDITY
    authority.save_together(authority.issue(signer, wanted, now=now, validity=validity), path)
    log(f"issued a certificate for {', '.join(wanted)}")
    return True


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether less than a third of its life is left."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now < life / _LEFT


def expiries(state_dir: Path) -> dict[str, datetime]:
    """When each certificate in the state directory ends, by its name: `api`, `broker`, and `authority` for the ones
    that devices trust. What can't be read is left out."""
    found: dict[str, datetime] = {}
    for path in (*sorted((state_dir / "certificates").glob("*.pem")), AuthorityFiles(state_dir).certificates):
        with suppress(AuthorityError):
            name = path.stem if path.parent.name == "certificates" else "authority"
            found[name] = authority.load_certificate(path).not_valid_after_utc
    return found


async def warn(state_dir: Path) -> None:
    """Log which certificates end soon; to be called once every `WARN_EVERY`."""
    now = datetime.now(UTC)
    for path in sorted((state_dir / "certificates").glob("*.pem")):
        with suppress(AuthorityError):
            certificate = authority.load_certificate(path)
            if is_due(certificate, now):
                log.warning("certificate.ends-soon name=%s at=%s", path.stem, _time(certificate.not_valid_after_utc))


class Reloaded:
    """A listener's certificate, followed while the process runs: connections that begin after a change get the new
    one, those before it go on. `look` is to be called once every `LOOK_EVERY`."""

    def __init__(self, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        self._context, self._files = context, (certificate, key)
        self._seen = self._state()

    async def look(self) -> None:
        """What can't be used is logged once, and the certificate stays what it was."""
        state = self._state()
        if state is None or state == self._seen:
            return
        try:
            # Loading what does not fit together would leave the live context with half of it.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)
            self._context.load_cert_chain(*self._files)
        except (OSError, ValueError) as error:
            if self._seen is not None:
                log.warning("certificate.refused file=%s error=%s", self._files[0], error)
            # Of two files one may just be older: looked at again.
            self._seen = None
            return
        self._seen = state
        log.info("certificate.replaced file=%s", self._files[0])

    def _state(self) -> tuple[tuple[int, int], ...] | None:
        try:
            return tuple((found.st_mtime_ns, found.st_ino) for found in (path.stat() for path in self._files))
        except OSError:
            return None


async def follow(settings: Settings, context: ssl.SSLContext | None) -> None:
    """For a gateway: take up its listener's certificate when it is replaced, and warn of those that end soon."""

    async def look() -> None:
        await warn(settings.state_dir)

    async with asyncio.TaskGroup() as group:
        group.create_task(keep_running("certificates", WARN_EVERY, look))
        if context is not None:
            certificate = Path(settings.tls_certificate)
            reloaded = Reloaded(context, certificate, Path(settings.tls_key) if settings.tls_key else certificate)
            group.create_task(keep_running("certificate", LOOK_EVERY, reloaded.look))


def _try(given: Brought, trusted: x509.Certificate, name: str) -> None:
    """A handshake in memory: what verifies it is what devices have."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        serving.load_cert_chain(given.certificate, given.key)
    except (OSError, ValueError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        raise AuthorityError(
            f"{given.certificate} and {given.key} are not a certificate and its unencrypted private key in PEM: {said}."
        ) from None
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(authority.to_der(trusted)))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server, server_hostname=name)
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise AuthorityError(
            f"Devices would refuse the certificate {given.certificate} for {name}: {error.verify_message}. It has to be"
            " issued by 'authority_certificate', with the chain between them in its file."
        ) from None
    except ssl.SSLError as error:
        raise AuthorityError(f"The certificate {given.certificate} can't be used: {error}.") from None
    if client.version() is None or client.getpeercert() is None:
        raise AuthorityError(f"The certificate {given.certificate} can't be used: the handshake does not end.")


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
