"""What `restante compose files` hands out: to each service what it needs, and to none what it must not have."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from api.operator import authority, composed
from api.settings import Settings
from topology import access


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        api_url="https://api.example.org:8443",
        amqps_url="amqps://mq.example.org:8443/devices",
    )


@pytest.fixture
def volumes(settings: Settings, tmp_path: Path) -> Path:
    composed.files(settings, tmp_path / "volumes", lambda _: None)
    return tmp_path / "volumes"


def contents(where: Path) -> dict[str, bytes]:
    return {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}


def having(volumes: Path, secret: bytes) -> set[str]:
    """The volumes in which this can be read."""
    return {name.split("/")[0] for name, content in contents(volumes).items() if secret.strip() in content}


def test_the_authoritys_key_is_handed_to_nobody(settings: Settings, volumes: Path) -> None:
    key = (settings.state_dir / "authority" / "ca.key").read_bytes()
    assert having(volumes, key.splitlines()[1]) == set()


@pytest.mark.parametrize(
    ("secret", "holders"),
    [
        (f"secrets/{access.ADMIN}", {"worker"}),
        (f"secrets/{access.WORKER}", {"worker"}),
        (f"secrets/{access.GATEWAY}", {"gateway"}),
        (f"secrets/{access.BACKEND}", set()),
        ("secrets/database", {"database"}),
        ("certificates/api.pem", {"edge"}),
        ("certificates/broker.pem", {"broker"}),
    ],
)
def test_a_secret_is_where_it_is_needed_only(settings: Settings, volumes: Path, secret: str, holders: set[str]) -> None:
    content = (settings.state_dir / secret).read_bytes()
    lines = content[max(content.find(b"-----BEGIN PRIVATE KEY"), 0) :].splitlines()
    assert having(volumes, lines[1] if len(lines) > 1 else lines[0]) == holders


def test_everything_is_its_owners_only(volumes: Path) -> None:
    for path in volumes.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_each_certificate_is_for_one_name(volumes: Path) -> None:
    for place, name in (("edge/api.pem", "api.example.org"), ("broker/tls/server.pem", "mq.example.org")):
        certificate = x509.load_pem_x509_certificates((volumes / place).read_bytes())[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [name]


def test_devices_reach_the_amqps_port_only(volumes: Path) -> None:
    options = dict(
        line.split(" = ", 1) for line in (volumes / "broker/etc/conf.d/20-local.conf").read_text().splitlines()
    )
    assert options["listeners.ssl.devices"] == "$(EDGE):5671"
    for inside in ("listeners.tcp.fabric", "management.tcp.ip", "prometheus.tcp.ip"):
        assert options[inside].split(":")[0] == "$(BACKPLANE)"


def test_again_changes_nothing_but_salts(settings: Settings, volumes: Path) -> None:
    before = contents(volumes)
    composed.files(settings, volumes, lambda _: None)
    after = contents(volumes)
    salted = "broker/etc/definitions.json"
    assert {name for name in after if after[name] != before.get(name)} <= {salted}
    assert {user["name"] for user in json.loads(after[salted])["users"]} == {
        account.name for account in access.ACCOUNTS
    }


def test_another_domain_is_refused_since_devices_trust_this_one(settings: Settings, volumes: Path) -> None:
    moved = replace(settings, api_url="https://api.other.org:8443")
    with pytest.raises(authority.AuthorityError, match=r"vouches for api\.example\.org.* and not for api\.other\.org"):
        composed.files(moved, volumes, lambda _: None)
