"""What docs/operations.md and docs/recovery.md have an operator type, typed; then down, and up again."""

import contextlib
import json
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from cryptography.x509 import load_der_x509_certificate

from tests.harness.composed import DEVICE, DOMAIN, ROOT, Caller, Composed, Load
from tests.harness.stack import eventually

PAGE = "operations.md"
DOCTOR = "docker compose exec -e RESTANTE_AUTH_HOST=auth.backplane worker restante doctor --skip gateway"
ASK = """
import sys, urllib.request
print(urllib.request.urlopen("http://prometheus:9090/api/v1/" + sys.argv[1], timeout=10).read().decode())
"""


def prometheus(stack: Composed, path: str) -> Any:
    """What its API says, asked from the backplane."""
    return json.loads(stack.run_in("worker", "python3", "-c", ASK, path))["data"]


def state_of(stack: Composed, alert: str) -> str:
    rules = [rule for group in prometheus(stack, "rules")["groups"] for rule in group["rules"]]
    (state,) = (rule["state"] for rule in rules if rule["name"] == alert)
    return str(state)


def test_prometheus_scrapes_the_broker_and_each_gateway_and_worker(stack: Composed) -> None:
    wanted = {("broker", "up"): 1, ("gateway", "up"): 3, ("worker", "up"): 2}
    seen: Counter[tuple[str, str]] = Counter()

    def all_are_up() -> bool:
        seen.clear()
        seen.update((each["scrapePool"], each["health"]) for each in prometheus(stack, "targets")["activeTargets"])
        return seen == wanted

    eventually(all_are_up, f"{wanted} to be scraped, and not {seen}", within=60)
    found = stack.recipe(
        PAGE, "docker compose exec prometheus promtool query instant http://localhost:9090 'rabbitmq_connections'"
    )
    assert 'job="broker"' in found


def test_each_alert_is_loaded_and_none_has_a_fault(stack: Composed) -> None:
    rules = {rule["name"]: rule for group in prometheus(stack, "rules")["groups"] for rule in group["rules"]}
    explained = re.findall(r"(?m)^### (\w+)$", (ROOT / "docs" / PAGE).read_text())
    assert sorted(rules) == sorted(explained), "each has a runbook, and each runbook its alert"
    assert {rule["health"] for rule in rules.values()} <= {"ok", "unknown"}  # unknown: not evaluated yet
    assert [rule["lastError"] for rule in rules.values() if rule.get("lastError")] == []


def test_an_alert_fires_and_the_doctor_says_why_until_the_cause_is_gone(stack: Composed, caller: Caller) -> None:
    alert, limit = "BrokerBlocksPublishers", ("rabbitmq", "rabbitmqctl", "-q", "set_vm_memory_high_watermark")
    assert state_of(stack, alert) == "inactive"
    stack.run_in(*limit, "0")
    try:
        waiting = caller.send("door.state", key="while-blocked", ttl=600).json()
        assert "FAIL  broker " in (said := stack.recipe(PAGE, DOCTOR, status=2))
        assert "it blocks all publishers (memory)" in said
        eventually(lambda: state_of(stack, alert) == "firing", f"{alert} to fire", within=120)
        assert f'alertname="{alert}"' in stack.recipe(
            PAGE, "docker compose exec prometheus promtool query instant http://localhost:9090 'ALERTS'"
        )
        assert caller.request("GET", f"/v1/commands/{waiting['id']}").json()["settled_at"] is None
    finally:
        stack.run_in(*limit, "0.4")
    assert caller.settled(waiting["id"])["state"] == "succeeded"
    eventually(lambda: state_of(stack, alert) == "inactive", f"{alert} to be over", within=60)
    # It warns while events wait that could not be published meanwhile.
    eventually(lambda: stack.compose(*DOCTOR.split()[2:], check=False).returncode == 0, "all to be well", within=90)


def test_the_runbooks_list_of_queues_has_ours(stack: Composed) -> None:
    listed = stack.recipe(PAGE, "docker compose exec rabbitmq rabbitmqctl list_queues -p devices name messages memory")
    assert {"reports", "events", f"mailbox.{DEVICE}"} <= {line.split("\t")[0] for line in listed.splitlines()}


def test_certificates_are_renewed_and_no_connection_ends(stack: Composed, caller: Caller) -> None:
    before = {name: serial(stack, name) for name in ("api", "mq")}
    since = caller.request("GET", f"/v1/devices/{DEVICE}").json()["connection"]
    with held(stack) as alive:
        alive()
        stack.recipe(PAGE, "docker compose run --rm setup certs renew --force")
        alive()
        stack.recipe(PAGE, "docker compose run --rm setup")
        for name, old in before.items():
            eventually(partial(is_another, stack, name, old), f"another certificate for {name}.{DOMAIN}", within=30)
        alive()
    assert caller.request("GET", f"/v1/devices/{DEVICE}").json()["connection"] == since


@contextlib.contextmanager
def held(stack: Composed) -> Iterator[Callable[[], None]]:
    """Asks over one connection to the API each time that it is called, and never over another."""
    link = socket.create_connection(("127.0.0.1", stack.port), 10)
    with stack.context().wrap_socket(link, server_hostname=f"api.{DOMAIN}") as tls:
        http = HTTPConnection(f"api.{DOMAIN}", stack.port)
        http.sock, http.auto_open = tls, 0

        def alive() -> None:
            http.request("GET", "/health/live")
            answer = http.getresponse()
            assert (answer.status, answer.read() != b"") == (200, True)

        yield alive


def is_another(stack: Composed, name: str, old: int) -> bool:
    return serial(stack, name) != old


def serial(stack: Composed, name: str) -> int:
    """Of the certificate that a new connection is shown."""
    with (
        socket.create_connection(("127.0.0.1", stack.port), 10) as link,
        stack.context().wrap_socket(link, server_hostname=f"{name}.{DOMAIN}") as tls,
    ):
        return load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number


def test_a_backup_is_made_and_restored(stack: Composed, caller: Caller, tmp_path: Path) -> None:
    (backups := tmp_path / "backups").mkdir()
    backups.chmod(0o777)  # the page has it made for user 10001, by root
    here, run = {"$PWD/backups": str(backups)}, 'docker compose run --rm --no-deps -v "$PWD/backups:/backups" migrate'
    command = caller.settled(caller.accepted("before-the-backup"))
    assert caller.request("POST", "/v1/devices", json={"id": "pump-1"}).is_success
    with Load(caller) as load:  # it is made while everything runs
        load.wait_for(3)
        stack.recipe(PAGE, f"{run} backup /backups/ledger.tar", places=here)
        load.wait_for(3)
    assert caller.request("DELETE", "/v1/devices/pump-1").is_success
    assert caller.request("POST", "/v1/devices", json={"id": "pump-2"}).is_success

    restore = f"{run} restore /backups/ledger.tar --replace"
    stack.recipe(PAGE, restore, places=here, status=1)  # not while they run
    assert caller.request("GET", "/v1/devices/pump-2").is_success
    stack.recipe(PAGE, "docker compose stop gateway worker")
    stack.recipe(PAGE, restore, places=here)
    stack.recipe(PAGE, "docker compose start gateway worker")
    rebuilt = json.loads(stack.recipe(PAGE, "docker compose run --rm --no-deps worker rebuild"))
    assert rebuilt["mailboxes"] == 1
    assert caller.request("GET", f"/v1/commands/{command['id']}").json() == command
    for gone in ("pump-1", "pump-2"):  # deleted since, which the revocation log knows; made since, which nobody does
        assert caller.request("GET", f"/v1/devices/{gone}").status_code == 404, gone
    assert caller.settled(caller.accepted("after-the-restoration"))["state"] == "succeeded"


def test_down_and_up_lose_nothing(stack: Composed, caller: Caller) -> None:
    assert max(stack.records("api")) > 1100
    before = caller.settled(caller.accepted("before-down"))
    token = stack.operators_file("operator.token")
    stack.compose("stop", "device")
    waiting = caller.send("door.close", args={"speed": 2}, ttl=900).json()
    stack.down(volumes=False)
    assert stack.containers() == []
    stack.scale, stack.environment["FABRIC_TLS_RECORD"] = {}, "1024"
    stack.up()
    assert 1000 < max(stack.records("api")) < 1100, "for callers with little memory"
    assert stack.operators_file("operator.token") == token
    assert caller.request("GET", f"/v1/commands/{before['id']}").json() == before
    assert caller.settled(waiting["id"])["outcome"]["result"]["door"] == "closed"
    assert len(caller.request("GET", f"/v1/devices/{DEVICE}/keys").json()["items"]) == 1, "it enrolled once"


def test_down_with_its_volumes_leaves_nothing(stack: Composed) -> None:
    stack.down(volumes=True)
    for kind in ("volume", "network"):
        listed = subprocess.run(
            ["docker", kind, "ls", "-q", "--filter", "label=com.docker.compose.project=restante-test"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        assert listed.stdout == "", kind
