"""The one stack of `make compose-test`: its files are run in the order of the Makefile, and each goes on where the one
before it left off.

Not part of `make test`: it takes a container engine, and minutes.
"""

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.composed import Caller, Composed


@pytest.fixture(scope="session")
def stack() -> Iterator[Composed]:
    """Up from nothing, and gone afterwards."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.fail("compose-test needs a container engine, and `docker info` finds none")
    composed = Composed()
    composed.down(volumes=True)
    composed.compose("build", within=900)
    try:
        composed.up()
        yield composed
    finally:
        composed.down(volumes=True)


@pytest.fixture(scope="session")
def caller(stack: Composed) -> Caller:
    return stack.client()
