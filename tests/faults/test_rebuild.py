"""`restante rebuild` where nothing was lost, and outcomes while a broker is being made again. On both databases."""

from pathlib import Path

import pytest

from tests.harness.inside import channel
from tests.harness.operator import restante
from tests.harness.stack import RunningStack, eventually
from topology import names


@pytest.mark.timeout(240)
def test_an_outcome_that_no_queue_takes_is_kept(own_stack: RunningStack, home: Path) -> None:
    """A broker that is being made again confirms what it can't route."""
    with own_stack.agent(home) as agent:
        agent.start()
        sent = own_stack.send(agent.id, "slow", {"text": "kept", "seconds": 1}, ttl=90, response_timeout=90)["id"]
        eventually(lambda: own_stack.command(sent)["state"] == "running", "running")
        with channel(own_stack) as opened:
            opened.queue_unbind(names.REPORTS, names.UPLINK, "outcome.*")
            eventually(lambda: b"link.returned" in agent.log.read_bytes(), "the outcome to come back")
            assert agent.journal()["reported"] == 0
            opened.queue_bind(names.REPORTS, names.UPLINK, "outcome.*")
        assert own_stack.settled(sent)["state"] == "succeeded"
        assert agent.record() == ["kept"]


@pytest.mark.timeout(240)
def test_a_rebuild_that_was_not_needed_does_no_harm(own_stack: RunningStack, tmp_path: Path) -> None:
    with own_stack.agent(tmp_path / "here") as here, own_stack.agent(tmp_path / "away") as away:
        here.start()
        assert own_stack.send(here.id, "note", {"text": "before"}, wait=20)["state"] == "succeeded"
        waiting = [own_stack.send(away.id, "note", {"text": str(number)}, ttl=90)["id"] for number in range(5)]
        eventually(lambda: own_stack.command(waiting[-1])["state"] == "queued", "queued")
        first = restante(own_stack, "rebuild")
        assert first["republished"] == len(waiting)
        assert first["closed"] >= 1
        assert own_stack.send(here.id, "note", {"text": "after"}, wait=20)["state"] == "succeeded"
        second = restante(own_stack, "rebuild")
        assert (second["republished"], second["mailboxes"]) == (first["republished"], first["mailboxes"])
        assert second["incarnation"] != first["incarnation"]
        away.start()
        for id in waiting:
            command = own_stack.settled(id)
            assert (command["state"], command["attempt"]) == ("succeeded", 3)
        assert away.record() == [str(number) for number in range(len(waiting))]
        assert here.record() == ["before", "after"]
