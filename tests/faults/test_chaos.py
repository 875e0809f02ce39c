"""Everything is killed in turn while mixed commands flow to many devices. On both databases."""

from pathlib import Path

import pytest

from tests.harness.fleet import Fleet
from tests.harness.stack import RunningStack
from tests.harness.traffic import Traffic, await_settled
from tests.harness.truth import check_runs

COMMANDS = 2_000
DEVICES = 50
ROUNDS = 2  # in each, every part is killed once
TTL = 45.0  # seconds, of what is not sent to expire


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_everything_accepted_ends_in_one_true_state_whatever_is_killed(own_stack: RunningStack, home: Path) -> None:
    with Fleet(own_stack, home, DEVICES) as fleet:
        fleet.start()
        kills = [kill for _ in range(ROUNDS) for kill in (_kill_gateway, _kill_fleet, _kill_worker, _kill_broker)]
        traffic = Traffic(own_stack, fleet.ids, COMMANDS, ttl=TTL)
        traffic.start()
        for number, kill in enumerate(kills, start=1):
            traffic.wait_until(COMMANDS * number // (len(kills) + 1))
            kill(own_stack, fleet)
        traffic.finish()
        commands = await_settled(own_stack, fleet, list(traffic.accepted), within=TTL + 60)
        check_runs(commands, fleet.runs())
        for command in commands:
            if command["id"] in traffic.withdrawn:
                assert "cancelled" in [row["state"] for row in command["timeline"]], str(command)


def _kill_gateway(running: RunningStack, _: Fleet) -> None:
    running.stack.kill_service("gateway")
    running.stack.start_service("gateway")


def _kill_worker(running: RunningStack, _: Fleet) -> None:
    running.stack.kill_service("worker")
    running.stack.start_service("worker")


def _kill_fleet(_: RunningStack, fleet: Fleet) -> None:
    fleet.kill()
    fleet.start()


def _kill_broker(running: RunningStack, _: Fleet) -> None:
    broker = running.stack.broker
    assert broker is not None
    broker.kill9()
    broker.start()
