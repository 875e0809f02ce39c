"""The README's commands, run as a stranger would: in a copy of the checkout, one block after the other."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

from tests.harness.stack import eventually
from topology import access, layout

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A copy of what git tracks, with this environment's packages."""
    copy = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (copy / ".venv").symlink_to(sys.prefix)
    for stamp in (".server", ".dev"):
        (copy / ".venv" / stamp).touch()
    yield copy
    left = [found for found in psutil.process_iter(["cmdline"]) if str(copy) in " ".join(found.info["cmdline"] or ())]
    assert left == [], "nothing is left running"


def test_the_two_commands_are_those_that_ci_runs() -> None:
    assert [line.split("#")[0].strip() for line in BLOCKS[0].splitlines()] == ["make demo", "make test"]
    assert "\nmake test\nmake check\nmake soak\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.soak  # it needs a stack of its own
@pytest.mark.timeout(360)
def test_the_demo_does_what_it_says_and_leaves_nothing(checkout: Path) -> None:
    done = subprocess.run(["make", "demo"], cwd=checkout, capture_output=True, timeout=170, check=False)
    story = done.stdout.decode()
    assert done.returncode == 0, story + done.stderr.decode()
    assert "every step did what it says" in story
    assert not (checkout / ".local").exists()


@pytest.mark.soak  # it needs a stack of its own
@pytest.mark.timeout(360)
def test_the_shortest_real_example_works(checkout: Path) -> None:
    start, device, command = BLOCKS[2:5]
    assert start.strip() == "make up"
    with subprocess.Popen(["make", "up"], cwd=checkout, stderr=subprocess.PIPE, start_new_session=True) as up:
        try:
            eventually((checkout / ".local" / "stack.json").exists, "the stack to be up", within=90)
            script = f"set -e\ntrap 'kill $(jobs -p)' EXIT\n{device}\n{command}"
            done = subprocess.run(
                ["bash", "-c", script], cwd=checkout, capture_output=True, timeout=60, check=False, env=os.environ
            )
            assert done.returncode == 0, done.stderr.decode()
            assert '"state": "succeeded"' in done.stdout.decode()
        finally:
            os.killpg(up.pid, signal.SIGINT)
            assert up.wait(40) is not None
    assert (checkout / ".local").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "words",
    [
        ["restante"],
        *(["restante", *words.split()] for words in (
            "up", "setup", "migrate", "gateway", "worker", "topology show", "device create", "device list",
            "device get", "device delete", "command send", "command get", "token create", "token list", "token revoke",
        )),
        ["restante-agent"],
        *(["restante-agent", word] for word in ("enroll", "run", "publish", "status")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What the installed program calls, called here: an interpreter for each takes most of a second."""
    (program,) = entry_points(group="console_scripts", name=words[0])
    with pytest.raises(SystemExit) as ended:
        program.load()([*words[1:], "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("program", ["restante", "restante-agent"])
def test_the_installed_programs_explain_themselves(program: str) -> None:
    done = subprocess.run([Path(sys.prefix) / "bin" / program, "--help"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage:")


def test_the_topology_is_shown_as_it_is_declared() -> None:
    program = Path(sys.prefix) / "bin" / "restante"
    done = subprocess.run([program, "topology", "show", "--json"], capture_output=True, timeout=30, check=True)
    shown = json.loads(done.stdout)
    assert {queue["name"] for queue in shown["queues"]} == {*(queue.name for queue in layout.QUEUES), "mailbox.DEVICE"}
    assert {account["name"] for account in shown["accounts"]} == {account.name for account in access.ACCOUNTS}
    plain = subprocess.run([program, "topology", "show"], capture_output=True, timeout=30, check=True).stdout.decode()
    assert all(exchange.name in plain for exchange in layout.EXCHANGES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"RESTANTE_API_PROT": "1"}, "there is no setting 'api_prot'"),
        ({"RESTANTE_API_PORT": "many"}, "'api_port' is a whole number"),
        ({"RESTANTE_API_URL": "ftp://x"}, "'api_url' starts with https:// or http://"),
        ({"RESTANTE_CONFIG": "/nowhere.toml"}, "can't be read"),
        ({"RESTANTE_DATABASE_URL": "mysql://x"}, "sqlite:///path or postgresql://"),
    ],
)
def test_a_bad_setting_is_one_clear_line_and_no_start(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "restante", "--state-dir", tmp_path / "state", "migrate"],
        env={**os.environ, **settings},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in (1, 2)
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]
