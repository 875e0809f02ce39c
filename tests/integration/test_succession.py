"""Certificates are renewed and the authority is replaced under a running stack, and no device is enrolled again."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api.operator import certs, cli
from device_agent import identity
from tests.harness.stack import AgentProcess, RunningStack, eventually, start_stack
from topology.access import ADMIN

# On a stack of its own: whoever trusts the authority before this alone can't talk to it any more.


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with start_stack(tmp_path_factory.mktemp("changed"), "") as running:
        yield running


def restante(stack: RunningStack, *arguments: str) -> None:
    assert cli.main(["--state-dir", str(stack.stack.files.state_dir), "certs", *arguments]) == 0


def served(stack: RunningStack) -> tuple[bytes, bytes]:
    """What the gateway and the broker show to who connects now."""
    settings = stack.stack.settings
    api, mq = (_shown(url, stack.stack.files.authority) for url in (settings.api_url, settings.amqps_url))
    return api, mq


def _shown(url: str, trusted: Path) -> bytes:
    parts = urlsplit(url)
    assert parts.hostname is not None
    context = ssl.create_default_context(cafile=trusted)
    with (
        socket.create_connection((parts.hostname, parts.port or 443), 10) as link,
        context.wrap_socket(link, server_hostname=parts.hostname) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def replaced(stack: RunningStack, before: tuple[bytes, bytes]) -> None:
    """Wait until both show another certificate: the broker looks at its file every 5 s."""
    eventually(lambda: all(new != old for new, old in zip(served(stack), before, strict=True)), "shown", within=60)


def connections(agent: AgentProcess) -> int:
    return agent.log.read_text().count("link.up")


def drop(stack: RunningStack, agent: AgentProcess) -> None:
    """Close the agent's connection: it says hello on the next one, instead of once a minute."""
    broker = stack.stack.broker
    assert broker is not None
    url = f"{stack.stack.settings.management_url}/api/connections/username/{agent.id}"
    httpx.delete(url, auth=(ADMIN, broker.password(ADMIN)), timeout=10).raise_for_status()


def learns(stack: RunningStack, agent: AgentProcess) -> None:
    """Have it say hello until it knows of the successor."""
    last = [-1]

    def learnt() -> bool:
        seen = connections(agent)
        if seen > last[0]:
            last[0] = seen
            drop(stack, agent)
        return len(identity.load(agent.state).pins.pins) == 2

    eventually(learnt, "the agent to learn of the successor", within=60)


def works(stack: RunningStack, agent: AgentProcess, text: str) -> None:
    sent = stack.send(agent.id, "note", {"text": text}, wait=60)
    assert sent["state"] == "succeeded", sent


def test_renewed_and_succeeded_without_a_new_enrollment(changed: RunningStack, tmp_path: Path) -> None:
    stack = changed
    with stack.agent(tmp_path / "there") as there, stack.agent(tmp_path / "away") as away:
        there.start()
        works(stack, there, "before")

        before, up = served(stack), connections(there)
        stream = stack.client(stack.token)
        stack.ok(stream.get("/v1/devices"))
        restante(stack, "renew", "--force")
        replaced(stack, before)
        works(stack, there, "renewed")
        stack.ok(stream.get("/v1/devices"))
        assert connections(there) == up, "its connection went on"

        id, early = stack.create_device("early")
        restante(stack, "ca", "rotate")

        # The worker reads the news within a second; whoever asks it before gets none.
        eventually(lambda: stack.ok(stack.http.get("/v1/authority/successors"))["announcements"], "the news")
        learns(stack, there)
        before = served(stack)
        restante(stack, "ca", "switch")
        replaced(stack, before)
        stack.context = ssl.create_default_context(cafile=stack.stack.files.authority)
        stack.http = stack.client(stack.token)
        drop(stack, there)
        works(stack, there, "succeeded")

        assert len(identity.load(away.state).pins.pins) == 1, "the control: it has heard of nothing"
        away.start()
        works(stack, away, "was away")
        assert len(identity.load(away.state).pins.pins) == 2

        # A ticket of before the switch is as good after it; and so is one of now.
        late = AgentProcess(stack, tmp_path / "early", id)
        late.enroll(early)
        with late, stack.agent(tmp_path / "new") as new:
            for agent, pins in ((late, 2), (new, 1)):
                agent.start()
                works(stack, agent, "enrolled")
                assert len(identity.load(agent.state).pins.pins) == pins
                assert "authorities.refused" not in agent.log.read_text()
    assert [each["state"] for each in certs.listing(stack.stack.settings) if "authority" in each] == [
        "retired",
        "serving",
    ]
