"""Secrets in files: private, made once, and as the broker expects them."""

import base64
import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.operator import secrets


def test_an_account_keeps_its_password(tmp_path: Path) -> None:
    first = secrets.account_password(tmp_path, "fabric.worker")
    assert secrets.account_password(tmp_path, "fabric.worker") == first
    assert secrets.account_password(tmp_path, "fabric.gateway") != first
    assert len(first) >= 43  # 256 bits


def test_files_and_their_directory_are_private(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    secrets.account_password(tmp_path, "fabric.worker")
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "secrets" / "fabric.worker").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["fabric.worker"]


def test_all_who_ask_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: secrets.secret(tmp_path / "one"), range(64)))
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "account", ["", "pump-17", "../fabric.worker", "fabric.", ".fabric", "fabric.worker\n", "a/b.c"]
)
def test_what_is_no_service_account_has_no_password(account: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a service account"):
        secrets.account_password(tmp_path, account)
    assert not list(tmp_path.rglob("*"))


def test_an_empty_secret_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        secrets.secret(tmp_path / "one")


def test_a_private_file_is_replaced_at_once_and_never_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("other")
    link.symlink_to(target)
    secrets.replace_private(link, b"new")
    assert target.read_text() == "other"
    assert link.read_bytes() == b"new"
    with pytest.raises(FileExistsError):
        secrets.write_private(link, b"again")


def test_the_hash_is_rabbitmq_s() -> None:
    # The worked example of https://www.rabbitmq.com/docs/passwords#computing-password-hash
    assert secrets.broker_password_hash("test12", bytes.fromhex("908DC60A")) == (
        "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    )
    hashed = base64.b64decode(secrets.broker_password_hash("test12"))
    assert hashed[4:] == hashlib.sha256(hashed[:4] + b"test12").digest()
