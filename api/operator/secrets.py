"""Secrets that live in files: made once, readable by their owner only, never on a command line or in a log."""

import base64
import hashlib
import os
import re
import secrets
from pathlib import Path

PASSWORD_BYTES = 32  # 256 bits: hashed with one round of SHA-256 by the broker, so the entropy has to be in here
_ACCOUNT = re.compile(r"[a-z0-9]+(?:\.[a-z0-9_-]+)+")


def account_password(state_dir: Path, account: str) -> str:
    """Return the password of a service account, made on the first call and kept in `<state_dir>/secrets/<account>`.

    Safe to call from several processes at once: they all get the same one.

    Raises:
        ValueError: `account` is not the name of a service account (they all have a dot).
    """
    if not _ACCOUNT.fullmatch(account):
        raise ValueError(f"not a service account: {account!r}")
    return secret(state_dir / "secrets" / account)


def secret(path: Path) -> str:
    """Return the secret in the file `path` (mode 0600), made if the file does not exist.

    URL-safe text of 256 random bits, so that it can be part of a URI.
    """
    private_directory(path.parent)
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    temporary = write_private(_sibling(path), secrets.token_urlsafe(PASSWORD_BYTES).encode())
    try:
        os.link(temporary, path)  # fails if another process was first: its secret is the one
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read(path)


def write_private(path: Path, content: bytes) -> Path:
    """Create `path` with mode 0600 and this content; FileExistsError if it is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def replace_private(path: Path, content: bytes) -> Path:
    """Put this content in `path`, mode 0600, at once and durably: a reader sees the old file or the new one."""
    temporary = write_private(_sibling(path), content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    make_lasting(path.parent)
    return path


def make_lasting(directory: Path) -> None:
    """Write through which files a directory has."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_directory(path: Path) -> Path:
    """Make the directory with mode 0700; one that is there and ours gets that mode."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def broker_password_hash(password: str, salt: bytes | None = None) -> str:
    """The password as RabbitMQ's definitions hold it: base64 of salt and SHA-256(salt, password).

    `salt` is 4 bytes (https://www.rabbitmq.com/docs/passwords#computing-password-hash); random if not given.
    """
    salt = secrets.token_bytes(4) if salt is None else salt
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode("ascii")


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _read(path: Path) -> str:
    text = path.read_text("ascii").strip()
    if not text:
        raise ValueError(f"the secret file {path} is empty")
    return text
