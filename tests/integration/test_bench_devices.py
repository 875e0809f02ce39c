"""The load generator's devices do what devices do: a measure with them says something about real ones."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import registering
from bench.devices import Devices, Fleet, Load
from bench.enrolled import Enrolled, Kept, Registrar, Unusable
from device_agent.pickup import STALE_AFTER
from tests.harness.stack import Document, RunningStack, eventually
from topology import names

COUNT = 20
WITHIN = 60.0

# What they do is the same on either database.
pytestmark = [
    pytest.mark.soak,
    pytest.mark.parametrize("killable", ["sqlite"], ids=["own-sqlite"], indirect=True),
]

_prefixes = (f"crowd{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def running(own_stack: RunningStack) -> RunningStack:
    return own_stack


@pytest.fixture
def enrolled(running: RunningStack) -> Enrolled:
    return enroll(running, COUNT)


@pytest.fixture
def fleet(enrolled: Enrolled) -> Iterator[Fleet]:
    with Fleet(enrolled, Load()) as started:
        started.wait_connected(within=WITHIN)
        yield started


def enroll(running: RunningStack, count: int, prefix: str | None = None, kept: Kept | None = None) -> Enrolled:
    settings, files = running.stack.settings, running.stack.files
    wanted = prefix or next(_prefixes)
    return asyncio.run(
        registering.enrolled_on(settings, files.authority, running.token, wanted, count, lambda _: None, kept)
    )


def send(running: RunningStack, device: str, **body: object) -> Document:
    return running.send(device, "noop", {"n": 1}, **body)  # type: ignore[arg-type]  # `wait` is not among them


def settled(running: RunningStack, sent: Document) -> Document:
    return running.settled(sent["id"], WITHIN)


def test_every_device_is_present_and_runs_its_commands_once(
    running: RunningStack, enrolled: Enrolled, fleet: Fleet
) -> None:
    sent = [send(running, own.id) for own in enrolled.devices for _ in range(3)]
    done = [settled(running, each) for each in sent]
    assert {each["state"] for each in done} == {"succeeded"}
    evidence = {(row["state"], row["evidence"]) for each in done for row in each["timeline"]}
    assert {("running", "receipt"), ("succeeded", "outcome")} <= evidence
    fleet.wait(lambda counts: counts.ran >= len(sent), "all were run", WITHIN)
    delays, confirms = fleet.latencies()
    assert (fleet.ran, len(delays)) == (len(sent), len(sent))
    assert len(confirms) >= len(sent), "an outcome whose confirm is late goes out again"
    # The events of so many connections are applied in batches.
    state = lambda own: running.ok(running.http.get(f"/v1/devices/{own.id}"))["connection"]["state"]  # noqa: E731
    eventually(lambda: all(state(own) == "connected" for own in enrolled.devices), "all are present")


def test_what_is_no_command_of_theirs_is_rejected(running: RunningStack, enrolled: Enrolled, fleet: Fleet) -> None:
    done = settled(running, running.send(enrolled.devices[0].id, "explode", {}))
    assert (done["state"], done["reason"], fleet.ran) == ("rejected", "unknown-command", 0)


@pytest.mark.parametrize("fate", ["cancelled", "expired"])
def test_a_command_that_was_withdrawn_or_came_too_late_is_not_run(
    running: RunningStack, enrolled: Enrolled, fate: str
) -> None:
    device = enrolled.devices[0].id
    withdrawn = send(running, device, claim=True, ttl=1 if fate == "expired" else 60)
    if fate == "cancelled":
        running.ok(running.http.delete(f"/v1/commands/{withdrawn['id']}"))
    assert settled(running, withdrawn)["state"] == fate
    with Fleet(enrolled, Load()) as fleet:
        fleet.wait_connected(within=WITHIN)
        assert settled(running, send(running, device))["state"] == "succeeded"
        eventually(lambda: fleet.ran > 0, "its process to say so")
        assert fleet.ran == 1
    assert running.command(withdrawn["id"])["state"] == fate


def test_mail_that_waited_is_claimed_before_it_is_run(running: RunningStack, enrolled: Enrolled) -> None:
    waiting, began = send(running, enrolled.devices[0].id, ttl=300), time.monotonic()
    eventually(lambda: time.monotonic() - began > STALE_AFTER / 1000, "it is stale")
    with Fleet(enrolled, Load()) as fleet:
        fleet.wait_connected(within=WITHIN)
        done = settled(running, waiting)
    assert done["state"] == "succeeded"
    assert [row["evidence"] for row in done["timeline"] if row["state"] == "delivered"] == ["claim"]


async def test_an_altered_key_of_the_fabric_makes_its_commands_unsigned(
    running: RunningStack, enrolled: Enrolled
) -> None:
    """They verify signatures: one who believes another key answers `rejected: unsigned`."""
    strange = {**enrolled.answer, "signing_keys": {"keys": [_public_of(enrolled)], "version": 99}}
    one = replace(enrolled, answer=strange, devices=enrolled.devices[:1])
    async with Devices(one, Load()) as devices:
        await devices.connected(1, WITHIN)
        sent = await asyncio.to_thread(send, running, one.devices[0].id)
        done = await asyncio.to_thread(settled, running, sent)
        assert (done["state"], done["reason"], devices.tally.ran) == ("rejected", "unsigned", 0)


def test_a_revoked_device_is_cut_off_and_refused(running: RunningStack, enrolled: Enrolled, fleet: Fleet) -> None:
    revoked = enrolled.devices[0].id
    running.ok(running.http.post(f"/v1/devices/{revoked}/revoke"))
    fleet.wait(lambda counts: counts.serving == COUNT - 1 and counts.refused > 0, "it is refused", WITHIN)


def test_they_come_back_by_themselves(running: RunningStack, enrolled: Enrolled, fleet: Fleet) -> None:
    fleet.cut()
    fleet.wait(lambda counts: counts.lost == COUNT, "all lost their connection", WITHIN)
    fleet.wait_connected(within=WITHIN)
    assert running.stack.broker is not None
    running.stack.broker.restart()
    running.stack.wait_until_ready()
    fleet.wait(lambda counts: counts.lost == 2 * COUNT, "all lost it again", WITHIN)
    fleet.wait_connected(within=WITHIN)
    assert settled(running, send(running, enrolled.devices[-1].id, ttl=120))["state"] == "succeeded"


async def test_telemetry_arrives_and_handlers_take_their_time(running: RunningStack, enrolled: Enrolled) -> None:
    async with Devices(enrolled, Load(telemetry=2.0, handler_delay=0.3)) as devices:
        await devices.connected(COUNT, WITHIN)
        sent = await asyncio.to_thread(send, running, enrolled.devices[0].id)
        done = await asyncio.to_thread(settled, running, sent)
        at = {row["state"]: row["at"] for row in reversed(done["timeline"])}  # the first row of each
        assert at["succeeded"] > at["running"]
        await asyncio.to_thread(
            eventually, lambda: devices.tally.readings >= 2 * COUNT, "readings are confirmed", WITHIN
        )


def test_a_journal_remembers_what_was_run(running: RunningStack, tmp_path: Path) -> None:
    enrolled = enroll(running, 1)
    load = Load(journals=tmp_path / "journals")
    (tmp_path / "journals").mkdir(mode=0o700)
    for _ in range(2):
        with Fleet(enrolled, load) as fleet:
            fleet.wait_connected(within=WITHIN)
            assert settled(running, send(running, enrolled.devices[0].id))["state"] == "succeeded"
    assert (tmp_path / "journals" / enrolled.devices[0].id / "journal.db").exists()


def test_devices_are_enrolled_over_http_where_there_is_no_other_way(running: RunningStack) -> None:
    registrar = Registrar(running.stack.settings.api_url, running.stack.files.authority, running.token)
    try:
        ids = [names.DeviceId(f"http-{next(_prefixes)}") for _ in range(2)]
        made = list(registrar.enroll_all(ids, lambda _: None))
        with pytest.raises(Unusable, match="exist"):
            registrar.enroll(ids[0])
    finally:
        registrar.close()
    with Fleet(Enrolled(made[0][0], tuple(own for _, own in made)), Load()) as fleet:
        fleet.wait_connected(within=WITHIN)


def test_devices_whose_keys_are_kept_are_the_same_the_next_time(running: RunningStack, tmp_path: Path) -> None:
    prefix = next(_prefixes)
    first = enroll(running, 3, prefix, Kept(tmp_path / "kept"))
    again = enroll(running, 5, prefix, Kept(tmp_path / "kept"))
    assert again.devices[:3] == first.devices
    with pytest.raises(Unusable, match="name-prefix"):
        enroll(running, 5, prefix)
    with Fleet(again, Load()) as fleet:
        fleet.wait_connected(within=WITHIN)


def test_the_program_says_what_it_does_and_ends_on_ctrl_c(running: RunningStack, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    program = subprocess.Popen(
        [
            sys.executable, "-m", "bench.cli", "devices", "--count", "4", "--processes", "2", "--stack",
            str(running.stack.files.stack), "--name-prefix", next(_prefixes), "--state-dir", str(tmp_path / "state"),
            "--report", str(report),
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "RESTANTE_DATABASE_URL": running.stack.settings.database},
    )  # fmt: skip
    try:
        eventually(lambda: _last(report).get("serving") == 4, "all serve", WITHIN)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=WITHIN)
    finally:
        program.kill()
    assert program.returncode == 0, said
    assert "0 commands were run" in said
    assert {"serving", "connects", "ran", "delay_ms", "confirm_ms"} <= _last(report).keys()


def test_the_program_says_why_it_can_not(running: RunningStack, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench.cli", "devices"]
    for arguments, why in (
        (["--stack", str(tmp_path / "none.json")], "describes no stack"),
        (["--api-url", "https://localhost:1"], "--token-file"),
        (["--count", "1000000", "--processes", "1"], "--processes"),
    ):
        done = subprocess.run([*argv, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert why in done.stderr


def _last(report: Path) -> Document:
    lines = report.read_text().splitlines() if report.exists() else []
    found: Document = json.loads(lines[-1]) if lines else {}
    return found


def _public_of(enrolled: Enrolled) -> dict[str, str]:
    (identity,) = replace(enrolled, devices=enrolled.devices[:1]).identities()
    return identity.key.jwk
