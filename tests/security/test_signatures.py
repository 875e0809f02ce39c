"""Whoever merely reaches the broker opens no door: an agent runs what the fabric signed for it, as it is.

The attacker here has the worker's account on the broker, and puts mail into a mailbox.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fabric import ids
from fabric.signing import sign_command, signing_key
from tests.harness.device import new_key
from tests.harness.rawamqp import field, long, properties, short
from tests.harness.stack import AgentProcess, RunningStack, eventually
from tests.security.conftest import Witness
from topology import names, wire

LIFE = 60_000  # ms


class Forger:
    """The attacker: it makes commands, right ones and wrong ones, and posts them itself."""

    def __init__(self, stack: RunningStack, witness: Witness) -> None:
        self.witness = witness
        self._key = stack.signing_key(stack.stack.files.command_keys)

    def command(self, text: str, **changed: object) -> wire.Command:
        """A fresh command to `note` a text, unsigned."""
        now = int(time.time() * 1000)
        made = wire.Command(
            id=names.CommandId(ids.uuid7(now)),
            name="note",
            body=f'{{"text": "{text}"}}'.encode(),
            content_type=wire.JSON,
            not_after=now + LIFE,
            response_timeout=30_000,
            issuer="operator",
            seq=1,
            attempt=1,
            claim=False,
            generation=1,
            sig="",
            sig_kid="",
            at=now,
        )
        return dataclasses.replace(made, **changed)  # type: ignore[arg-type]

    def signed(self, command: wire.Command, device: str) -> wire.Command:
        """As the fabric would sign it: what a true command looks like on the wire."""
        return dataclasses.replace(
            command, sig=sign_command(self._key, command, names.DeviceId(device)), sig_kid=self._key.kid
        )

    def post(self, device: str, command: wire.Command, without: tuple[str, ...] = (), **headers: str) -> None:
        message = wire.encode_command(command, int(time.time() * 1000))
        told = {name: value for name, value in {**message.headers, **headers}.items() if name not in without}
        assert message.message_id is not None
        raw = properties(
            content_type=short(message.content_type or ""),
            headers=long(b"".join(short(name) + field(value) for name, value in told.items())),  # type: ignore[arg-type]
            delivery_mode=b"\2",
            expiration=short(str(message.expiration_ms)),
            message_id=short(message.message_id),
            type=short("command"),
        )
        self.witness.client.publish(names.MAIL, device, message.body, raw, mandatory=True)
        assert self.witness.client.confirmed()

    def answer(self, device: str, command: str) -> tuple[str, str]:
        """What the device says became of the command: status and reason."""
        found: list[tuple[str, str]] = []

        def said() -> bool:
            key = names.outcome_key(names.DeviceId(device)).encode()
            found.extend(
                (_header(got.header, "status"), _header(got.header, "reason"))
                for got in self.witness.passed()
                if got.key == key and command.encode() in got.header
            )
            return bool(found)

        eventually(said, f"an outcome of {command}")
        return found[0]


def _header(raw: bytes, name: str) -> str:
    """The text of a header in an undecoded content header; empty when it is not there."""
    mark = short(name) + b"S"
    if mark not in raw:
        return ""
    at = raw.index(mark) + len(mark)
    size = int.from_bytes(raw[at : at + 4], "big")
    return raw[at + 4 : at + 4 + size].decode()


@pytest.fixture(scope="module")
def agent(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with stack.agent(tmp_path_factory.mktemp("signed") / "device") as running:
        running.start()
        assert stack.send(running.id, "note", {"text": "up"}, wait=20)["state"] == "succeeded"
        yield running


@pytest.fixture(scope="module")
def forger(stack: RunningStack, agent: AgentProcess) -> Iterator[Forger]:
    witness = Witness(stack, agent.id)
    yield Forger(stack, witness)
    witness.close()


def test_what_is_signed_is_run(agent: AgentProcess, forger: Forger) -> None:
    """The control: the same mail with a true signature starts the handler."""
    command = forger.signed(forger.command("signed"), agent.id)
    forger.post(agent.id, command)
    assert forger.answer(agent.id, command.id) == ("succeeded", "")
    assert agent.record().count("signed") == 1


def _changed(**fields: object) -> Callable[[Forger, str], wire.Command]:
    return lambda forger, device: dataclasses.replace(
        forger.signed(forger.command("forged"), device),
        **fields,  # type: ignore[arg-type]
    )


def _by(key: Callable[[Forger], ec.EllipticCurvePrivateKey], *, own_kid: bool) -> Callable[[Forger, str], wire.Command]:
    def make(forger: Forger, device: str) -> wire.Command:
        signer, command = signing_key(key(forger)), forger.command("forged")
        kid = signer.kid if own_kid else forger._key.kid
        return dataclasses.replace(command, sig=sign_command(signer, command, names.DeviceId(device)), sig_kid=kid)

    return make


def _other_id(forger: Forger, device: str) -> wire.Command:
    return dataclasses.replace(
        forger.signed(forger.command("forged"), device), id=names.CommandId(ids.uuid7(int(time.time() * 1000)))
    )


def _cut(forger: Forger, device: str) -> wire.Command:
    signed = forger.signed(forger.command("forged"), device)
    return dataclasses.replace(signed, sig=signed.sig[:-4])


FORGED: dict[str, Callable[[Forger, str], wire.Command]] = {
    "unsigned": lambda forger, device: forger.command("forged"),
    "signature empty, key known": lambda forger, device: forger.command("forged", sig_kid=forger._key.kid),
    "signature of zeros": lambda forger, device: forger.command("forged", sig="A" * 86, sig_kid=forger._key.kid),
    "signature no base64": lambda forger, device: forger.command("forged", sig="é%", sig_kid=forger._key.kid),
    "signature cut": _cut,
    "signed by another, known key id": _by(lambda _: new_key(), own_kid=False),
    "signed by another, own key id": _by(lambda _: new_key(), own_kid=True),
    "key id unknown": _changed(sig_kid="A" * 43),
    "key id empty": _changed(sig_kid=""),
    "body": _changed(body=b'{"text": "forged, altered"}'),
    "body with a space more": lambda forger, device: dataclasses.replace(
        (signed := forger.signed(forger.command("forged"), device)), body=signed.body + b" "
    ),
    "name": _changed(name="fail"),
    "another id": _other_id,
    "not-after": lambda forger, device: dataclasses.replace(
        (signed := forger.signed(forger.command("forged"), device)), not_after=signed.not_after + 1
    ),
    "claim": _changed(claim=True),
    "issuer": _changed(issuer="somebody"),
    "content type": _changed(content_type="application/octet-stream"),
    "generation up": _changed(generation=2),
    "generation down": _changed(generation=0),
    "for another device": lambda forger, device: forger.signed(forger.command("forged"), "another"),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_is_not_signed_as_it_is_is_refused(agent: AgentProcess, forger: Forger, what: str) -> None:
    before = agent.record()
    command = FORGED[what](forger, agent.id)
    forger.post(agent.id, command)
    assert forger.answer(agent.id, command.id) == ("rejected", "unsigned")
    assert agent.record() == before
    assert agent.alive


@pytest.mark.parametrize("without", [("sig",), ("sig-kid",), ("sig", "sig-kid")])
def test_headers_left_out(agent: AgentProcess, forger: Forger, without: tuple[str, ...]) -> None:
    before = agent.record()
    command = forger.signed(forger.command("forged"), agent.id)
    forger.post(agent.id, command, without)
    assert forger.answer(agent.id, command.id) == ("rejected", "unsigned")
    assert agent.record() == before


def test_the_tokens_key_signs_no_commands(stack: RunningStack, agent: AgentProcess, forger: Forger) -> None:
    key = stack.signing_key(stack.stack.files.token_keys).private
    before = agent.record()
    for own_kid in (True, False):
        command = _by(lambda _: key, own_kid=own_kid)(forger, agent.id)
        forger.post(agent.id, command)
        assert forger.answer(agent.id, command.id) == ("rejected", "unsigned")
    assert agent.record() == before


def test_a_true_command_said_again_runs_once(stack: RunningStack, agent: AgentProcess, forger: Forger) -> None:
    """Replayed as it was, as another attempt, and altered: it ran, and stays what it became."""
    text = f"once-{secrets.token_hex(4)}"
    command = forger.signed(forger.command(text), agent.id)
    forger.post(agent.id, command)
    assert forger.answer(agent.id, command.id) == ("succeeded", "")
    forger.post(agent.id, command)
    forger.post(agent.id, dataclasses.replace(command, attempt=2))
    forger.post(agent.id, dataclasses.replace(command, body=b'{"text": "altered"}'))
    last = forger.signed(forger.command("last"), agent.id)
    forger.post(agent.id, last)
    assert forger.answer(agent.id, last.id) == ("succeeded", "")
    assert agent.record().count(text) == 1
    assert "altered" not in agent.record()


def test_a_copy_of_what_was_done_changes_nothing(stack: RunningStack, agent: AgentProcess, forger: Forger) -> None:
    """An altered copy under the id of a command that the fabric knows."""
    text = f"done-{secrets.token_hex(4)}"
    done = stack.send(agent.id, "note", {"text": text}, wait=20)
    assert done["state"] == "succeeded"
    for copy in (
        forger.command("altered", id=done["id"]),
        dataclasses.replace(forger.signed(forger.command("altered"), agent.id), id=done["id"]),
    ):
        forger.post(agent.id, copy)
    last = stack.send(agent.id, "note", {"text": "after"}, wait=20)
    assert last["state"] == "succeeded"
    assert stack.command(done["id"]) == done
    assert agent.record().count(text) == 1
    assert "altered" not in agent.record()


def test_a_stale_command_is_not_run_when_its_time_is_over(agent: AgentProcess, forger: Forger) -> None:
    before = agent.record()
    command = forger.signed(forger.command("too late", not_after=int(time.time() * 1000) - 1000), agent.id)
    raised = dataclasses.replace(command, not_after=int(time.time() * 1000) + LIFE)
    forger.post(agent.id, raised)
    assert forger.answer(agent.id, command.id) == ("rejected", "unsigned")
    assert agent.record() == before


def test_a_command_of_an_earlier_generation_is_refused(stack: RunningStack, tmp_path: Path) -> None:
    """Signed for this device before it was enrolled anew, and kept by whoever read the broker."""
    with stack.agent(tmp_path / "first", "renewed") as first:
        ticket = stack.ok(stack.http.post(f"/v1/devices/{first.id}/enrollment"))["ticket"]
        again = AgentProcess(stack, tmp_path / "second", first.id)
        again.enroll(ticket)
    witness = Witness(stack, again.id)
    with again:
        again.start()
        assert stack.send(again.id, "note", {"text": "up"}, wait=20)["state"] == "succeeded"
        forger = Forger(stack, witness)
        old = forger.signed(forger.command("of generation 1", generation=1), again.id)
        forger.post(again.id, old)
        answer = forger.answer(again.id, old.id)
        witness.close()
    assert answer == ("rejected", "unsigned")
    assert again.record() == ["up"]


def test_an_unsigned_copy_does_not_make_the_device_lie(stack: RunningStack, tmp_path: Path) -> None:
    """`rejected` means that the handler did not start, whoever made the agent say it."""
    with stack.agent(tmp_path / "device", "misled") as agent:
        agent.start()
        stack.send(agent.id, "note", {"text": "up"}, wait=20)
        witness = Witness(stack, agent.id)
        forger = Forger(stack, witness)
        busy = stack.send(agent.id, "slow", {"text": "busy", "seconds": 1})  # under the age that is claimed
        eventually(lambda: "busy" in agent.record(), "the slot to be taken")
        true = stack.send(agent.id, "note", {"text": "true"})
        forger.post(agent.id, forger.command("copy", id=true["id"]))
        stack.settled(busy["id"])
        last = stack.send(agent.id, "note", {"text": "last"}, wait=20)
        assert last["state"] == "succeeded"
        witness.close()
        ran = "true" in agent.record()
        assert ran == (stack.settled(true["id"])["state"] == "succeeded")
