"""One name, two who answer to it: a cloned agent, and a device that was deleted and made again. On both databases."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.harness.inside import close_connections, depth, events, publish_copy
from tests.harness.stack import AgentProcess, RunningStack, eventually
from tests.harness.truth import check_truth
from topology import names
from topology.names import DeviceId

COMMANDS = 30
SWITCHES = 4


def clone(agent: AgentProcess, home: Path) -> AgentProcess:
    """Another agent with a copy of everything that this one, which does not run, keeps."""
    copy = AgentProcess(agent.running, home, agent.id)
    shutil.copytree(agent.state, copy.state, ignore=shutil.ignore_patterns("*.sock"))
    return copy


@pytest.mark.timeout(240)
def test_a_clone_runs_nothing_a_second_time_and_is_reported(own_stack: RunningStack, tmp_path: Path) -> None:
    with own_stack.agent(tmp_path / "one") as one:
        one.start()
        assert own_stack.send(one.id, "note", {"text": "before"}, wait=20)["state"] == "succeeded"
        one.stop()
        with clone(one, tmp_path / "two") as two:
            agents = {one.start(): two, two.start(): one}
            # Claimed ones while the mailbox goes from one to the other and back.
            sent: dict[str, str] = {}
            for number in range(COMMANDS):
                if number % (COMMANDS // SWITCHES) == COMMANDS // SWITCHES - 1:
                    close_connections(own_stack, one.id)
                text = f"switch-{number}"
                sent[_claimed(own_stack, one.id, text)] = text
            # Where a grant was cut off, it is one agent's, and the mail the other's: nobody runs it, which is doubt.
            settled = [own_stack.settled(id) for id in sent]
            assert {command["state"] for command in settled} <= {"succeeded", "unanswered"}
            assert "succeeded" in {command["state"] for command in settled}

            # The one that has the mailbox runs a command, and can't see that its copy comes.
            slow = own_stack.send(one.id, "slow", {"text": "held", "seconds": 2}, response_timeout=60, ttl=90)["id"]
            eventually(lambda: own_stack.command(slow)["state"] == "running", "running")
            holder = one if "held" in one.record() else two
            other = agents[holder]
            holder.signal(signal.SIGSTOP)
            for _ in range(2):
                publish_copy(own_stack, slow)
            close_connections(own_stack, one.id)
            eventually(lambda: bool(conflicts(own_stack, one.id)), "the conflict", within=40)
            eventually(lambda: depth(own_stack, names.mailbox(DeviceId(one.id))) == 0, "the copies to be taken")
            holder.signal(signal.SIGCONT)
            assert own_stack.settled(slow)["state"] == "succeeded"
            assert other.stop() == 0
            ran = Counter(one.record() + two.record())
            check_truth(settled, {id: ran[text] for id, text in sent.items()})
            assert ran["held"] == 1
            assert len(conflicts(own_stack, one.id)) == 1, "once for the pair, not for each message"


def _claimed(running: RunningStack, device: str, text: str) -> str:
    command = running.send(device, "note", {"text": text}, claim=True, ttl=90, response_timeout=5)
    id: str = command["id"]
    return id


def conflicts(running: RunningStack, device: str) -> list[object]:
    return events(running, device, "device.identity-conflict")


@pytest.mark.timeout(240)
def test_nothing_of_a_deleted_device_reaches_the_next_of_its_name(own_stack: RunningStack, tmp_path: Path) -> None:
    with own_stack.agent(tmp_path / "old") as old:
        old.start()
        assert own_stack.send(old.id, "note", {"text": "mine"}, wait=20)["state"] == "succeeded"
        old.kill()
        waiting = [own_stack.send(old.id, "note", {"text": f"old-{number}"}, ttl=90) for number in range(5)]
        eventually(lambda: own_stack.command(waiting[-1]["id"])["state"] == "queued", "queued")
        own_stack.ok(own_stack.http.delete(f"/v1/devices/{old.id}"))
        for command in waiting:
            found = own_stack.command(command["id"])
            assert (found["state"], found["reason"]) == ("undeliverable", "device-deleted")

        made = own_stack.ok(own_stack.http.post("/v1/devices", json={"id": old.id}))
        with AgentProcess(own_stack, tmp_path / "new", old.id) as new:
            new.enroll(made["enrollment"]["ticket"])
            for command in waiting[:2]:
                publish_copy(own_stack, command["id"])  # as one that was still on its way when the device was deleted
            new.start()
            old.start()  # it has a key that nobody knows any more
            fresh = own_stack.send(new.id, "note", {"text": "new"}, wait=40)
            assert (fresh["state"], fresh["seq"]) == ("succeeded", 1)
            assert depth(own_stack, names.mailbox(DeviceId(new.id))) == 0
            assert new.record() == ["new"]
            assert old.record() == ["mine"]
            for command in waiting:
                found = own_stack.command(command["id"])
                assert (found["state"], found["late"]) == ("undeliverable", False), "its new namesake has no say"
