"""`restante device import`, and the commands that take rights away, against a real gateway."""

import csv
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from api.operator import importing
from api.operator.client import CallFailed, Connection
from api.operator.importing import Entry, read
from tests.harness.device import Device
from tests.harness.stack import RunningStack

MANY = 230


def connection(stack: RunningStack) -> Connection:
    return Connection(stack.stack.settings.api_url, stack.stack.files.authority, stack.token)


def tickets(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["id"]: row["ticket"] for row in csv.DictReader(file)}


def quiet(_: str) -> None: ...


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("name\na\n", "names the columns"),
        ("id\nA\n", "line 2"),
        ("id,groups\na,x..y\n", "line 2"),
        ("id,labels\na,x\n", "line 2"),
        ("id\na\na\n", "line 3"),
        ("id\na,b\n", "line 2"),
        ('{"id": "a"}\n{"id": 5}', "line 2"),
        ('{"id": "a"}\n["a"]', "line 2"),
        ('{"id": "a", "groups": "abc"}', "line 1"),
        ('{"id": "a", "labels": {"x": 1}}', "line 1"),
        ('{"id": "a", "limit": 1}', "line 1"),
        ('{"id": "a"', "line 1"),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_is_made(tmp_path: Path, text: str, wrong: str) -> None:
    source = tmp_path / "devices"
    source.write_text(text)
    with pytest.raises(CallFailed, match=wrong):
        read(source)


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    source = tmp_path / "devices"
    source.write_text("id,groups,labels\na,garage yard.north,floor=2 door=left=right\nb,,\n")
    rows = read(source)
    assert rows == [
        Entry(2, "a", ("garage", "yard.north"), {"floor": "2", "door": "left=right"}),
        Entry(3, "b", (), {}),
    ]
    lines = [json.dumps({"id": e.id, "groups": e.groups, "labels": e.labels}) for e in rows]
    source.write_text("\n\n".join(lines))
    assert [(e.id, e.groups, e.labels) for e in read(source)] == [(e.id, e.groups, e.labels) for e in rows]


def test_an_import_is_complete_and_can_be_resumed(stack: RunningStack, tmp_path: Path) -> None:
    source, kept = tmp_path / "devices", tmp_path / "tickets"
    taken = Device.enrolled(stack, "imported")
    unfinished, _ = stack.create_device("imported")
    ids = [f"{unfinished}-{n}" for n in range(MANY)]
    source.write_text("".join(json.dumps({"id": id, "groups": ["imported"]}) + "\n" for id in ids))
    done = importing.run(connection(stack), source, kept, quiet, resume=False)
    assert (done.made, done.again, done.skipped, done.refused) == (MANY, 0, 0, 0)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    first = tickets(kept)
    assert set(first) == set(ids)
    assert stack.ok(stack.http.get(f"/v1/devices/{ids[-1]}"))["groups"] == ["imported"]
    with pytest.raises(CallFailed, match="exists"):
        importing.run(connection(stack), source, kept, quiet, resume=False)

    # As a crash leaves it: devices without a ticket in the file, and a torn line. And one that lives already.
    whole = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(whole[:-5]) + whole[-5][:20])
    source.write_text(source.read_text() + "".join(json.dumps({"id": id}) + "\n" for id in (unfinished, taken.id)))
    said: list[str] = []
    done = importing.run(connection(stack), source, kept, said.append, resume=True)
    assert (done.made, done.again, done.skipped, done.refused) == (0, 6, MANY - 5 + 1, 0)
    assert f"{taken.id}: it is enrolled" in said
    second = tickets(kept)
    assert set(second) == {*ids, unfinished}
    assert sum(first[id] != second[id] for id in ids) == 5
    assert importing.run(connection(stack), source, kept, quiet, resume=True).skipped == MANY + 2

    kept.chmod(0o644)
    with pytest.raises(CallFailed, match="chmod 600"):
        importing.run(connection(stack), source, kept, quiet, resume=True)


def test_a_device_that_is_refused_does_not_stop_the_others(stack: RunningStack, tmp_path: Path) -> None:
    source, said = tmp_path / "devices", list[str]()
    good, bad = (f"{stack.create_device('imported')[0]}-{n}" for n in range(2))
    source.write_text(json.dumps({"id": bad, "labels": {"x": "y" * 1000}}) + "\n" + json.dumps({"id": good}))
    done = importing.run(connection(stack), source, tmp_path / "tickets", said.append, resume=False)
    assert (done.made, done.refused) == (1, 1)
    assert any(line.startswith(f"{bad}: line 1") for line in said)
    assert set(tickets(tmp_path / "tickets")) == {good}


def test_a_token_that_does_not_hold_stops_it(stack: RunningStack, tmp_path: Path) -> None:
    source = tmp_path / "devices"
    source.write_text('{"id": "never-made"}')
    wrong = Connection(stack.stack.settings.api_url, stack.stack.files.authority, "not-a-token")
    with pytest.raises(CallFailed, match="--resume"):
        importing.run(wrong, source, tmp_path / "tickets", quiet, resume=False)


def test_the_commands_that_take_rights_away(stack: RunningStack, tmp_path: Path) -> None:
    def restante(*arguments: str) -> str:
        state = str(stack.stack.files.state_dir)
        argv = [sys.executable, "-m", "api.operator.cli", "--state-dir", state, "device", *arguments]
        environment = {
            **os.environ,
            "RESTANTE_API_URL": stack.stack.settings.api_url,
            "RESTANTE_TOKEN_FILE": str(stack.stack.files.operator_token),
            "SSL_CERT_FILE": str(stack.stack.files.authority),
        }
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    device = Device.enrolled(stack, "operated")
    assert json.loads(restante("keys", device.id))["kid"] == device.kid
    assert json.loads(restante("suspend", device.id))["enabled"] is False
    assert not device.may_log_in(device.token())
    assert json.loads(restante("resume", device.id))["enabled"] is True
    assert device.may_log_in(device.token())
    told = json.loads(restante("revoke-key", device.id, device.kid))
    assert told.keys() == {"closed_connections", "pending_until", "withdrawn", "in_hand"}
    assert not device.may_log_in(device.token())
    restante("enroll", device.id, "--ticket-file", str(tmp_path / "ticket"))
    assert stat.S_IMODE((tmp_path / "ticket").stat().st_mode) == 0o600
    assert json.loads(restante("revoke", device.id)).keys() == told.keys()
