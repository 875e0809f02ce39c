"""Several gateways and workers on one ledger, and deadlines that pass while none of them looks. On both databases."""

import random
import time
from pathlib import Path

import pytest

from tests.harness.another import another_gateway, another_worker
from tests.harness.inside import depth, events, management
from tests.harness.stack import Document, RunningStack, eventually
from tests.harness.truth import FRESH, seconds, settled_states
from topology import names
from topology.names import DeviceId

TTL = 2.0  # seconds
LATE = 5.0  # seconds within which a deadline is announced; how exact it is, the benchmark says


def expiries(command: Document) -> list[float]:
    return [seconds(row["at"]) for row in command["timeline"] if row["state"] == "expired"]


@pytest.mark.timeout(240)
def test_any_gateway_answers_and_exactly_one_worker_announces(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home) as agent, another_worker(own_stack), another_gateway(own_stack) as gateway:
        agent.start()
        second = gateway.http
        eventually(lambda: _consumers(own_stack, names.REPORTS) == 2, "two workers at work", within=40)
        gateways = (own_stack.http, second)
        for number in range(20):
            asked, other = gateways[number % 2], gateways[1 - number % 2]
            body = {"name": "note", "args": {"text": f"both-{number}"}}
            answer = asked.post(f"/v1/devices/{agent.id}/commands", json=body, headers={"Prefer": "wait=20"})
            assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
            found = other.get(f"/v1/commands/{answer.json()['id']}").json()
            assert (found["state"], found["outcome"]) == ("succeeded", answer.json()["outcome"])
        slow = own_stack.send(agent.id, "slow", {"text": "slow", "seconds": 1})["id"]
        assert second.get(f"/v1/commands/{slow}", headers={"Prefer": "wait=20"}).json()["state"] == "succeeded"

        absent, _ = own_stack.create_device("absent")
        sent = [own_stack.send(absent, "note", {"text": "x"}, ttl=TTL)["id"] for _ in range(40)]
        for id in sent:
            assert settled_states(own_stack.settled(id)) == ["expired"]
        eventually(lambda: len(events(own_stack, absent, "command.expired")) >= len(sent), "the events")
        assert len(events(own_stack, absent, "command.expired")) == len(sent), "each is announced once"


def _consumers(running: RunningStack, queue: str) -> int:
    found: int = management(running, "GET", f"/queues/{names.VHOST}/{queue}").json().get("consumers", 0)
    return found


@pytest.mark.timeout(240)
def test_a_worker_that_was_down_over_deadlines_reads_the_reports_first(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home) as agent:
        agent.start()
        assert own_stack.send(agent.id, "note", {"text": "warm"}, wait=20)["state"] == "succeeded"
        absent, _ = own_stack.create_device("absent")
        own_stack.stack.kill_service("worker")
        # Done before their deadline; only the worker's word is missing. Those of the absent device are not.
        reported = [
            own_stack.send(agent.id, "note", {"text": f"r{number}"}, ttl=TTL, response_timeout=TTL)["id"]
            for number in range(20)
        ]
        missed = [own_stack.send(absent, "note", {"text": "x"}, ttl=TTL)["id"] for _ in range(20)]
        last = max(seconds(own_stack.command(id)["deadline"]) for id in missed)
        eventually(lambda: len(agent.record()) == 21, "the commands to be done")
        assert depth(own_stack, names.REPORTS) >= len(reported)
        eventually(lambda: time.time() > last + TTL + 0.5, "all deadlines to pass")
        own_stack.stack.start_service("worker")
        for id in reported:
            command = own_stack.settled(id)
            assert settled_states(command) == ["succeeded"]
            assert command["late"] is False
        for id in missed:
            assert settled_states(own_stack.settled(id)) == ["expired"]


@pytest.mark.timeout(240)
def test_deadlines_are_announced_in_their_order_wherever_the_mail_stands(own_stack: RunningStack) -> None:
    absent, _ = own_stack.create_device("absent", mailbox={"limit": 250})
    dice = random.Random(3)
    longest = own_stack.send(absent, "note", {"text": "longest"}, ttl=60)["id"]
    shortest = own_stack.send(absent, "note", {"text": "shortest"}, ttl=1)["id"]
    sent = [
        own_stack.send(absent, "note", {"text": str(number)}, ttl=round(dice.uniform(0.5, 8.0), 3))["id"]
        for number in range(200)
    ]
    commands = [own_stack.settled(id) for id in [shortest, *sent]]
    for command in commands:
        (announced,) = expiries(command)
        assert 0.0 <= announced - seconds(command["deadline"]) < LATE, str(command)
        assert settled_states(command) == ["expired"]
    commands.sort(key=lambda command: command["deadline"])
    times = [expiries(command)[0] for command in commands]
    assert times == sorted(times), "in the order of their deadlines"
    assert own_stack.command(longest)["state"] == "queued"


@pytest.mark.timeout(240)
def test_a_device_that_was_away_runs_nothing_that_was_withdrawn(own_stack: RunningStack, home: Path) -> None:
    with own_stack.agent(home, mailbox={"limit": 200}) as agent:
        cancelled = [own_stack.send(agent.id, "note", {"text": f"c{number}"}, ttl=90)["id"] for number in range(50)]
        for id in cancelled:
            assert own_stack.ok(own_stack.http.delete(f"/v1/commands/{id}"))["state"] == "cancelled"
        points = [
            own_stack.send(agent.id, "note", {"text": f"s{number}"}, ttl=90, supersedes="set-point")["id"]
            for number in range(51)
        ]
        last = seconds(own_stack.command(points[-1])["accepted_at"])
        eventually(lambda: time.time() > last + FRESH, "all of it to be stale, so that it is claimed")
        agent.start()
        assert own_stack.settled(points[-1])["state"] == "succeeded"
        eventually(lambda: depth(own_stack, names.mailbox(DeviceId(agent.id))) == 0, "the mail to be taken")
        # The mailbox is read in order: what was withdrawn came before the one that ran.
        assert agent.record() == ["s50"]
        for id in cancelled + points[:-1]:
            assert settled_states(own_stack.command(id)) == ["cancelled"]
