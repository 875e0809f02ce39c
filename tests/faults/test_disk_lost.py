"""The broker's disk lost, or a backup restored: what devices and ledger know comes together. On both databases."""

from pathlib import Path

import pika
import pytest

from tests.harness.fleet import Fleet
from tests.harness.inside import depth
from tests.harness.operator import begun, restante
from tests.harness.stack import RunningStack, eventually
from tests.harness.traffic import Traffic, await_settled
from tests.harness.truth import check_runs, settled_states
from topology import names
from topology.names import DeviceId

COMMANDS = 600
DEVICES = 30
BUSY = 5  # devices whose handlers are at work when the worker ends
TTL = 45.0  # seconds, of what is not sent to expire

pytestmark = pytest.mark.soak


@pytest.mark.timeout(240)
def test_an_outcome_that_the_broker_took_along_comes_again(own_stack: RunningStack, home: Path) -> None:
    stack, broker = own_stack.stack, own_stack.stack.broker
    assert broker is not None
    with own_stack.agent(home) as agent:
        agent.start()
        done = {"text": "done", "seconds": 2}
        slow = own_stack.send(agent.id, "slow", done, ttl=90, response_timeout=90)["id"]
        eventually(lambda: own_stack.command(slow)["state"] == "running", "running")
        stack.kill_service("worker")
        # The broker has confirmed it, and the agent has noted that: it would never send it again by itself.
        eventually(lambda: agent.journal()["reported"] == 1, "the outcome to be reported")
        broker.kill9()
        broker.wipe()
        broker.start()
        stack.start_service("worker")
        restante(own_stack, "rebuild")
        command = own_stack.settled(slow)
        assert (settled_states(command), command["attempt"]) == (["succeeded"], 1)
        assert agent.record() == ["done"]


@pytest.mark.timeout(480)
def test_a_broker_that_lost_its_disk_is_rebuilt_from_the_ledger(own_stack: RunningStack, home: Path) -> None:
    stack, broker = own_stack.stack, own_stack.stack.broker
    assert broker is not None
    with Fleet(own_stack, home, DEVICES + BUSY) as fleet:
        fleet.start()
        traffic = Traffic(own_stack, fleet.ids[:DEVICES], COMMANDS, ttl=TTL)
        traffic.start()
        traffic.wait_until(COMMANDS // 4)
        order = {"text": "at work", "seconds": 6}
        at_work = {own_stack.send(id, "slow", order, response_timeout=90)["id"] for id in fleet.ids[DEVICES:]}
        eventually(lambda: all(own_stack.command(id)["state"] == "running" for id in at_work), "all are at work")
        stack.kill_service("worker")
        eventually(lambda: at_work <= {run.command for run in fleet.runs() if run.ended}, "runs that no worker read of")
        eventually(lambda: depth(own_stack, names.REPORTS) >= BUSY, "reports to lose")
        broker.kill9()
        lost = [
            run.command
            for run in fleet.runs()
            if run.ended
            and run.command in at_work | traffic.accepted.keys()
            and not own_stack.command(run.command)["settled_at"]
        ]
        assert at_work <= set(lost), "outcomes that were in the lost queue"
        broker.wipe()
        fleet.kill()
        fleet.start()
        broker.start()
        stack.start_service("worker")
        # The first one is interrupted, wherever it is; the second finishes the work.
        with begun(own_stack, "rebuild") as interrupted:
            eventually(lambda: _exists(own_stack, names.mailbox(DeviceId(fleet.ids[0]))), "the first mailbox")
            interrupted.kill()
        rebuilt = restante(own_stack, "rebuild")
        assert rebuilt["mailboxes"] >= DEVICES + BUSY
        for id in fleet.ids:
            assert _exists(own_stack, names.mailbox(DeviceId(id)))
        traffic.finish()
        commands = await_settled(own_stack, fleet, [*traffic.accepted, *at_work], TTL + 60, rebuilt["incarnation"])
        check_runs(commands, fleet.runs())
        found = {command["id"]: command for command in commands}
        assert {found[id]["state"] for id in lost} == {"succeeded"}, "the outcomes came again"


@pytest.mark.timeout(360)
def test_a_restored_backup_runs_nothing_twice(own_stack: RunningStack, home: Path) -> None:
    """What was done since comes from the devices again; what they were never told is sent; the rest is forgotten."""
    stack, file = own_stack.stack, str(home.with_name("backup.tar"))
    with own_stack.agent(home) as agent:
        agent.start()
        assert own_stack.send(agent.id, "note", {"text": "before"}, wait=20)["state"] == "succeeded"
        agent.stop()
        waiting = [own_stack.send(agent.id, "note", {"text": f"w{number}"}, ttl=120)["id"] for number in range(3)]
        withdrawn = own_stack.send(agent.id, "note", {"text": "withdrawn"}, ttl=120, claim=True)["id"]
        eventually(lambda: own_stack.command(withdrawn)["state"] == "queued", "queued")
        made = restante(own_stack, "backup", file)

        own_stack.ok(own_stack.http.delete(f"/v1/commands/{withdrawn}"))
        agent.start()
        forgotten = own_stack.send(agent.id, "note", {"text": "forgotten"}, wait=40)
        assert forgotten["state"] == "succeeded"
        assert [own_stack.settled(id)["state"] for id in waiting] == ["succeeded"] * 3
        stranger, _ = own_stack.create_device()
        with begun(own_stack, "restore", file, "--replace") as refused:
            assert b"Stop all gateways and workers" in refused.communicate(timeout=60)[1]
        for service in ("gateway", "worker"):
            stack.stop_service(service)
        assert restante(own_stack, "restore", file, "--replace")["rows"] == made["rows"]
        for service in ("worker", "gateway"):
            stack.start_service(service)
        stack.wait_until_ready()
        own_stack.http = own_stack.client(own_stack.token)

        assert restante(own_stack, "rebuild")["republished"] >= 1
        assert [own_stack.settled(id)["state"] for id in waiting] == ["succeeded"] * 3
        for gone in (f"/v1/commands/{forgotten['id']}", f"/v1/devices/{stranger}"):
            assert own_stack.http.get(gone).status_code == 404
        again = own_stack.send(agent.id, "note", {"text": "again"}, wait=40)
        assert (again["state"], again["seq"]) == ("succeeded", forgotten["seq"]), "numbers that the device has seen"
        # The withdrawal is forgotten, and yet it does not run: the device had asked, and was refused.
        assert agent.record() == ["before", "w0", "w1", "w2", "forgotten", "again"]


def _exists(running: RunningStack, queue: str) -> bool:
    try:
        depth(running, queue)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    return True
