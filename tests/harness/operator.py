"""`restante` as an operator runs it beside a running stack."""

import json
import subprocess
import sys

from tests.harness.stack import Document, RunningStack


def restante(running: RunningStack, *arguments: str) -> Document:
    """Run a command to its good end; what it says on stdout, which is JSON."""
    with begun(running, *arguments) as process:
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done: Document = json.loads(said)
    return done


def begun(running: RunningStack, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "api.operator.cli", *arguments],
        env=running.stack._environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
