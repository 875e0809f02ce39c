"""`restante-agent rotate-key` against a real gateway and broker."""

import stat
import threading
from pathlib import Path

import pytest

from device_agent import errors, identity, rotation
from tests.harness.stack import AgentProcess, RunningStack, eventually


def keys(stack: RunningStack, device: str) -> dict[str, str | None]:
    """Active keys with their parents, the oldest first."""
    listed = stack.ok(stack.http.get(f"/v1/devices/{device}/keys"))["items"]
    return {key["kid"]: key["parent"] for key in listed}


def present(agent: AgentProcess) -> str:
    return identity.load_key(agent.state).kid


def used(stack: RunningStack, device: str, kid: str) -> bool:
    listed = stack.ok(stack.http.get(f"/v1/devices/{device}/keys"))["items"]
    return any(key["kid"] == kid and key["last_used"] for key in listed)


def test_a_running_agent_goes_on_with_the_new_key(stack: RunningStack, home: Path) -> None:
    with stack.agent(home) as agent:
        agent.start()
        assert stack.send(agent.id, "note", {"text": "before"}, wait=20)["state"] == "succeeded"
        old = present(agent)
        done = agent.cli("rotate-key")
        assert done.returncode == 0, done.stderr.decode()
        new = present(agent)
        assert keys(stack, agent.id) == {old: None, new: old}
        assert stat.S_IMODE((agent.state / identity.KEY_FILE).stat().st_mode) == 0o600
        assert not (agent.state / identity.NEXT_KEY_FILE).exists()
        assert stack.send(agent.id, "note", {"text": "overlap"}, wait=20)["state"] == "succeeded"

        done = agent.cli("rotate-key", "--drop-old")
        assert done.returncode == 0, done.stderr.decode()
        last = present(agent)
        assert keys(stack, agent.id) == {last: new}
        assert stack.send(agent.id, "note", {"text": "after"}, wait=30)["state"] == "succeeded"
        eventually(lambda: used(stack, agent.id, last), "the new key is used")
        assert agent.record() == ["before", "overlap", "after"]
        assert last in agent.cli("status").stdout.decode()


@pytest.mark.parametrize("where", ["before it is registered", "before it is switched to", "before the old one goes"])
def test_a_rotation_that_was_cut_short_goes_on(
    stack: RunningStack, home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    agent = stack.agent(home)
    old = present(agent)

    class Killed(BaseException): ...

    def kill(*_: object) -> None:
        raise Killed

    target, name = {
        "before it is registered": (rotation._Service, "register"),
        "before it is switched to": (identity, "switch_keys"),
        "before the old one goes": (rotation._Service, "drop_others"),
    }[where]
    with monkeypatch.context() as patched:
        patched.setattr(target, name, kill)
        with pytest.raises(Killed):
            rotation.rotate(agent.state, drop_old=True)
    # Whatever was reached, the key in its place is one that the service knows.
    assert present(agent) in keys(stack, agent.id)
    interrupted = agent.state / identity.NEXT_KEY_FILE
    begun = identity.load_key(agent.state, identity.NEXT_KEY_FILE).kid if interrupted.exists() else None
    done = rotation.rotate(agent.state, drop_old=True)
    assert begun in (None, done.kid), "it did not go on with the key that it had begun with"
    assert old in done.dropped
    assert list(keys(stack, agent.id)) == [present(agent)] == [done.kid]


def test_rotations_at_once_are_one(stack: RunningStack, home: Path) -> None:
    agent = stack.agent(home)
    outcomes: list[object] = []

    def rotate() -> None:
        try:
            outcomes.append(rotation.rotate(agent.state))
        except errors.AlreadyRunning as error:
            outcomes.append(error)

    threads = [threading.Thread(target=rotate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [outcome for outcome in outcomes if isinstance(outcome, rotation.Rotated)]
    assert done
    assert present(agent) in [each.kid for each in done]
    assert len(keys(stack, agent.id)) == 1 + len(done)


def test_a_refused_rotation_leaves_the_key(stack: RunningStack, home: Path) -> None:
    agent = stack.agent(home)
    for _ in range(2):
        rotation.rotate(agent.state)
    kept = present(agent)
    with pytest.raises(errors.RotationRefused, match="3 active keys"):
        rotation.rotate(agent.state)
    assert present(agent) == kept
    done = rotation.rotate(agent.state, drop_old=True)
    assert (len(done.dropped), kept in done.dropped, list(keys(stack, agent.id))) == (3, True, [done.kid])
    kept = present(agent)
    stack.ok(stack.http.post(f"/v1/devices/{agent.id}/revoke"))
    with pytest.raises(errors.LoginRefused):
        rotation.rotate(agent.state)
    assert present(agent) == kept
    # Enrolled anew with the key that it has, it goes on with the one that it had begun with.
    agent.enroll(stack.ok(stack.http.post(f"/v1/devices/{agent.id}/enrollment"))["ticket"])
    begun = identity.load_key(agent.state, identity.NEXT_KEY_FILE).kid
    assert rotation.rotate(agent.state).kid == begun
    assert keys(stack, agent.id) == {kept: None, begun: kept}
