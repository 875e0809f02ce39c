"""`restante setup`: everything a stack needs before it starts, made once and kept.

Idempotent: what is there and usable stays; only a certificate that lacks a name or is about to expire is
issued again.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import DNSName, IPAddress, SubjectAlternativeName

from api.operator import authority
from api.operator.secrets import account_password, private_directory, replace_private, write_private
from api.settings import Settings
from fabric.identity import scopes
from fabric.identity.issued import LONGEST_LIFE, IssuedTokens
from fabric.signing import SigningKey, signing_key
from fabric.sql import migrate, open_store
from topology import access, enrollment

OPERATOR = "operator"
_RENEW_BEFORE = timedelta(days=30)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Files:
    """Where things are in the state directory."""

    state_dir: Path

    @property
    def authority(self) -> Path:
        return self.state_dir / "authority" / "ca.pem"

    @property
    def authority_key(self) -> Path:
        return self.state_dir / "authority" / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.state_dir / "certificates" / "server.pem"

    @property
    def key(self) -> Path:
        return self.state_dir / "certificates" / "server.key"

    @property
    def token_key(self) -> Path:
        return self.state_dir / "secrets" / "tokens.pem"

    @property
    def command_key(self) -> Path:
        return self.state_dir / "secrets" / "commands.pem"

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
    files = Files(settings.state_dir)
    private_directory(settings.state_dir)
    _certificates(files, names, log)
    for path in (files.token_key, files.command_key):
        if not path.exists():
            private_directory(path.parent)
            write_private(path, _new_key())
            log(f"made the signing key {path.name}")
    for account in access.ACCOUNTS:
        account_password(settings.state_dir, account.name)
    migrate(settings.database)
    if not files.operator_token.exists():
        replace_private(files.operator_token, asyncio.run(_operator_token(settings, files)).encode())
        log(f"made the operator's token: {files.operator_token}")
    return files


def load_signing_key(path: Path) -> SigningKey:
    """A signing key that `run` made. Raises `AuthorityError`, saying to run `restante setup`."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise authority.AuthorityError(
            f"The signing key {path} can't be read ({error}); run `restante setup`."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise authority.AuthorityError(f"{path} is not a P-256 key.")
    return signing_key(key)


def _certificates(files: Files, names: Sequence[str], log: Callable[[str], None]) -> None:
    now = datetime.now(UTC)
    if not files.authority.exists():
        made = authority.make_authority("Restante authority", names, now=now)
        authority.save(made, files.authority, files.authority_key)
        log("made an authority of our own")
    if _is_good(files.certificate, names, now):
        return
    signer = authority.load(files.authority, files.authority_key)
    authority.save(authority.issue(signer, names, now=now), files.certificate, files.key)
    log(f"issued a certificate for {', '.join(names)}")


def _is_good(path: Path, names: Sequence[str], now: datetime) -> bool:
    if not path.exists():
        return False
    certificate = authority.load_certificate(path)
    alternatives = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    held = {*alternatives.get_values_for_type(DNSName), *map(str, alternatives.get_values_for_type(IPAddress))}
    return set(names) <= held and certificate.not_valid_after_utc - now > _RENEW_BEFORE


def _new_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


async def _operator_token(settings: Settings, files: Files) -> str:
    """A token with every scope, for whoever may read the state directory."""
    store = await open_store(settings.database)
    try:
        tokens = IssuedTokens(
            store.registry,
            store.clock,
            enrollment.issuer(settings.fabric),
            enrollment.api_audience(settings.fabric),
            load_signing_key(files.token_key),
        )
        token, _ = await tokens.mint(OPERATOR, tuple(sorted(scopes.ACTIONS)), LONGEST_LIFE)
        return token
    finally:
        await store.close()
