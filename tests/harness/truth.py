"""What must hold of every command, whatever was killed: the ledger's word against the handlers' own record."""

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import pairwise

from fabric.command import ANSWERED, SETTLED, TABLE, State
from tests.harness.fleet import Run
from tests.harness.stack import Document

# States in which no handler has run.
NEVER_RAN = {"expired", "undeliverable", "cancelled", "rejected"}
LATER = {(state.value, cell.to.value) for (state, _), cell in TABLE.items() if cell.late and cell.to is not None}
FRESH = 2.0  # seconds: what the agent starts without a claim may race a cancel
CLOCKS = 0.05  # seconds by which the device's clock and the fabric's may be read differently
START = 3.0  # seconds from the check of `not-after` to the handler's own first word, on a machine that is busy


def check_truth(commands: Iterable[Document], starts: Mapping[str, int]) -> None:
    """One terminal state each (a late one counted apart), no handler started twice, and the ledger equals the
    record; `starts` counts a command's handler's starts by its id."""
    for command in commands:
        story = str(command)
        state, started = command["state"], starts.get(command["id"], 0)
        assert started <= 1, f"run twice: {story}"
        settled = settled_states(command)
        assert settled, story
        assert settled[-1] == state, story
        assert set(pairwise(settled)) <= LATER, story
        assert command["late"] is (len(settled) > 1), story
        if state in ("succeeded", "failed"):
            assert started == 1, f"not in the devices' record: {story}"
        elif state in NEVER_RAN:
            assert started == 0, f"it ran: {story}"
        else:
            assert state == "unanswered", story


def check_runs(commands: Iterable[Document], runs: Iterable[Run]) -> None:
    """`check_truth` with times: no handler started past its deadline, nor after its command was announced
    cancelled or expired. Only fresh, unclaimed mail may cross the announcement on its way, and the ledger then
    says so (late)."""
    found = {command["id"]: command for command in commands}
    ours = [run for run in runs if run.command in found]
    check_truth(found.values(), Counter(run.command for run in ours))
    ended = {run.command for run in ours if run.ended}
    for run in ours:
        command = found[run.command]
        story = f"{run}: {command}"
        assert run.at < seconds(command["deadline"]) + START, f"run past its deadline: {story}"
        announced = [seconds(row["at"]) for row in command["timeline"] if row["state"] in ("cancelled", "expired")]
        if announced and run.at > announced[0] + CLOCKS:
            assert command["late"], story
            assert not command["claim"], f"a claimed one started after it was announced: {story}"
            assert run.at - seconds(command["accepted_at"]) < FRESH + START, f"a stale one, too: {story}"
    for command in found.values():
        assert command["state"] != "succeeded" or command["id"] in ended, str(command)


def settled_states(command: Document) -> list[str]:
    """The terminal states it went through, in order."""
    settled = {state.value for state in SETTLED}
    told: list[str] = []  # later evidence, such as the dead letter of what has expired, repeats the state
    for row in command["timeline"]:
        if row["state"] in settled and told[-1:] != [row["state"]]:
            told.append(row["state"])
    return told


def is_answered(command: Document) -> bool:
    return State(command["state"]) in ANSWERED


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
