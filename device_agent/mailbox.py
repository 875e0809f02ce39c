"""The mailbox's shell: does what `pickup` decides, in the order of COMMANDS.md, rule 1. On the I/O thread.

Mail waits here unacked until a slot is free; a slot is taken by a command that runs, or by one whose claim
is on its way (the grant is the pick-up, so no more is claimed than can start).
"""

import asyncio
import math
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from device_agent import errors, handlers, log, pickup
from device_agent.clock import FabricClock
from device_agent.context import Context
from device_agent.handlers import Done, Job
from device_agent.identity import Identity
from device_agent.journal import Interrupted, Journal
from device_agent.link import Link, Mail
from device_agent.reports import Reporter
from device_agent.runner import Runner
from topology import enrollment, guard, names, wire

CLAIM_AGAIN = 5.0  # seconds without an answer
ASK_EVERY = 1.0  # seconds between questions about key ids, whoever makes them up
FULL_AGAIN = 10.0  # seconds until a full or failing journal is tried again
PROGRESS_EVERY = 1.0  # seconds: the latest text is sent, the ones between are dropped


@dataclass(slots=True)
class _Waiting:
    mail: Mail
    command: wire.Command


@dataclass(slots=True)
class _InHand:
    """A command whose handler runs."""

    command: wire.Command
    until: float  # boot time in ms at which its response timeout ends
    ended: bool = False  # its outcome is said, and about to be journaled
    progress: str | None = None
    progress_timer: asyncio.TimerHandle | None = None


class Mailbox:
    """Takes mail, starts handlers, reports outcomes."""

    def __init__(
        self,
        *,
        identity: Identity,
        renew: Callable[[], Identity],
        link: Link,
        journal: Journal,
        clock: FabricClock,
        reporter: Reporter,
        ask: Callable[[], None],
        runner: Runner,
        sources: list[handlers.Source],
        slots: int,
    ) -> None:
        """`renew` reads the identity again, which may have changed since; it raises `errors.AgentError`. `ask` asks
        the fabric for news, until `welcomed` is called."""
        self._identity = identity
        self._renew = renew
        self._link = link
        self._journal = journal
        self._clock = clock
        self._reporter = reporter
        self._ask = ask
        self._runner = runner
        self._sources = sources
        self._slots = slots
        self._waiting: deque[_Waiting] = deque()  # bounded by the prefetch
        self._strange: list[_Waiting] = []  # signed by unknown keys, until there is news; bounded by the prefetch
        self._strangers = pickup.Strangers()
        self._asked = -math.inf  # boot time in ms
        self._claiming: dict[names.CommandId, _Waiting] = {}
        self._claims: dict[str, tuple[names.CommandId, ...]] = {}
        self._in_hand: dict[names.CommandId, _InHand] = {}
        self._denied = pickup.Denied()
        self._rerun: deque[Interrupted] = deque()
        self._recovered = False
        self._paused = False
        self._stopping = False

    @property
    def in_hand(self) -> int:
        return len(self._in_hand)

    @property
    def longest_remaining(self) -> float:
        """Seconds until the response timeout of the last command in hand ends; 0 if there is none."""
        return max((max(held.until - self._clock.boot(), 0) / 1000 for held in self._in_hand.values()), default=0.0)

    def welcomed(self) -> None:
        """The fabric's time is known: fetch (again)."""
        if self._stopping:
            return
        if not self._recovered:
            self._recovered = True
            self._recover()
        self._link.open_mailbox(prefetch=self._slots + 2)
        self._look_again()
        self._pump()

    def trust(self, identity: Identity) -> None:
        """The keys that sign commands are others now."""
        self._identity = identity

    def link_up(self) -> None:
        for held in (held for held in self._in_hand.values() if not held.ended):
            self._receipt(held.command.id, held.progress)

    def link_down(self) -> None:
        # The broker has requeued all of it; it comes again, marked as redelivered.
        self._waiting.clear()
        self._strange.clear()
        self._claiming.clear()
        self._claims.clear()

    def stop_fetching(self) -> None:
        self._stopping = True
        self._link.close_mailbox()
        self.link_down()
        self._rerun.clear()

    def take(self, mail: Mail) -> None:
        """Mail has arrived. What is no signed command of this contract is answered and acked at once."""
        message = mail.message
        if self._stopping:
            return
        if message.type in ("command", guard.UNDECODABLE) or message.type is None:
            try:
                command = wire.decode_command(message)
            except wire.Malformed as error:
                self._junk(mail, error)
                return
            if self._verified(command):
                self._waiting.append(_Waiting(mail, command))
                self._pump()
            elif self._may_be_new(command.sig_kid):
                self._put_by(_Waiting(mail, command))
            else:
                self._unsigned(mail, command)
        else:
            log.info("mail.other", type=message.type, id=message.message_id, subject=message.headers.get("subject"))
            self._link.ack(mail)

    def _verified(self, command: wire.Command) -> bool:
        if self._identity.verify(command, self._now()):
            return True
        if command.generation <= self._identity.peering.generation:
            return False
        # It may be that this device was revoked and enrolled again, with the key it has, while this agent ran.
        try:
            renewed = self._renew()
        except errors.AgentError as error:
            log.warning("identity.unreadable", because=str(error))
            return False
        if renewed.device != self._identity.device or not renewed.verify(command, self._now()):
            return False
        log.info("identity.renewed", generation=renewed.peering.generation)
        self._identity = renewed
        return True

    def _may_be_new(self, kid: str) -> bool:
        """Is this the id of a key that the fabric may have begun to sign with, for all we know?"""
        known = kid in self._identity.peering.signing_keys.keys
        return not known and enrollment.is_thumbprint(kid) and not self._strangers.has(kid, self._clock.boot())

    def _put_by(self, waiting: _Waiting) -> None:
        self._strange.append(waiting)
        if len(self._strange) == 1:
            due = self._asked + ASK_EVERY * 1000 - self._clock.boot()
            self._link.later(max(due, 0.0) / 1000, self._ask_about)

    def _ask_about(self) -> None:
        if self._strange:
            self._asked = self._clock.boot()
            self._ask()

    def _look_again(self) -> None:
        """Judge what was put by, after the news that there is."""
        strange, self._strange = self._strange, []
        for waiting in strange:
            if self._verified(waiting.command):
                self._waiting.append(waiting)
            else:
                self._strangers.add(waiting.command.sig_kid, self._clock.boot())
                self._unsigned(waiting.mail, waiting.command)

    def claim_answered(self, message: wire.Message) -> None:
        """Raises `wire.Malformed`."""
        answer = wire.decode_claim_answer(message)
        asked = self._claims.pop(answer.correlation, None)
        if asked is None:
            log.debug("claim.stray-answer")
            return
        with _Faults(self):
            for command in asked:
                waiting = self._claiming.get(command)
                if waiting is None:
                    continue
                if command in answer.granted:
                    del self._claiming[command]
                    self._pick_up(waiting, granted=True)
                elif command in answer.refused:
                    del self._claiming[command]
                    self._refused(waiting, answer.refused[command])
        self._pump()

    def _pump(self) -> None:
        """Use the free slots."""
        if self._paused or self._stopping or not self._clock.known:
            return
        with _Faults(self):
            while self._rerun and self._free() > 0:
                self._run_again(self._rerun.popleft())
            claims: list[names.CommandId] = []
            while self._waiting and self._free() > 0:
                if not self._journal.room(self._now()):
                    self._pause("the journal is full of commands that are not reported or not past their time")
                    break
                waiting = self._waiting.popleft()
                if waiting.command.id in self._claiming:
                    self._link.ack(waiting.mail)  # a second copy; the first one, still unacked, stands for both
                elif self._pick_up(waiting, granted=False):
                    claims.append(waiting.command.id)
            for start in range(0, len(claims), wire.MAX_CLAIMS):
                self._claim(tuple(claims[start : start + wire.MAX_CLAIMS]))

    def _free(self) -> int:
        return self._slots - len(self._in_hand) - len(self._claiming)

    def _pick_up(self, waiting: _Waiting, *, granted: bool) -> bool:
        """Do what is decided for this mail; True if it has to be claimed first."""
        command, mail = waiting.command, waiting.mail
        entry = self._journal.find(command.id)
        job, problem = self._bind(command) if entry is None else (None, None)
        now = self._now()
        decision = pickup.decide(
            command,
            redelivered=mail.redelivered,
            entry=entry,
            problem=problem,
            denied=self._denied.said(command.id),
            doubtful=self._denied.forgot(now),
            granted=granted,
            now=now,
        )
        match decision:
            case pickup.Run() if job is not None:
                self._journal.start(command, now, keep_request=job.idempotent)
                self._start(command, job, mail)
            case pickup.Claim():
                self._claiming[command.id] = waiting
                return True
            case pickup.Answer(reason):
                self._reject(waiting, reason)
            case pickup.Duplicate():
                self._link.ack(mail)
                log.debug("mail.duplicate", command=command.id, attempt=command.attempt)
                word = self._journal.word(command.id)
                if word is not None:
                    self._reporter.kept(word)
        return False

    def _start(self, command: wire.Command, job: Job, mail: Mail | None) -> None:
        """Ack, receipt, handler, for what is in the journal; there is no mail of a command that runs again."""
        self._in_hand[command.id] = _InHand(command, self._clock.boot() + command.response_timeout)
        with self._link.together():
            if mail is not None:
                self._link.ack(mail)
            self._receipt(command.id, None)
        log.info("command.started", command=command.id, name=command.name, issuer=command.issuer)
        context = Context(
            self._identity.device, command, lambda text: self._link.call(self._progress, command.id, str(text))
        )
        self._runner.submit(job, context, lambda done: self._link.call(self._ended, command.id, done))

    def _ended(self, command: names.CommandId, done: Done) -> None:
        """Say the outcome, then keep it: the caller need not wait for the disk.

        A crash in between leaves the entry open, as one just before would have; the fabric may know more by then.
        """
        held = self._in_hand[command]
        held.ended = True
        if held.progress_timer is not None:
            held.progress_timer.cancel()
        outcome = self._outcome(command, done.status, done.reason, done.body, done.content_type)
        log.info("command.ended", command=command, name=held.command.name, status=done.status, reason=done.reason)
        self._reporter.early(outcome)
        # Two turns of the loop: in the first one the socket is written.
        self._link.soon(self._link.soon, self._keep, outcome)

    def _keep(self, outcome: wire.Outcome) -> None:
        del self._in_hand[outcome.command]
        try:
            self._journal.finish(outcome)
        except errors.JournalRefused as error:
            # It can't be kept, but it has been said, or is kept in memory until it can be.
            log.error("journal.failed", command=outcome.command, because=str(error))
            self._reporter.unkept(outcome)
            self._pause("the journal can't be written")
        else:
            self._reporter.kept(outcome)
        self._pump()

    def _refused(self, waiting: _Waiting, reason: str) -> None:
        meaning = pickup.refused(reason)
        if isinstance(meaning, pickup.Answer):
            self._reject(waiting, meaning.reason)
            return
        self._journal.refuse(waiting.command, self._now())
        self._link.ack(waiting.mail)
        if meaning.conflict:
            log.error(
                "identity.conflict",
                command=waiting.command.id,
                because="another agent with this device's key holds the command: a clone, or a journal was lost",
            )
        else:
            log.info("claim.refused", command=waiting.command.id, name=waiting.command.name, reason=reason)

    def _reject(self, waiting: _Waiting, reason: str) -> None:
        outcome = self._outcome(waiting.command.id, "rejected", handlers.cap(reason))
        self._journal.reject(waiting.command, outcome)
        self._link.ack(waiting.mail)
        log.info("command.rejected", command=waiting.command.id, name=waiting.command.name, reason=reason)
        self._reporter.kept(outcome)

    def _junk(self, mail: Mail, error: wire.Malformed) -> None:
        answer = pickup.junk(mail.message.message_id, error)
        log.warning("mail.junk", id=mail.message.message_id, because=str(error))
        self._answer_unverified(mail, answer[0] if answer else None, f"{answer[1]}: {error}" if answer else "")

    def _unsigned(self, mail: Mail, command: wire.Command) -> None:
        log.warning("mail.unsigned", command=command.id, name=command.name, kid=command.sig_kid)
        self._answer_unverified(mail, command.id, pickup.UNSIGNED)

    def _answer_unverified(self, mail: Mail, command: names.CommandId | None, reason: str) -> None:
        """Not journaled: whoever can put mail here must not be able to fill the journal."""
        with _Faults(self):
            if command is not None:
                decision = pickup.unverified(
                    handlers.cap(reason),
                    held=self._holds(command),
                    entry=self._journal.find(command),
                    denied=self._denied.said(command),
                )
                if isinstance(decision, pickup.Answer):
                    self._denied.add(command, decision.reason, self._now())
                    self._reporter.passing(self._outcome(command, "rejected", decision.reason))
            self._link.ack(mail)

    def _holds(self, command: names.CommandId) -> bool:
        return (
            command in self._in_hand
            or command in self._claiming
            or any(command == waiting.command.id for waiting in (*self._waiting, *self._strange))
        )

    def _claim(self, commands: tuple[names.CommandId, ...]) -> None:
        correlation = secrets.token_hex(8)
        device = self._identity.device
        claim = wire.Claim(correlation, self._journal.agent, commands, self._now())
        self._claims[correlation] = commands
        self._link.publish(names.claim_key(device), wire.encode_claim(claim, device), None)
        log.debug("claim.asked", commands=len(commands))
        self._link.later(CLAIM_AGAIN, self._claim_again, correlation)

    def _claim_again(self, correlation: str) -> None:
        """No answer: what is past its time is said to be, the rest is asked about again."""
        commands = self._claims.pop(correlation, None)
        if commands is None:
            return
        log.debug("claim.unanswered", commands=len(commands))
        with _Faults(self):
            for command in commands:
                waiting = self._claiming.pop(command, None)
                if waiting is not None and self._pick_up(waiting, granted=False):
                    continue
            still = tuple(command for command in commands if command in self._claiming)
            if still:
                self._claim(still)
        self._pump()

    def _recover(self) -> None:
        """Settle what a crash left behind: run again, fail, or say no more than that it started.

        The receipt may not have left before the crash, and without it the fabric would announce `expired`, which
        says that the handler never started.
        """
        doubtful: list[names.CommandId] = []
        for entry in self._journal.interrupted():
            match pickup.after_crash(entry, now=self._now()):
                case pickup.Run():
                    self._rerun.append(entry)
                case pickup.Fail(reason):
                    self._fail_interrupted(entry, reason)
                case pickup.Doubt():
                    doubtful.append(entry.command)
                    log.warning("command.in-doubt", command=entry.command, name=entry.name)
        if doubtful:
            self._journal.doubt(doubtful)
            self._reporter.again()

    def _run_again(self, entry: Interrupted) -> None:
        decision = pickup.after_crash(entry, now=self._now())  # it may have waited for a slot
        if not isinstance(decision, pickup.Run) or entry.request is None:
            self._fail_interrupted(entry, pickup.INTERRUPTED)
            return
        job, problem = self._bind(entry.request)
        if job is None:
            self._fail_interrupted(entry, f"{pickup.INTERRUPTED}: {problem}")
            return
        self._journal.rerun(entry.command)
        log.warning("command.again", command=entry.command, name=entry.name, rerun=entry.reruns + 1)
        self._start(entry.request, job, None)

    def _fail_interrupted(self, entry: Interrupted, reason: str) -> None:
        outcome = self._outcome(entry.command, "failed", handlers.cap(reason))
        self._journal.finish(outcome)
        log.warning("command.interrupted", command=entry.command, name=entry.name)
        self._reporter.kept(outcome)

    def _bind(self, command: wire.Command) -> tuple[Job | None, str | None]:
        try:
            return handlers.bind(self._sources, command), None
        except handlers.CannotTake as error:
            return None, str(error)

    def _receipt(self, command: names.CommandId, progress: str | None) -> None:
        self._reporter.receipt(wire.Receipt(command, self._journal.agent, "running", self._now(), progress))

    def _progress(self, command: names.CommandId, text: str) -> None:
        held = self._in_hand.get(command)
        if held is None or held.ended:
            return
        held.progress = text[: wire.MAX_REASON]
        if held.progress_timer is None:
            self._receipt(command, held.progress)
            held.progress_timer = self._link.later(PROGRESS_EVERY, self._progress_due, command, held.progress)

    def _progress_due(self, command: names.CommandId, sent: str) -> None:
        held = self._in_hand.get(command)
        if held is not None and not held.ended:
            held.progress_timer = None
            if held.progress is not None and held.progress != sent:
                self._progress(command, held.progress)

    def _outcome(
        self,
        command: names.CommandId,
        status: wire.OutcomeStatus,
        reason: str | None,
        body: bytes = b"",
        content_type: str = wire.JSON,
    ) -> wire.Outcome:
        return wire.Outcome(command, self._journal.agent, status, reason, body, content_type, self._now())

    def _now(self) -> int:
        return self._clock.now_or(0)

    def _pause(self, reason: str) -> None:
        if not self._paused:
            self._paused = True
            log.error("mailbox.paused", because=reason, retry_in=FULL_AGAIN)
            self._link.later(FULL_AGAIN, self._resume)

    def _resume(self) -> None:
        self._paused = False
        self._pump()

    def journal_failed(self, error: errors.JournalRefused) -> None:
        """Nothing was acked that is not journaled: give the mail back and try later."""
        log.error("journal.failed", because=str(error))
        self._pause("the journal can't be written")
        self._link.reset("mail goes back, as it can't be journaled")


class _Faults:
    """A journal that fails stops the fetching; it never stops the agent."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, errors.JournalRefused):
            self._mailbox.journal_failed(error)
            return True
        return False
