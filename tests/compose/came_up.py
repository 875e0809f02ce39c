"""Up from nothing: the first command, and what the engine tells of the containers."""

import json
import re
import subprocess
import time

from tests.harness.composed import DEVICE, DOMAIN, LASTING, ONCE, ROOT, Composed


def test_the_configuration_is_clean() -> None:
    done = Composed().compose("--profile", "*", "config", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")


def test_the_first_command_is_answered(stack: Composed) -> None:
    began = time.monotonic()
    command = stack.operator("command", "send", DEVICE, "door.open", "--wait", "60")
    print(f"up took {stack.took:.1f} s, the first command's outcome {time.monotonic() - began:.1f} s more")
    assert (command["state"], command["outcome"]["result"]["door"]) == ("succeeded", "open")


def test_it_came_up_without_a_restart(stack: Composed) -> None:
    stack.wait_until_healthy()
    for container in stack.containers():
        assert container["RestartCount"] == 0, container["Name"]
        if container["Config"]["Labels"]["com.docker.compose.service"] in ONCE:
            assert (container["State"]["Status"], container["State"]["ExitCode"]) == ("exited", 0)


def test_it_says_where_to_go_and_how_to_get_the_token(stack: Composed) -> None:
    said = stack.logs("welcome")
    assert f"https://api.{DOMAIN}:{stack.port}" in said
    (how,) = re.findall(r"the operator's token: +docker (compose .*)", said)
    assert stack.compose(*how.split()[1:]).stdout == stack.operators_file("operator.token")


def test_every_container_has_next_to_no_rights(stack: Composed) -> None:
    services = set()
    for container in stack.containers():
        services.add(container["Config"]["Labels"]["com.docker.compose.service"])
        host = container["HostConfig"]
        assert container["Config"]["User"] == "10001:10001"
        assert host["ReadonlyRootfs"]
        assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
        assert "no-new-privileges:true" in host["SecurityOpt"]
    assert services == LASTING | ONCE


def test_the_authoritys_key_is_in_one_container_without_a_network(stack: Composed) -> None:
    holders = [
        each for each in stack.containers() if any(mount.get("Name", "").endswith("_setup") for mount in each["Mounts"])
    ]
    assert [each["Config"]["Labels"]["com.docker.compose.service"] for each in holders] == ["setup"]
    assert list(holders[0]["NetworkSettings"]["Networks"]) == ["none"]


def test_no_secret_is_in_what_the_engine_tells_or_logs(stack: Composed) -> None:
    read = (
        "import base64, pathlib\n"
        "state = pathlib.Path('/state')\n"
        "for path in [*state.glob('secrets/**/*'), *state.rglob('*.key')]:\n"
        "    if path.is_file():\n"
        "        lines = path.read_text().split()\n"
        "        print(lines[3] if lines[0] == '-----BEGIN' else lines[0])\n"
    )
    made = stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "python3", "setup", "-c", read).stdout
    secrets = {*made.split(), stack.operators_file("operator.token").strip()}
    assert len(secrets) > 8
    told = json.dumps(stack.containers()) + stack.compose("config").stdout + stack.compose("logs", "--no-color").stdout
    assert [secret for secret in secrets if secret in told] == []


def test_the_image_is_ours_alone(stack: Composed) -> None:
    """Nothing but what runs: no package manager, no tests, no secrets."""
    inside = "import importlib.util as u; print([n for n in ('pip', 'hatchling', 'tests', 'pytest') if u.find_spec(n)])"
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "--entrypoint", "/opt/restante/bin/python3", "restante:0.1.0",
         "-c", inside],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
