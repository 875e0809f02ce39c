"""A backup of the database is restored: whoever was cut off since is not let in again. The broker is away, and not
needed: what it would ask is asked in its place."""

import asyncio
import os
import secrets
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator import cli, setup
from api.operator.processes import Child
from api.operator.sockets import free_port
from api.settings import Settings
from fabric.model import Device, DeviceKey, EnrollmentCode
from fabric.sql import open_store
from tests.harness.device import es256, forge, new_key, public_jwk
from tests.harness.stack import eventually
from topology import enrollment
from topology.names import DeviceId

PUMP = DeviceId("pump-17")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    api = free_port("127.0.0.1", besides=set())
    auth = free_port("127.0.0.1", besides={api})
    made = Settings(
        state_dir=tmp_path / "state",
        api_url=f"https://localhost:{api}",
        api_port=api,
        auth_port=auth,
        amqp_port=free_port("127.0.0.1", besides={api, auth}),
    )
    files = setup.run(made, setup.LOCAL_NAMES, lambda _: None)
    return replace(made, tls_certificate=str(files.certificate))


def gateway_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    told = {
        f"RESTANTE_{field.upper()}": str(getattr(settings, field))
        for field in ("state_dir", "api_url", "api_port", "auth_port", "amqp_port", "tls_certificate")
    }
    return [sys.executable, "-m", "api.operator.cli", "gateway"], {**os.environ, **told}


@contextmanager
def gateway(settings: Settings) -> Iterator[httpx.Client]:
    """A client with the operator's token, of a gateway that runs meanwhile."""
    argv, environment = gateway_command(settings)
    log = settings.state_dir / "gateway.log"
    child = Child(argv, environment=environment, output=log, death_signal=signal.SIGTERM)
    files = setup.Files(settings.state_dir)
    operator = {"Authorization": f"Bearer {files.operator_token.read_text().strip()}"}
    context = ssl.create_default_context(cafile=files.authority)
    try:
        with httpx.Client(base_url=settings.api_url, verify=context, headers=operator, timeout=30) as http:

            def answers() -> bool:
                assert child.running, log.read_text()
                try:
                    return http.get("/health/live").is_success
                except httpx.TransportError:
                    return False

            eventually(answers, "the gateway to answer", within=60)
            yield http
    finally:
        child.kill()


async def enrolled(settings: Settings, key: ec.EllipticCurvePrivateKey) -> None:
    store = await open_store(settings.database)
    now = store.clock.now()
    code = EnrollmentCode("hash", PUMP, now + 60_000_000)
    await store.registry.create_device(Device(PUMP, "local", 1, (), {}, True, now, 1), code)
    jwk = public_jwk(key)
    await store.registry.redeem(code.code_hash, DeviceKey(PUMP, enrollment.thumbprint(jwk), jwk, now), now)
    await store.close()


def token(key: ec.EllipticCurvePrivateKey, audience: str) -> str:
    now = int(time.time())
    header = {"alg": "ES256", "typ": enrollment.DEVICE_TOKEN_TYPE, "kid": enrollment.thumbprint(public_jwk(key))}
    claims = {"iss": PUMP, "sub": PUMP, "aud": audience, "iat": now, "exp": now + 60, "jti": secrets.token_hex(8)}
    return forge(header, claims, es256(key))


@pytest.mark.timeout(480)
def test_a_restored_backup_lets_nobody_in_who_was_cut_off(settings: Settings, tmp_path: Path) -> None:
    key = new_key()
    asyncio.run(enrolled(settings, key))
    ledger, backup = settings.state_dir / "ledger.sqlite", tmp_path / "backup.sqlite"

    def broker_lets_it_in() -> bool:
        form = {"username": PUMP, "password": token(key, enrollment.mq_audience(settings.fabric, settings.cell))}
        return httpx.post(f"http://127.0.0.1:{settings.auth_port}/broker/auth/user", data=form).content == b"allow"

    def status(http: httpx.Client, bearer: str, path: str) -> int:
        return http.get(path, headers={"Authorization": f"Bearer {bearer}"}).status_code

    api = enrollment.api_audience(settings.fabric)
    keys = f"/v1/devices/{PUMP}/keys"
    with gateway(settings) as http:
        made = http.post("/v1/tokens", json={"subject": "billing", "scopes": ["devices:read"], "life": 3600}).json()
        assert broker_lets_it_in()
        assert status(http, token(key, api), keys) == status(http, made["token"], "/v1/devices") == 200
        with closing(sqlite3.connect(ledger)) as connection:
            connection.execute("VACUUM INTO ?", (str(backup),))
        assert http.post(f"/v1/devices/{PUMP}/revoke").is_success
        assert http.delete(f"/v1/tokens/{made['jti']}").is_success
    for part in settings.state_dir.glob("ledger.sqlite-*"):
        part.unlink()
    backup.replace(ledger)
    with gateway(settings) as http:
        assert not broker_lets_it_in()
        assert status(http, token(key, api), keys) == status(http, made["token"], "/v1/devices") == 401
        assert http.get(keys).json()["items"] == []

    settings.revocations.unlink()
    argv, environment = gateway_command(settings)
    refused = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "restante accept-revocation-log" in refused.stderr
    assert cli.main(["--state-dir", str(settings.state_dir), "accept-revocation-log"]) == 0
