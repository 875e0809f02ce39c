"""What a device says of another's commands, or says without saying who it is, changes nothing in the ledger.

The broker lets such messages through where the key is the attacker's own; it is the fabric that drops them.
Each test ends with a true report on the same queue: once it has had its effect, the forged ones have had theirs.
"""

import json
import secrets
import time

import pytest

from tests.harness.device import Device, One
from tests.harness.rawamqp import RawClient, field, long, properties, short
from tests.harness.stack import Document, RunningStack, eventually
from tests.security.conftest import Witness
from topology import names, wire


def message(
    device: Device,
    kind: str,
    /,
    *,
    correlation: str | None = None,
    user_id: str | None = None,
    reply_to: str | None = None,
    message_id: str | None = None,
    **headers: str | int | bool,
) -> bytes:
    """Raw properties of a report in the contract's form."""
    told = {"v": wire.VERSION, "at": int(time.time() * 1000), "agent": device.agent, **headers}
    values = {
        "content_type": short(wire.JSON),
        "headers": long(b"".join(short(name.replace("_", "-")) + field(value) for name, value in told.items())),
        "type": short(kind),
    }
    given = {"correlation_id": correlation, "user_id": user_id, "reply_to": reply_to, "message_id": message_id}
    return properties(**values, **{name: short(value) for name, value in given.items() if value is not None})


def say(client: RawClient, key: str, raw_properties: bytes, body: bytes = b"null") -> None:
    """Publish on `uplink`, and see it accepted by the broker."""
    client.publish(names.UPLINK, key, body, raw_properties)
    assert client.confirmed()


def queued(stack: RunningStack, device: Device) -> str:
    command = stack.send(device.id, "note", {}, ttl=600)
    eventually(lambda: stack.command(command["id"])["state"] == "queued", "queued")
    return str(command["id"])


def outcome(device: Device, command: str, **more: str) -> bytes:
    return message(device, "outcome", correlation=command, user_id=device.id, status="succeeded", **more)


def true_report(stack: RunningStack, client: RawClient, device: Device, command: str) -> None:
    """The control, and the end: what is said rightly takes effect, behind everything said before."""
    say(client, f"outcome.{device.id}", outcome(device, command))
    assert stack.settled(command)["state"] == "succeeded"


def test_nobody_reports_on_anothers_command(
    stack: RunningStack, attacker: Device, victim: Device, waiting: str
) -> None:
    own, before = queued(stack, attacker), stack.command(waiting)
    with attacker.raw() as client:
        for state in ("received", "running"):
            forged = message(attacker, "receipt", correlation=waiting, user_id=attacker.id, state=state)
            say(client, f"receipt.{attacker.id}", forged)
        for status in ("succeeded", "failed", "rejected"):
            forged = message(attacker, "outcome", correlation=waiting, user_id=attacker.id, status=status)
            say(client, f"outcome.{attacker.id}", forged)
        stolen = message(
            attacker, "outcome", correlation=waiting, user_id=attacker.id, status="failed", device=victim.id
        )
        say(client, f"outcome.{attacker.id}", stolen)
        true_report(stack, client, attacker, own)
    assert stack.command(waiting) == before


@pytest.mark.usefixtures("amqp_1_0")
def test_nobody_reports_on_anothers_command_in_1_0(
    stack: RunningStack, attacker: Device, victim: Device, waiting: str
) -> None:
    """Where AMQP 1.0 has no word for `type`, the fabric hears no report at all: the contract is 0-9-1's."""
    own, other, before = queued(stack, attacker), queued(stack, attacker), stack.command(waiting)
    headers = {"v": wire.VERSION, "at": int(time.time() * 1000), "agent": attacker.agent, "status": "succeeded"}

    def report(one: One, command: str, **user_id: bytes) -> bool:
        return one.send(
            f"/exchanges/{names.UPLINK}/outcome.{attacker.id}",
            b"null",
            correlation_id=command,
            **user_id,
            content_type=wire.JSON,
            properties=headers,
            annotations={"x-basic-type": "outcome"},
        )

    with One(attacker) as one:
        assert report(one, waiting, user_id=attacker.id.encode())
    for command in (waiting, own):
        with One(attacker) as one:
            assert report(one, command)
    with attacker.raw() as client:
        true_report(stack, client, attacker, other)
    assert stack.command(own)["state"] == "queued", "a report without user_id was believed"
    assert stack.command(waiting) == before


def test_a_report_without_user_id_is_not_believed(stack: RunningStack, attacker: Device, waiting: str) -> None:
    """It reaches the queue, since the broker checks `user_id` only when there is one."""
    own, before, other = queued(stack, attacker), stack.command(waiting), queued(stack, attacker)
    with attacker.raw() as client:
        for command in (own, waiting):
            for state in ("received", "running"):
                say(client, f"receipt.{attacker.id}", message(attacker, "receipt", correlation=command, state=state))
            say(client, f"outcome.{attacker.id}", message(attacker, "outcome", correlation=command, status="failed"))
        true_report(stack, client, attacker, other)
        assert stack.command(own)["state"] == "queued"
        true_report(stack, client, attacker, own)
    assert stack.command(waiting) == before


def test_a_forged_death_settles_nothing(stack: RunningStack, attacker: Device, victim: Device, waiting: str) -> None:
    """What the broker writes on dead letters is worth nothing on a message of `uplink`."""
    own, before = queued(stack, attacker), stack.command(waiting)
    entry = b"".join(
        short(name) + b"S" + long(value)
        for name, value in (("queue", victim.mailbox), ("reason", "maxlen"), ("exchange", names.MAIL))
    )
    deaths = short("x-death") + b"A" + long(b"F" + long(entry + short("count") + b"l" + (1).to_bytes(8, "big")))
    for name, value in (("queue", victim.mailbox), ("reason", "maxlen"), ("exchange", names.MAIL)):
        deaths += short(f"x-first-death-{name}") + b"S" + long(value)
        deaths += short(f"x-last-death-{name}") + b"S" + long(value)
    told = {"v": wire.VERSION, "at": 0, "agent": attacker.agent, "attempt": 1, "status": "failed", "state": "running"}
    headers = deaths + b"".join(short(name) + field(value) for name, value in told.items())
    with attacker.raw() as client:
        for kind in ("command", "receipt", "outcome"):
            for key in ("receipt", "outcome", "claim"):
                forged = properties(
                    content_type=short(wire.JSON),
                    headers=long(headers),
                    correlation_id=short(waiting),
                    message_id=short(waiting),
                    type=short(kind),
                    user_id=short(attacker.id),
                )
                say(client, f"{key}.{attacker.id}", forged)
        true_report(stack, client, attacker, own)
    assert stack.command(waiting) == before


# ---- Claims and answers ------------------------------------------------------------------------------


def answer_to(client: RawClient, correlation: str) -> Document:
    while True:
        got = client.delivery()
        if correlation.encode() in got.header:
            document: Document = json.loads(got.body)
            return document


def test_nobody_is_granted_anothers_command(stack: RunningStack, attacker: Device, waiting: str) -> None:
    own, before = queued(stack, attacker), stack.command(waiting)
    correlation = secrets.token_hex(8)
    with attacker.raw() as client:
        client.consume(names.DIRECT_REPLY_TO, no_ack=True)
        asked = message(attacker, "claim", correlation=correlation, user_id=attacker.id, reply_to=names.DIRECT_REPLY_TO)
        say(client, f"claim.{attacker.id}", asked, json.dumps([waiting, own]).encode())
        answer = answer_to(client, correlation)
    assert (answer["granted"], answer["refused"]) == ([own], {waiting: "unknown"})
    assert stack.command(waiting) == before
    assert stack.command(own)["state"] == "delivered"


def test_a_claim_without_user_id_is_not_answered(stack: RunningStack, attacker: Device, waiting: str) -> None:
    own = queued(stack, attacker)
    silent, heard = secrets.token_hex(8), secrets.token_hex(8)
    with attacker.raw() as client:
        client.consume(names.DIRECT_REPLY_TO, no_ack=True)
        unknown = message(attacker, "claim", correlation=silent, reply_to=names.DIRECT_REPLY_TO)
        say(client, f"claim.{attacker.id}", unknown, json.dumps([own]).encode())
        hello = message(
            attacker, "hello", correlation=heard, user_id=attacker.id, reply_to=names.DIRECT_REPLY_TO, agent_version="1"
        )
        say(client, f"hello.{attacker.id}", hello)
        first = client.delivery()
    assert heard.encode() in first.header, "the forged claim was answered"
    assert stack.command(own)["state"] == "queued"


@pytest.mark.parametrize("kind", ["hello", "claim"])
def test_the_fabric_answers_at_reply_addresses_only(
    stack: RunningStack, attacker: Device, victim: Device, waiting: str, witness: Witness, kind: str
) -> None:
    """The fabric may write anywhere; a device that names the place must not borrow that."""
    own, before, depth = queued(stack, attacker), stack.command(waiting), witness.depth(victim.mailbox)
    places = (
        victim.mailbox,
        attacker.mailbox,
        names.REPORTS,
        names.MAIL,
        "",
        "amq.rabbitmq.reply-to.",
        f"amq.rabbitmq.reply-to\n{victim.mailbox}",
        f"amq.rabbitmq.reply-to. {victim.mailbox}",
    )
    heard = secrets.token_hex(8)
    witness.passed()
    with attacker.raw() as client:
        client.consume(names.DIRECT_REPLY_TO, no_ack=True)
        for place in places:
            asked = message(
                attacker, kind, correlation=secrets.token_hex(8), user_id=attacker.id, reply_to=place, agent_version="1"
            )
            say(client, f"{kind}.{attacker.id}", asked, json.dumps([own]).encode())
        last = message(
            attacker, "hello", correlation=heard, user_id=attacker.id, reply_to=names.DIRECT_REPLY_TO, agent_version="1"
        )
        say(client, f"hello.{attacker.id}", last)
        assert heard.encode() in client.delivery().header
    assert witness.depth(victim.mailbox) == depth
    exchanges = {got.exchange for got in witness.passed()} - {b"amq.rabbitmq.event"}
    assert exchanges == {names.UPLINK.encode()}
    assert stack.command(waiting) == before


def test_an_answer_at_anothers_address_tells_the_askers_data_only(
    stack: RunningStack, attacker: Device, victim: Device, waiting: str, witness: Witness
) -> None:
    """A reply address in the right form may be another device's: SECURITY.md, rule 5. It gets what it can't use."""
    own, correlation, asked_by_victim = queued(stack, attacker), secrets.token_hex(8), secrets.token_hex(8)
    witness.passed()
    with victim.raw() as listener, attacker.raw() as client:
        listener.consume(names.DIRECT_REPLY_TO, no_ack=True)
        hello = message(
            victim,
            "hello",
            correlation=asked_by_victim,
            user_id=victim.id,
            reply_to=names.DIRECT_REPLY_TO,
            agent_version="1",
        )
        say(listener, f"hello.{victim.id}", hello)
        assert asked_by_victim.encode() in listener.delivery().header
        seen = next(got for got in witness.passed() if got.key == f"hello.{victim.id}".encode())
        at = seen.header.index(b"amq.rabbitmq.reply-to.")
        address = seen.header[at : at + seen.header[at - 1]].decode()
        claim = message(attacker, "claim", correlation=correlation, user_id=attacker.id, reply_to=address)
        say(client, f"claim.{attacker.id}", claim, json.dumps([own, waiting]).encode())
        got = listener.delivery()
    assert correlation.encode() in got.header, "an answer to a question that the victim has not asked"
    answer = json.loads(got.body)
    assert (answer["granted"], answer["refused"]) == ([own], {waiting: "unknown"})
    assert victim.id.encode() not in got.header + got.body
