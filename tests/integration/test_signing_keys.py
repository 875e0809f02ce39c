"""The signing keys are rotated while everything runs, and nobody notices."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from api.operator import cli, keys
from device_agent import identity
from tests.harness.stack import AgentProcess, RunningStack, eventually

LATER = 1.0  # seconds that everything goes on after the new keys sign


def restante(stack: RunningStack, *arguments: str) -> int:
    return cli.main(["--state-dir", str(stack.stack.files.state_dir), "keys", *arguments])


def kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def _trusted(agent: AgentProcess) -> dict[str, object]:
    return identity.load(agent.state).peering.signing_keys.document()


def listed(stack: RunningStack, capsys: pytest.CaptureFixture[str], purpose: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert restante(stack, "list") == 0
    return [key for key in map(json.loads, capsys.readouterr().out.splitlines()) if key["purpose"] == purpose]


def test_a_rotation_fails_no_request_and_no_command(
    stack: RunningStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lead = str(keys.SHORTEST_LEAD)
    with stack.agent(tmp_path / "there") as there, stack.agent(tmp_path / "away") as away:
        there.start()
        assert stack.send(there.id, "note", {"text": "before"}, wait=60)["state"] == "succeeded"
        waiting = stack.send(away.id, "note", {"text": "signed before"}, ttl=600)
        minting = {"subject": "rotated", "scopes": ["devices:read"]}
        old = stack.ok(stack.http.post("/v1/tokens", json=minting))["token"]
        knows = identity.load(there.state).peering.signing_keys
        assert restante(stack, "rotate", "--lead", lead) == 0
        assert [key["state"] for key in listed(stack, capsys, "commands")][-2:] == ["current", "next"]

        begun = None
        with stack.client(old) as before:
            while begun is None or time.monotonic() < begun + LATER:
                stack.ok(before.get(f"/v1/devices/{there.id}"))
                new = stack.ok(stack.http.post("/v1/tokens", json=minting))["token"]
                stack.ok(before.get(f"/v1/devices/{there.id}", headers={"Authorization": f"Bearer {new}"}))
                sent = stack.send(there.id, "note", {"text": "during"}, wait=60)
                assert sent["state"] == "succeeded", sent
                learnt = identity.load(there.state).peering.signing_keys
                if begun is None and kid(new) != kid(old) and learnt.version > knows.version:
                    begun = time.monotonic()
            published = stack.ok(stack.http.get("/.well-known/jwks.json"))["keys"]
            assert {kid(old), kid(new)} <= {key["kid"] for key in published}
            stack.ok(before.get(f"/v1/devices/{there.id}"))
        for purpose in ("tokens", "commands"):
            assert [key["state"] for key in listed(stack, capsys, purpose)][-2:] == ["retired", "current"]
        assert stack.send(there.id, "note", {"text": "after"}, wait=60)["state"] == "succeeded"
        away.start()
        assert stack.send(away.id, "note", {"text": "signed after"}, wait=60)["state"] == "succeeded"
        assert stack.settled(waiting["id"])["state"] == "succeeded"
        assert away.record() == ["signed before", "signed after"]
        with stack.agent(tmp_path / "late") as late:
            assert _trusted(late) == _trusted(away) == _trusted(there)


def test_rotating_twice_is_rotating_once(stack: RunningStack, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert restante(stack, "rotate", "--tokens", "--lead", str(keys.SHORTEST_LEAD)) == 0
    assert [key["state"] for key in listed(stack, capsys, "tokens")].count("next") == 1
    eventually(lambda: listed(stack, capsys, "tokens")[-1]["state"] == "current", "the next key to sign")


@pytest.mark.parametrize(
    "given", [("rotate", "--lead", "1"), ("rotate", "--retire-after", "-1"), ("retire", "A" * 43, "--now")]
)
def test_what_can_not_be_done_is_said_and_changes_nothing(
    stack: RunningStack, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [stack.stack.files.token_keys.ring, stack.stack.files.command_keys.ring]
    before = [file.read_bytes() for file in files]
    assert restante(stack, *given) == 1
    assert "restante: " in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before
