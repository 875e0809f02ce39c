"""The mailbox's order of things (COMMANDS.md, rule 1) and the reporter's persistence, against a recording link."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from device_agent import errors, handlers, journal, mailbox, pickup, trust
from device_agent.clock import FabricClock
from device_agent.handlers import Done, PythonHandlers
from device_agent.identity import Identity, Peering, make_key
from device_agent.journal import Journal, State, open_journal
from device_agent.link import Mail
from device_agent.mailbox import Mailbox
from device_agent.pins import Pins
from device_agent.reports import Reporter
from fabric import signing
from topology import names, wire

NOW = 1_800_000_000_000
DEVICE = names.DeviceId("garage-7")
SIGNER = signing.signing_key(ec.generate_private_key(ec.SECP256R1()))


class Recorder:
    """Plays link and runner: everything done is written down in order, with the journal's state at that moment."""

    def __init__(self, kept: Journal) -> None:
        self.kept = kept
        self.up = True
        self.writes = 0
        self.events: list[tuple[str, object]] = []
        self.published: list[tuple[str, wire.Message, Callable[[bool], None] | None]] = []
        self.timers: list[tuple[float, Callable[..., None], tuple[object, ...]]] = []
        self.ended: Callable[[Done], None] | None = None
        self.answer: bool | None = None  # of the broker to what was said last, before anything else happens

    def ack(self, mail: Mail) -> None:
        self.events.append(("ack", mail.tag))

    @contextmanager
    def together(self) -> Iterator[None]:
        self.writes += 1
        yield

    def publish(self, key: str, message: wire.Message, done: Callable[[bool], None] | None) -> bool:
        if self.up:
            entry = self.kept.find(names.CommandId(message.correlation_id or ""))
            self.events.append((key.partition(".")[0], entry.state if entry else None))
            self.published.append((key, message, done))
        return self.up

    def submit(self, job: object, context: object, ended: Callable[[Done], None]) -> None:
        self.events.append(("start", None))
        self.ended = ended

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)

    def soon(self, function: Callable[..., None], *arguments: object) -> None:
        answer, self.answer = self.answer, None
        if answer is not None:
            _, _, done = self.published[-1]
            assert done is not None
            done(answer)
        function(*arguments)

    def later(self, delay: float, function: Callable[..., None], *arguments: object) -> Any:
        self.timers.append((delay, function, arguments))

        class Handle:
            def cancel(self) -> None: ...

        return Handle()

    def fire(self) -> None:
        due, self.timers = self.timers, []
        for _, function, arguments in due:
            function(*arguments)

    def open_mailbox(self, prefetch: int) -> None:
        self.events.append(("open", prefetch))

    def close_mailbox(self) -> None: ...

    def reset(self, reason: str) -> None:
        self.events.append(("reset", None))

    def outcomes(self) -> list[wire.Outcome]:
        return [wire.decode_outcome(message) for _, message, _ in self.published if message.type == "outcome"]


class World:
    def __init__(self, directory: Path) -> None:
        self.kept = open_journal(directory)
        self.link = Recorder(self.kept)
        clock = FabricClock(lambda: 0.0)
        clock.adjust(NOW, 0.0, 0.0)
        python = PythonHandlers()
        python.register("door.close", lambda: "closed", idempotent=False)
        python.register("door.state", lambda: "closed", idempotent=True)
        peering = Peering(DEVICE, 1, "h", 1, "devices", "u", "m", "a", trust.parse(signing.jwks(SIGNER)))
        link: Any = self.link
        self.reporter = Reporter(link, self.kept, DEVICE)
        self.reporter.link_up()
        self.identity = Identity(make_key(directory), peering, Pins(()))
        self.mailbox = Mailbox(
            identity=self.identity,
            renew=lambda: self.identity,
            link=link,
            journal=self.kept,
            clock=clock,
            reporter=self.reporter,
            ask=self.ask,
            runner=link,
            sources=[python],
            slots=1,
        )
        self._tag = 0

    def ask(self) -> None:
        self.link.events.append(("ask", None))

    def take(self, sent: wire.Command, *, redelivered: bool = False, signed: bool = True, **changed: Any) -> None:
        self._tag += 1
        signature = signing.sign_command(SIGNER, sent, DEVICE) if signed else ""
        message = wire.encode_command(replace(sent, sig=signature, sig_kid=SIGNER.kid), NOW)
        self.mailbox.take(Mail(self._tag, 1, redelivered, replace(message, **changed)))


def command(number: int = 1, **changed: Any) -> wire.Command:
    made = wire.Command(
        id=names.CommandId(f"0199c0de-0000-7000-8000-{number:012x}"),
        name="door.close",
        body=b"{}",
        content_type=wire.JSON,
        not_after=NOW + 60_000,
        response_timeout=30_000,
        issuer="billing",
        seq=number,
        attempt=1,
        claim=False,
        generation=1,
        sig="",
        sig_kid="",
        at=NOW,
    )
    return replace(made, **changed)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.kept.close()


def test_journal_then_ack_then_receipt_then_start(world: World) -> None:
    world.take(command())
    assert world.link.events == [("ack", 1), ("receipt", State.STARTED), ("start", None)]
    assert world.kept.find(command().id) is not None


def test_mail_that_waits_for_a_slot_is_neither_acked_nor_journaled(world: World) -> None:
    world.take(command(1))
    world.take(command(2))
    assert ("ack", 2) not in world.link.events
    assert world.kept.find(command(2).id) is None
    assert world.link.ended is not None
    world.link.ended(handlers.succeeded("closed"))
    assert ("ack", 2) in world.link.events
    assert [one.command for one in world.link.outcomes()] == [command(1).id]


def answer(world: World, granted: tuple[int, ...] = (), refused: dict[int, str] | None = None) -> None:
    (claim,) = [message for _, message, _ in world.link.published if message.type == "claim"][-1:]
    said = {command(number).id: reason for number, reason in (refused or {}).items()}
    ids = tuple(command(number).id for number in granted)
    world.mailbox.claim_answered(wire.encode_claim_answer(wire.ClaimAnswer(str(claim.correlation_id), ids, said, NOW)))


def test_claimed_mail_stays_unacked_until_the_grant_and_keeps_the_slot(world: World) -> None:
    world.take(command(1), redelivered=True)
    world.take(command(2))
    assert [event for event, _ in world.link.events] == ["claim"]
    answer(world, granted=(1,))
    assert world.link.events[1:] == [("ack", 1), ("receipt", State.STARTED), ("start", None)]


def test_an_unanswered_claim_is_asked_again(world: World) -> None:
    world.take(command(claim=True))
    world.link.fire()
    assert [event for event, _ in world.link.events] == ["claim", "claim"]
    answer(world, granted=(1,))
    assert ("start", None) in world.link.events


def test_a_refusal_is_journaled_and_acked_in_silence(world: World) -> None:
    for number, reason in ((1, "cancelled"), (2, "taken")):
        world.take(command(number, claim=True))
        answer(world, refused={number: reason})
        entry = world.kept.find(command(number).id)
        assert entry is not None
        assert entry.state == State.REFUSED
        assert ("ack", number) in world.link.events
    assert world.link.outcomes() == []


def test_a_claim_refused_as_unanswered_resolves_the_doubt(world: World) -> None:
    world.take(command(claim=True))
    answer(world, refused={1: "unanswered"})
    (said,) = world.link.outcomes()
    assert (said.status, said.reason) == ("rejected", "claim-refused")


def test_a_stray_answer_changes_nothing(world: World) -> None:
    world.take(command(claim=True))
    stray = wire.ClaimAnswer("not-asked", (command().id,), {}, NOW)
    world.mailbox.claim_answered(wire.encode_claim_answer(stray))
    assert [event for event, _ in world.link.events] == ["claim"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"signed": False}, "unsigned"),
        ({"body": b'{"speed":9}'}, "unsigned"),
        ({"headers": {"v": "2.0"}}, "unsupported: contract version 2.0; this side speaks 1.0"),
        ({"headers": {"v": "1.0"}}, "malformed: header 'name' is not a text of at most 128 characters"),
    ],
)
def test_what_is_no_signed_command_is_answered_and_never_journaled(
    world: World, changed: dict[str, Any], reason: str
) -> None:
    world.take(command(), **changed)
    (said,) = world.link.outcomes()
    assert (said.status, said.reason) == ("rejected", reason)
    assert ("ack", 1) in world.link.events
    assert world.kept.find(command().id) is None


@pytest.mark.parametrize("field", ["name", "not_after", "claim", "generation", "issuer", "content_type"])
def test_the_signature_covers_what_a_command_means(world: World, field: str) -> None:
    altered = {"name": "door.state", "not_after": NOW + 10**6, "claim": True, "generation": 2, "issuer": "x"}
    value = altered.get(field, "text/plain")
    signature = signing.sign_command(SIGNER, command(), DEVICE)
    forged = replace(command(), sig=signature, sig_kid=SIGNER.kid, **{field: value})
    world.mailbox.take(Mail(1, 1, False, wire.encode_command(forged, NOW)))
    (said,) = world.link.outcomes()
    assert said.reason == "unsigned"


FORGED: list[dict[str, Any]] = [{"signed": False}, {"headers": {"v": "1.0"}}, {"headers": {"v": "2.0"}}]


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_copy_can_not_make_the_agent_deny_what_it_started(world: World, forged: dict[str, Any]) -> None:
    world.take(command())
    world.take(command(), **forged)
    assert world.link.outcomes() == []
    assert ("ack", 2) in world.link.events
    assert world.link.ended is not None
    world.link.ended(handlers.succeeded("closed"))
    world.take(command(), **forged)
    assert [said.status for said in world.link.outcomes()] == ["succeeded"]
    assert ("ack", 3) in world.link.events


@pytest.mark.parametrize("forged", FORGED)
def test_nothing_is_said_for_a_forged_copy_while_the_true_mail_waits_or_is_claimed(
    world: World, forged: dict[str, Any]
) -> None:
    world.take(command(1))
    world.take(command(2))
    world.take(command(2), **forged)
    assert ("ack", 3) in world.link.events
    world.take(command(3), redelivered=True)
    assert world.link.ended is not None
    world.link.ended(handlers.succeeded("closed"))  # 2 starts
    world.link.ended(handlers.succeeded("closed"))  # 3 is claimed
    world.take(command(3), **forged)
    assert ("ack", 5) in world.link.events
    answer(world, granted=(3,))
    world.link.ended(handlers.succeeded("closed"))
    told = [(said.command, said.status) for said in world.link.outcomes()]
    assert told == [(command(number).id, "succeeded") for number in (1, 2, 3)]


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("redelivered", [False, True])
def test_the_true_mail_of_what_was_denied_is_not_run(world: World, forged: dict[str, Any], redelivered: bool) -> None:
    world.take(command(), **forged)
    world.take(command(), **forged)
    (said,) = world.link.outcomes()
    world.take(command(), redelivered=redelivered)
    assert [event for event, _ in world.link.events] == ["outcome", "ack", "ack", "ack", "outcome"]
    again = world.link.outcomes()[-1]
    assert (again.status, again.reason) == ("rejected", said.reason) == (said.status, said.reason)
    entry = world.kept.find(command().id)
    assert entry is not None
    assert entry.state == State.DONE


def test_fresh_mail_is_claimed_when_more_was_denied_than_is_remembered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.pickup.MAX_DENIED", 2)
    for number in range(1, 4):
        world.take(command(number), signed=False)
    world.take(command(1))
    assert world.link.events[-1][0] == "claim"
    answer(world, refused={1: "rejected"})
    assert ("start", None) not in world.link.events
    assert len(world.link.outcomes()) == 3


@pytest.mark.parametrize("generation", [1, 3])
def test_a_command_of_another_generation_is_no_command_for_this_device(world: World, generation: int) -> None:
    world.identity = replace(world.identity, peering=replace(world.identity.peering, generation=2))
    world.take(command(1, generation=2))  # enrolled again since the start: the identity is read anew
    assert ("start", None) in world.link.events
    world.take(command(2, generation=generation))
    (said,) = world.link.outcomes()
    assert (said.command, said.status, said.reason) == (command(2).id, "rejected", "unsigned")
    assert ("ack", 2) in world.link.events
    assert world.kept.find(command(2).id) is None


def test_an_identity_that_can_not_be_read_again_changes_nothing(world: World) -> None:
    del world.identity

    def gone() -> Identity:
        raise errors.StateRefused("gone")

    world.mailbox._renew = gone
    world.take(command(1, generation=2))
    world.take(command(2))
    assert [said.reason for said in world.link.outcomes()] == ["unsigned"]
    assert ("start", None) in world.link.events


def test_ack_and_receipt_leave_together(world: World) -> None:
    world.take(command())
    assert world.link.writes == 1


def test_undecodable_and_other_mail_is_acked(world: World) -> None:
    world.take(command(), type="restante.undecodable", message_id=None, headers={"reason": "x"})
    world.take(command(), type="notification")
    assert world.link.events == [("ack", 1), ("ack", 2)]


def test_a_full_journal_stops_the_fetching(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRIES", 0)
    world.take(command())
    assert world.link.events == []
    monkeypatch.setattr(journal, "MAX_ENTRIES", 10)
    world.link.fire()
    assert ("start", None) in world.link.events


def test_a_journal_that_fails_acks_nothing_and_gives_the_mail_back(world: World) -> None:
    world.kept._db.execute("PRAGMA query_only = 1")
    world.take(command())
    assert world.link.events == [("reset", None)]


def test_what_runs_says_so_again_after_a_reconnect(world: World) -> None:
    world.take(command())
    world.mailbox.link_down()
    world.mailbox.link_up()
    assert [event for event, _ in world.link.events].count("receipt") == 2


def test_an_interrupted_command_is_said_to_have_started_until_that_is_confirmed(tmp_path: Path) -> None:
    before = World(tmp_path)
    before.mailbox.welcomed()
    before.take(command())
    before.kept.close()  # and never an outcome: it was killed
    world = World(tmp_path)
    world.mailbox.welcomed()
    assert world.link.events == [("receipt", State.DOUBT), ("open", 3)]
    world.take(command(attempt=2))
    assert world.link.events[2:] == [("ack", 1)], "one is on its way"
    world.link.published[-1][2](False)  # type: ignore[misc]  # it has one, as an outcome has
    world.link.fire()
    assert world.link.events[3:] == [("receipt", State.DOUBT)]
    world.kept.close()

    third = World(tmp_path)  # killed before the confirm
    assert third.link.events == [("receipt", State.DOUBT)]
    third.link.published[-1][2](True)  # type: ignore[misc]
    third.kept.flush()
    third.reporter.link_up()
    assert len(third.link.events) == 1
    third.kept.meet("a fabric that has lost its reports")
    third.reporter.again()
    assert third.link.events[1:] == [("receipt", State.DOUBT)]
    assert not third.link.outcomes()
    third.kept.close()


def test_an_outcome_is_sent_until_it_is_confirmed(world: World) -> None:
    world.take(command())
    assert world.link.ended is not None
    world.link.ended(handlers.succeeded("closed"))
    for attempt in range(1, 4):
        assert len(world.link.outcomes()) == attempt
        world.link.published[-1][2](False)  # type: ignore[misc]  # an outcome always has one
        world.link.fire()
    world.link.up = False
    world.link.published[-1][2](False)  # type: ignore[misc]
    assert not world.reporter.idle
    world.link.up = True
    world.reporter.link_up()
    world.link.published[-1][2](True)  # type: ignore[misc]
    assert world.reporter.idle
    world.kept.flush()
    assert world.kept.counts()["reported"] == 1


@pytest.mark.parametrize("confirmed", [True, False])
def test_what_was_answered_before_it_was_kept_is_said_again_only_if_refused(world: World, confirmed: bool) -> None:
    world.take(command())
    assert world.link.ended is not None
    world.link.answer = confirmed
    world.link.ended(handlers.succeeded("closed"))
    world.link.fire()
    assert len(world.link.outcomes()) == (1 if confirmed else 2)
    world.link.fire()
    assert [word.command for word in world.kept.unreported(10)] == ([] if confirmed else [command().id])
    assert world.reporter.idle is confirmed


def test_more_outcomes_than_the_window_all_go_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_agent.reports.WINDOW", 3)
    for number in range(1, 11):
        world.kept.start(command(number), NOW, keep_request=False)
        world.kept.finish(wire.Outcome(command(number).id, "a" * 16, "succeeded", None, b"1", wire.JSON, NOW + number))
    world.reporter.again()
    confirmed = 0
    while confirmed < len(world.link.published):
        assert len(world.link.published) - confirmed <= 3
        world.link.published[confirmed][2](True)  # type: ignore[misc]
        confirmed += 1
    assert [one.command for one in world.link.outcomes()] == [command(number).id for number in range(10, 0, -1)]
    assert world.reporter.idle


def test_a_great_many_outcomes_go_out_at_a_pace_and_hold_up_no_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.reports.BURST", 5)
    monkeypatch.setattr("device_agent.reports.PACE", 2)
    world.reporter = Reporter(world.link, world.kept, DEVICE)  # type: ignore[arg-type]  # it plays the link
    for number in range(1, 11):
        world.kept.start(command(number), NOW, keep_request=False)
        world.kept.finish(wire.Outcome(command(number).id, "a" * 16, "succeeded", None, b"1", wire.JSON, NOW + number))

    def confirm() -> int:
        for _, message, done in world.link.published[confirm_from:]:
            assert message.correlation_id is not None
            done(True)  # type: ignore[misc]  # an outcome always has one
        return len(world.link.published)

    confirm_from = 0
    world.reporter.again()
    confirm_from = confirm()
    assert confirm_from == 5
    new = wire.Outcome(command(11).id, "a" * 16, "succeeded", None, b"1", wire.JSON, NOW)
    world.kept.start(command(11), NOW, keep_request=False)
    world.kept.finish(new)
    world.reporter.kept(new)
    confirm_from = confirm()
    assert world.link.outcomes()[-1] == new
    for sent in (8, 10, 11):
        world.link.fire()
        confirm_from = confirm()
        assert confirm_from == sent
    assert {one.command for one in world.link.outcomes()} == {command(number).id for number in range(1, 12)}
    assert world.reporter.idle


def test_what_ends_while_a_great_many_outcomes_go_out_is_the_next_of_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.reports.WINDOW", 2)
    monkeypatch.setattr("device_agent.reports.BURST", 3)
    monkeypatch.setattr("device_agent.reports.PACE", 1)
    world.reporter = Reporter(world.link, world.kept, DEVICE)  # type: ignore[arg-type]  # it plays the link
    for number in range(1, 11):
        world.kept.start(command(number), NOW, keep_request=False)
        world.kept.finish(wire.Outcome(command(number).id, "a" * 16, "succeeded", None, b"1", wire.JSON, NOW + number))
    world.reporter.again()
    new = wire.Outcome(command(11).id, "a" * 16, "succeeded", None, b"1", wire.JSON, NOW + 11)
    world.kept.start(command(11), NOW, keep_request=False)
    world.kept.finish(new)
    world.reporter.kept(new)  # in the midst of the burst: nothing passes what waits
    assert [one.command for one in world.link.outcomes()] == [command(10).id, command(9).id]
    world.link.published[0][2](True)  # type: ignore[misc]  # an outcome always has one
    assert world.link.outcomes()[2] == replace(new, agent=world.kept.agent)


NEXT = signing.signing_key(ec.generate_private_key(ec.SECP256R1()))


def by_next(world: World, number: int = 1, key: signing.SigningKey = NEXT) -> None:
    """Mail that is signed by another key than the one that is known."""
    sent = command(number)
    signed = replace(sent, sig=signing.sign_command(key, sent, DEVICE), sig_kid=key.kid)
    world.mailbox.take(Mail(number, 1, False, wire.encode_command(signed, NOW)))


def told(world: World, *keys: signing.SigningKey) -> None:
    peering = replace(world.identity.peering, signing_keys=trust.parse(signing.jwks(*keys)))
    world.mailbox.trust(replace(world.identity, peering=peering))


def test_mail_by_an_unknown_key_waits_for_news_and_runs_if_it_is_the_next_one(world: World) -> None:
    by_next(world, 1)
    by_next(world, 2)
    assert world.link.events == []
    world.link.fire()
    assert world.link.events == [("ask", None)]
    told(world, SIGNER, NEXT)
    world.mailbox.welcomed()
    assert world.link.events.count(("start", None)) == 1  # there is one slot
    assert world.link.ended is not None
    world.link.ended(handlers.succeeded("closed"))
    assert world.link.events.count(("start", None)) == 2
    by_next(world, 3)  # known by now
    assert world.link.timers == []


def test_mail_by_a_stranger_is_refused_after_asking_once_a_minute(world: World) -> None:
    by_next(world, 1)
    world.link.fire()
    world.mailbox.welcomed()
    assert [said.reason for said in world.link.outcomes()] == ["unsigned"]
    by_next(world, 2)
    assert [said.reason for said in world.link.outcomes()] == ["unsigned", "unsigned"]
    assert world.link.events.count(("ask", None)) == 1
    another = signing.signing_key(ec.generate_private_key(ec.SECP256R1()))
    by_next(world, 3, another)
    assert [delay for delay, *_ in world.link.timers] == [mailbox.ASK_EVERY]  # whoever makes up key ids gets no more


def test_nothing_is_said_for_a_copy_of_what_waits_for_news(world: World) -> None:
    by_next(world)
    world.take(command(), signed=False)
    assert world.link.outcomes() == []
    told(world, SIGNER, NEXT)
    world.mailbox.welcomed()
    assert ("start", None) in world.link.events


def test_mail_that_waits_for_news_goes_with_the_connection(world: World) -> None:
    by_next(world)
    world.mailbox.link_down()
    world.link.fire()
    world.mailbox.welcomed()
    assert world.link.outcomes() == []
    assert ("ask", None) not in world.link.events


def test_a_key_that_has_ended_signs_nothing(world: World) -> None:
    ended = signing.jwks(SIGNER)
    (key,) = ended["keys"]
    known = trust.parse({"keys": [{**key, "exp": NOW // 1000}]})
    world.mailbox.trust(replace(world.identity, peering=replace(world.identity.peering, signing_keys=known)))
    world.take(command())
    assert [said.reason for said in world.link.outcomes()] == ["unsigned"]


def test_strangers_are_remembered_for_a_minute_and_not_without_end() -> None:
    strangers = pickup.Strangers()
    for number in range(pickup.MAX_STRANGERS + 1):
        strangers.add(str(number), 0.0)
    assert not strangers.has("0", 0.0)
    assert strangers.has("1", pickup.STRANGE_FOR - 1)
    assert not strangers.has("1", pickup.STRANGE_FOR)
