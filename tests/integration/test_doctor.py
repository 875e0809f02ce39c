"""`restante doctor`: a stack that is well, and what is broken named."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from api.operator import authority, cli, doctor
from api.operator.findings import Finding, Level
from api.operator.setup import Files
from api.settings import Settings
from fabric.sql import migrate
from tests.harness import leaks
from tests.harness.inside import management
from tests.harness.stack import RunningStack, eventually
from tests.integration.sql.values import execute
from topology import access, names


def found(settings: Settings, *checks: str) -> dict[str, Finding]:
    """What these checks find."""
    told: list[Finding] = []
    doctor.run(settings, told.append, set(doctor.CHECKS) - set(checks))
    return {finding.check: finding for finding in told}


def failing(settings: Settings, check: str) -> str:
    finding = found(settings, check)[check]
    assert finding.level is Level.FAIL, finding
    return finding.text


def nowhere() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A state directory with a new database, and nothing that runs."""
    made = Settings(state_dir=tmp_path / "state")
    made.state_dir.mkdir(mode=0o700)
    migrate(made.database)
    return made


@pytest.mark.timeout(180)
def test_a_stack_that_is_well(stack: RunningStack, capsys: pytest.CaptureFixture[str]) -> None:
    eventually(lambda: not found(stack.stack.settings, "worker")["worker"].level, "a worker at work")
    arguments = ["--state-dir", str(stack.stack.files.state_dir), "doctor", "--json"]
    status = cli.main(arguments)
    said = capsys.readouterr().out
    findings = [json.loads(line) for line in said.splitlines()]
    assert [finding["check"] for finding in findings] == list(doctor.CHECKS)
    # Closures may be open, for a moment, of whatever the tests before have done.
    bad = [each for each in findings if each["level"] != "ok" and each["check"] not in ("closures", "disk")]
    assert not bad
    assert status in (0, 1)
    assert leaks.found_in(said.encode(), leaks.kept_in(stack.stack.files.state_dir)) == []


@pytest.mark.timeout(180)
def test_what_is_broken_at_the_broker_is_named(stack: RunningStack) -> None:
    settings = stack.stack.settings
    policy, rights = f"/policies/{names.VHOST}/mailbox", f"/permissions/{names.VHOST}/{access.BACKEND}"
    with put(stack, policy, {"pattern": "^mailbox", "apply-to": "queues", "definition": {"max-length": 1}}):
        assert "policy mailbox: missing or different" in failing(settings, "topology")
    with put(stack, rights, {"configure": "", "write": ".*", "read": ".*"}):
        assert f"{access.BACKEND} has other rights" in failing(settings, "accounts")
    management(stack, "PUT", "/vhosts/another")
    try:
        assert "it has the vhosts another, devices" in failing(settings, "doors")
    finally:
        management(stack, "DELETE", "/vhosts/another")
    assert {each.level for each in found(settings, "topology", "accounts").values()} == {Level.OK}


def test_what_is_broken_here_is_named(stack: RunningStack, settings: Settings, tmp_path: Path) -> None:
    well = stack.stack.settings
    files, theirs = Files(settings.state_dir), Files(well.state_dir)
    assert {each.level for each in found(settings, "settings", "files", "database", "events").values()} == {Level.OK}

    (settings.state_dir / "operator.token").touch(0o644)
    assert "operator.token" in failing(settings, "files")
    empty = replace(settings, database_url=f"sqlite:///{tmp_path / 'empty.db'}")
    assert "Run `restante migrate`" in failing(empty, "database")
    execute(
        settings.database,
        "INSERT INTO events (kind, device, version, at, document) VALUES ('k', 'd', 1, 1000000, '{}')",
        "INSERT INTO closures (device, why) VALUES ('pump-17', 'revoked')",
        f"INSERT INTO meta (name, value) VALUES ('revocation-log', '{'0' * 32} 100')",
    )
    assert "is a worker running?" in failing(settings, "events")
    assert found(settings, "closures")["closures"].level is Level.WARN
    assert "accept-revocation-log" in failing(settings, "revocation-log")

    assert "ConnectError" in failing(replace(well, management_url=f"http://127.0.0.1:{nowhere()}"), "broker")
    assert "run this where a worker runs" in failing(settings, "broker")
    nothing = replace(settings, state_dir=tmp_path / "nothing")
    assert list(found(nothing, "settings", "files")) == ["settings"]
    other = authority.make_authority("another", ["localhost"], now=datetime.now(UTC))
    authority.save(other, files.authority, files.authority_key)
    assert "certificate verify failed" in failing(replace(settings, api_url=well.api_url), "gateway")
    soon = datetime.now(UTC) - authority.SERVER_VALIDITY + timedelta(days=3)
    (settings.state_dir / "certificates").mkdir()
    authority.save_together(
        authority.issue(other, ["localhost"], now=soon), settings.state_dir / "certificates" / "api.pem"
    )
    (certificates,) = found(settings, "certificates").values()
    assert (certificates.level, "restante certs renew" in certificates.text) == (Level.WARN, True)
    assert theirs.authority.read_bytes() != files.authority.read_bytes()
    with answering(b"allow") as port:
        assert "must say deny" in failing(replace(settings, auth_port=port), "auth")


def test_names_of_others_are_escaped() -> None:
    assert Finding("doors", Level.FAIL, "users \x1b[2J\n").line() == "FAIL  doors            users \\x1b[2J\\n"


@contextmanager
def put(stack: RunningStack, path: str, body: dict[str, object]) -> Iterator[None]:
    """Something else there, until what was there is put back."""
    before = management(stack, "GET", path).json()
    management(stack, "PUT", path, body)
    try:
        yield
    finally:
        management(stack, "PUT", path, {key: before[key] for key in body})


@contextmanager
def answering(content: bytes) -> Iterator[int]:
    """The port of a server that answers everything with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
