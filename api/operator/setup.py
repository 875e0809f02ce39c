"""`restante setup`: everything a stack needs before it starts, made once and kept.

Idempotent: what is there and usable stays; only a certificate that lacks a name, was not issued by the present
authority or has less than a third of its life left is issued again.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jwt

from api.operator import certificates, rings, succession
from api.operator.rings import Purpose, RingFiles
from api.operator.secrets import account_password, private_directory, replace_private, secret
from api.operator.succession import AuthorityFiles
from api.settings import Settings
from fabric.identity import scopes
from fabric.identity.issued import LONGEST_LIFE, IssuedTokens
from fabric.sql import Store, migrate, open_store
from topology import access, enrollment

OPERATOR = "operator"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Files:
    """Where things are in the state directory."""

    state_dir: Path

    @property
    def authority(self) -> Path:
        """What callers verify with."""
        return self.authorities.certificates

    @property
    def authority_key(self) -> Path:
        return self.authorities.keys

    @property
    def authorities(self) -> AuthorityFiles:
        return AuthorityFiles(self.state_dir)

    @property
    def certificate(self) -> Path:
        """The API's, with its private key."""
        return self.state_dir / "certificates" / "api.pem"

    @property
    def broker_certificate(self) -> Path:
        """The broker's, with its private key."""
        return self.state_dir / "certificates" / "broker.pem"

    @property
    def token_keys(self) -> RingFiles:
        return RingFiles(self.state_dir, Purpose.TOKENS)

    @property
    def command_keys(self) -> RingFiles:
        return RingFiles(self.state_dir, Purpose.COMMANDS)

    @property
    def cursor_secret(self) -> Path:
        return self.state_dir / "secrets" / "cursors"

    @property
    def operator_token(self) -> Path:
        return self.state_dir / "operator.token"

    @property
    def stack(self) -> Path:
        return self.state_dir / "stack.json"


def run(settings: Settings, names: Sequence[str], log: Callable[[str], None]) -> Files:
    """Make what is missing: authority, certificate, keys, passwords, database, operator token.

    Args:
        names: DNS names and addresses by which devices and callers reach this stack.

    Raises:
        authority.AuthorityError, fabric.errors.FabricError: one sentence that says what is wrong.
    """
    files = make_files(settings, names, log)
    make_certificates(settings, names, names, log)
    make_ledger(settings, log)
    return files


def make_files(settings: Settings, names: Sequence[str], log: Callable[[str], None]) -> Files:
    """Make the authority for these names, unless another one is configured, the signing keys and the passwords that
    are missing."""
    files = Files(settings.state_dir)
    private_directory(settings.state_dir)
    if settings.authority_certificate:
        succession.adopt(files.authorities, Path(settings.authority_certificate))
    else:
        succession.prepare(files.authorities, list(names), log)
    for keys in (files.token_keys, files.command_keys):
        rings.prepare(keys, log)
    secret(files.cursor_secret)
    for account in access.ACCOUNTS:
        account_password(settings.state_dir, account.name)
    return files


def make_certificates(
    settings: Settings, api: Sequence[str], broker: Sequence[str], log: Callable[[str], None]
) -> None:
    """See that there are good certificates for these names of the API and of the broker: issued now, if it is time, or
    taken over from where the settings say.

    Raises:
        AuthorityError: one sentence that says what is wrong with one.
    """
    files = Files(settings.state_dir)
    wanted = (files.certificate, api), (files.broker_certificate, broker)
    if (given := certificates.brought(settings)) is not None:
        trusted = succession.serving(files.authorities)
        for (path, names), each in zip(wanted, given, strict=True):
            certificates.adopt(each, trusted, names, path, log)
    else:
        for path, names in wanted:
            certificates.keep(files.authorities, path, names, log)


def make_ledger(settings: Settings, log: Callable[[str], None]) -> None:
    """Bring the database's tables up to date, and make the operator's token if it is missing."""
    migrate(settings.database)
    asyncio.run(_operator_token(settings, log))


async def renew_operator_token(store: Store, settings: Settings, log: Callable[[str], None]) -> None:
    """Make the operator's token, unless there is one that was signed by a key whose signatures count."""
    files = Files(settings.state_dir)
    keys = rings.open_keys(files.token_keys, store.clock.now)
    if files.operator_token.exists() and keys.public(_kid(files.operator_token)) is not None:
        return
    tokens = IssuedTokens(
        store.registry,
        store.clock,
        enrollment.issuer(settings.fabric),
        enrollment.api_audience(settings.fabric),
        keys,
    )
    token, _ = await tokens.mint(OPERATOR, tuple(sorted(scopes.ACTIONS)), LONGEST_LIFE)
    replace_private(files.operator_token, token.encode())
    log(f"made the operator's token: {files.operator_token}")


def _kid(path: Path) -> str:
    try:
        return str(jwt.get_unverified_header(path.read_text().strip()).get("kid"))
    except jwt.PyJWTError:
        return ""


async def _operator_token(settings: Settings, log: Callable[[str], None]) -> None:
    """A token with every scope, for whoever may read the state directory."""
    store = await open_store(settings.database)
    try:
        await renew_operator_token(store, settings, log)
    finally:
        await store.close()
