"""A signing key that leaked is good for nothing, once it is retired."""

import dataclasses
from pathlib import Path

import jwt
import pytest

from api.operator import cli
from device_agent import identity
from fabric.signing import sign_command
from tests.harness.stack import AgentProcess, RunningStack
from tests.security.conftest import Witness
from tests.security.test_signatures import Forger
from topology import names


def retire(stack: RunningStack, kid: str) -> int:
    return cli.main(["--state-dir", str(stack.stack.files.state_dir), "keys", "retire", kid, "--now"])


def test_tokens_that_a_retired_key_signed_are_refused(stack: RunningStack, capsys: pytest.CaptureFixture[str]) -> None:
    """The operator's own, too: the command makes another."""
    files = stack.stack.files
    leaked = stack.signing_key(files.token_keys)
    minting = {"subject": "retired", "scopes": ["devices:read"]}
    minted = stack.ok(stack.http.post("/v1/tokens", json=minting))["token"]
    assert jwt.get_unverified_header(minted)["kid"] == leaked.kid
    with stack.client(minted) as http:
        stack.ok(http.get("/v1/devices"))
        assert retire(stack, leaked.kid) == 0
        assert http.get("/v1/devices").status_code == 401
    published = stack.ok(stack.http.get("/.well-known/jwks.json"))["keys"]
    assert leaked.kid not in {key["kid"] for key in published}
    stack.token = files.operator_token.read_text()
    stack.http = stack.client(stack.token)
    with stack.client(stack.ok(stack.http.post("/v1/tokens", json=minting))["token"]) as http:
        stack.ok(http.get("/v1/devices"))
    assert retire(stack, leaked.kid) == 1
    assert "there is no signing key" in capsys.readouterr().err


def test_devices_refuse_what_a_retired_key_signs(stack: RunningStack, tmp_path: Path) -> None:
    files = stack.stack.files
    leaked = stack.signing_key(files.command_keys)
    with stack.agent(tmp_path / "device") as agent:
        agent.start()
        assert stack.send(agent.id, "note", {"text": "before"}, wait=60)["state"] == "succeeded"
        witness = Witness(stack, agent.id)
        forger = Forger(stack, witness)
        assert retire(stack, leaked.kid) == 0
        # Signed by a key that it doesn't know; the news of it ends the other.
        assert stack.send(agent.id, "note", {"text": "after"}, wait=60)["state"] == "succeeded"
        forged = forger.command("forged")
        signature = sign_command(leaked, forged, names.DeviceId(agent.id))
        forger.post(agent.id, dataclasses.replace(forged, sig=signature, sig_kid=leaked.kid))
        assert forger.answer(agent.id, forged.id) == ("rejected", "unsigned")
        assert agent.record() == ["before", "after"]
        witness.close()
    assert leaked.kid not in _good(agent)


def _good(agent: AgentProcess) -> set[str]:
    trusted = identity.load(agent.state).peering.signing_keys
    return {kid for kid in trusted.keys if trusted.key(kid, 2**50) is not None}
