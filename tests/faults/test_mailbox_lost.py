"""Mail that the broker lost, although it had confirmed it: compared with the ledger, and published again."""

from pathlib import Path

import pytest

from tests.harness.inside import channel
from tests.harness.stack import RunningStack, eventually, start_stack
from topology import names
from topology.names import DeviceId


@pytest.mark.timeout(240)
def test_a_shortfall_after_a_broker_restart_is_published_again(own_stack: RunningStack, home: Path) -> None:
    broker = own_stack.stack.broker
    assert broker is not None
    own_stack.http = own_stack.client(own_stack.token)
    with own_stack.agent(home) as agent:

        def shown(field: str) -> list[object]:
            return [own_stack.command(command["id"])[field] for command in sent]

        sent = [own_stack.send(agent.id, "note", {"text": str(number)}, ttl=120) for number in range(3)]
        eventually(lambda: shown("state") == ["queued"] * 3, "all to be queued")
        with channel(own_stack) as opened:
            assert opened.queue_purge(names.mailbox(DeviceId(agent.id))).method.message_count == 3
        broker.kill9()
        broker.start()
        eventually(lambda: min(shown("attempt")) > 1, "the next attempts", within=40)
        agent.start()
        for command in sent:
            assert own_stack.settled(command["id"])["state"] == "succeeded"
        assert sorted(agent.record()) == ["0", "1", "2"]


@pytest.mark.soak  # it needs a stack of its own
@pytest.mark.timeout(240)
def test_streams_that_the_broker_lost_silence_nobody(tmp_path: Path) -> None:
    """A broker that is killed just after the first start of the stack forgets its streams, and closes every
    connection that publishes to them."""
    with start_stack(tmp_path, "") as running, running.agent(tmp_path / "device") as agent:
        broker = running.stack.broker
        assert broker is not None
        broker.kill9()
        broker.start()
        running.http = running.client(running.token)
        agent.start("--system-interval", "1")
        command = running.send(agent.id, "note", {"text": "heard"}, ttl=60)
        assert running.settled(command["id"])["state"] == "succeeded"
        query = {"from": "first", "device": agent.id, "channel": "system", "limit": "1", "idle": "2"}
        eventually(lambda: bool(running.http.get("/v1/telemetry", params=query).text), "telemetry", within=30)
