"""An agent whose machine has a wrong clock, against the real gateway and broker (SECURITY.md, rule 9)."""

import threading
from pathlib import Path

import pytest

from device_agent import errors, identity
from device_agent.clock import FabricClock, wall_ms
from device_agent.link import Link, Mail
from device_agent.timekeeping import Times
from tests.harness.stack import RunningStack, eventually
from topology import wire

DAY = 24 * 3_600_000  # ms
IN_1970 = 12 * 3_600_000
IN_2099 = 4_084_000_000_000


class Ear:
    """Hears when the link is up."""

    def __init__(self) -> None:
        self.up = threading.Event()

    def link_up(self) -> None:
        self.up.set()

    def link_down(self) -> None: ...
    def answer(self, message: wire.Message) -> None: ...
    def mail(self, mail: Mail) -> None: ...


@pytest.mark.parametrize("off", ["1970", "an hour ahead", "2099"])
def test_a_wrong_clock(stack: RunningStack, home: Path, off: str) -> None:
    """Behind is put right before anything is sent. Ahead is put right as long as certificates are good by that clock,
    too; beyond, an old key of the service could not be told from its present one."""
    state = stack.agent(home).state
    wall = {"1970": lambda: IN_1970, "an hour ahead": lambda: wall_ms() + DAY // 24, "2099": lambda: IN_2099}[off]
    ear, times = Ear(), Times(FabricClock(), 0, wall)
    link = Link(identity.load(state), lambda: identity.load(state), lambda _: None, times, ear)
    link.start()
    try:
        if off == "2099":
            eventually(lambda: isinstance(link.last_error, errors.CertificateExpired), "refused")
            eventually(lambda: abs(times.now() - wall_ms()) < 5_000, "told the time")
            assert times.floor() == IN_2099
            assert not ear.up.is_set()
        else:
            assert ear.up.wait(20)
            assert abs(times.now() - wall_ms()) < 5_000
    finally:
        link.call(link.stop)
        assert link.join(10)
