"""A real agent whose wall clock is hours off and jumps while it runs: only the fabric's clock decides."""

import os
from pathlib import Path

import pytest

from tests.harness.inside import close_connections
from tests.harness.stack import AgentProcess, RunningStack

HOUR = 3600.0
YEAR = 8766 * HOUR

# Python imports it at its start, before anything else.
SHIFTED = """
import os
import time
from pathlib import Path

_offset = Path(os.environ["WALL_OFFSET"])
_time, _time_ns = time.time, time.time_ns


def shift() -> float:
    return float(_offset.read_text())


time.time = lambda: _time() + shift()
time.time_ns = lambda: _time_ns() + int(shift() * 1e9)
"""


class Wall:
    """The wall clock of one agent process; `set` makes it jump to so many seconds off."""

    def __init__(self, agent: AgentProcess, directory: Path) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(SHIFTED)
        self._offset = directory / "offset"
        self.set(0)
        path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
        agent.environment |= {"PYTHONPATH": path, "WALL_OFFSET": str(self._offset)}

    def set(self, offset: float) -> None:
        new = self._offset.with_suffix(".new")
        new.write_text(str(offset))
        new.replace(self._offset)


@pytest.mark.timeout(240)
def test_a_jumping_wall_clock_changes_nothing(stack: RunningStack, home: Path, tmp_path: Path) -> None:
    with stack.agent(home) as agent:
        wall = Wall(agent, tmp_path / "wall")
        agent.start()
        assert stack.send(agent.id, "note", {"text": "warm"}, wait=20)["state"] == "succeeded"
        expected = ["warm"]
        for offset in (5 * HOUR, -5 * HOUR, YEAR, -YEAR):
            wall.set(offset)
            for claim in (False, True):
                text = f"in time, {offset}, {claim}"
                command = stack.send(agent.id, "note", {"text": text}, ttl=20, claim=claim, wait=20)
                assert command["state"] == "succeeded", str(command)
                expected.append(text)

            # Its deadline passes while it waits, in the agent's hands, for the one slot.
            busy = stack.send(agent.id, "slow", {"text": f"busy, {offset}", "seconds": 2})["id"]
            late = stack.send(agent.id, "note", {"text": f"late, {offset}"}, ttl=1)["id"]
            assert stack.settled(late)["state"] == "expired"
            assert stack.settled(busy)["state"] == "succeeded"
            expected.append(f"busy, {offset}")

            # A new connection needs a token of the right time.
            close_connections(stack, agent.id)
            again = stack.send(agent.id, "note", {"text": f"again, {offset}"}, wait=40)
            assert again["state"] == "succeeded", str(again)
            expected.append(f"again, {offset}")
        assert agent.record() == expected, "and none past its deadline"


@pytest.mark.timeout(240)
def test_an_agent_that_starts_with_its_clock_behind_knows_the_time_it_last_heard(
    stack: RunningStack, home: Path, tmp_path: Path
) -> None:
    with stack.agent(home) as agent:
        wall = Wall(agent, tmp_path / "wall")
        agent.start()
        assert stack.send(agent.id, "note", {"text": "warm"}, wait=20)["state"] == "succeeded"
        assert agent.stop() == 0
        late = stack.send(agent.id, "note", {"text": "late"}, ttl=1)["id"]
        assert stack.settled(late)["state"] == "expired"
        wall.set(-5 * HOUR)
        agent.start()
        assert stack.send(agent.id, "note", {"text": "after"}, wait=40)["state"] == "succeeded"
        assert agent.record() == ["warm", "after"]
