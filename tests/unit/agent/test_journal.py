"""The journal: nothing that was picked up is forgotten, and damage is never papered over."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from device_agent import errors, journal
from device_agent.journal import Journal, State, open_journal
from topology import names, wire

NOW = 1_800_000_000_000


def command(number: int = 1, **changed: object) -> wire.Command:
    made = wire.Command(
        id=names.CommandId(f"0199c0de-0000-7000-8000-{number:012x}"),
        name="door.close",
        body=b'{"speed":1}',
        content_type=wire.JSON,
        not_after=NOW + 60_000,
        response_timeout=30_000,
        issuer="billing",
        seq=number,
        attempt=1,
        claim=False,
        generation=1,
        sig="sig",
        sig_kid="kid",
        at=NOW,
    )
    return replace(made, **changed)  # type: ignore[arg-type]  # the call checks them


def outcome(number: int = 1, body: bytes = b"1") -> wire.Outcome:
    return wire.Outcome(command(number).id, "agent-agent", "succeeded", None, body, wire.JSON, NOW + number)


def state(kept: Journal, number: int = 1) -> State | None:
    entry = kept.find(command(number).id)
    return entry.state if entry else None


def test_the_agent_id_is_made_once(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    first.close()
    again = open_journal(tmp_path)
    assert again.agent == first.agent
    assert len(first.agent) >= 16
    assert (tmp_path / "journal.db").stat().st_mode & 0o777 == 0o600


def test_a_copy_has_an_agent_id_of_its_own_and_the_same_entries(tmp_path: Path) -> None:
    made = open_journal(tmp_path)
    made.start(command(), NOW, keep_request=False)
    made.close()
    (tmp_path / "copy").mkdir()
    shutil.copy2(tmp_path / "journal.db", tmp_path / "copy")
    copy = open_journal(tmp_path / "copy")
    assert copy.agent != made.agent
    assert state(copy) is State.STARTED
    copy.close()
    again, original = open_journal(tmp_path / "copy"), open_journal(tmp_path)
    assert (again.agent, original.agent) == (copy.agent, made.agent)


def test_the_way_of_a_command(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    assert state(kept) is None
    kept.start(command(), NOW, keep_request=False)
    assert state(kept) == State.STARTED
    kept.finish(outcome())
    assert state(kept) == State.DONE
    assert [one.command for one in kept.unreported(10)] == [command().id]
    kept.reported(command().id)
    assert kept.unreported(10) == []
    kept.flush()
    assert state(kept) == State.REPORTED
    assert kept.word(command().id) == replace(outcome(), agent=kept.agent)


def test_a_command_is_never_started_twice(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    kept.start(command(), NOW, keep_request=False)
    with pytest.raises(errors.JournalRefused):
        kept.start(command(), NOW, keep_request=False)


def test_confirmed_reports_travel_with_the_next_write_but_a_pick_up(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    kept.start(command(1), NOW, keep_request=False)
    kept.finish(outcome(1))
    kept.reported(command(1).id)
    kept.start(command(2), NOW, keep_request=False)
    assert state(kept) == State.DONE
    assert kept.has_lazy_marks
    kept.finish(outcome(2))
    assert state(kept) == State.REPORTED
    assert not kept.has_lazy_marks


def test_a_failed_write_forgets_no_mark(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    kept.start(command(1), NOW, keep_request=False)
    kept.finish(outcome(1))
    kept.reported(command(1).id)
    with pytest.raises(errors.JournalRefused):
        kept.start(command(1), NOW, keep_request=False)
    with pytest.raises(errors.JournalRefused):
        kept.reject(command(1), outcome(1))
    assert state(kept) == State.DONE
    kept.flush()
    assert state(kept) == State.REPORTED


def test_interrupted_commands_come_back_with_their_request_only_if_it_was_kept(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    kept.start(command(1), NOW, keep_request=True)
    kept.start(command(2), NOW + 1, keep_request=False)
    kept.rerun(command(1).id)
    kept.close()
    first, second = open_journal(tmp_path).interrupted()
    assert (first.request, first.reruns) == (command(1), 1)
    assert (second.request, second.reruns) == (None, 0)


def test_another_incarnation_makes_all_that_was_told_unreported(tmp_path: Path) -> None:
    kept = open_journal(tmp_path)
    assert kept.incarnation() is None
    for number in range(1, 4):
        kept.start(command(number), NOW, keep_request=False)
        if number == 3:
            kept.doubt([command(number).id])
        else:
            kept.finish(outcome(number))
        kept.reported(command(number).id)
    kept.flush()
    assert [state(kept, number) for number in range(1, 4)] == [State.REPORTED, State.REPORTED, State.TOLD]
    assert not kept.unreported(10)
    kept.meet("second")
    *ended, in_doubt = kept.unreported(10)
    assert in_doubt == wire.Receipt(command(3).id, kept.agent, "running", NOW)
    assert ended == [replace(outcome(number), agent=kept.agent) for number in (2, 1)]
    assert kept.incarnation() == "second"


def test_only_what_is_reported_and_past_its_time_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRIES", 4)
    kept = open_journal(tmp_path)
    for number, way in enumerate(("open", "unreported", "reported", "reported but young"), start=1):
        young = NOW + 10**9 if way.endswith("young") else NOW
        kept.start(command(number, not_after=young), NOW, keep_request=False)
        if way != "open":
            kept.finish(outcome(number))
        if way.startswith("reported"):
            kept.reported(command(number).id)
    assert not kept.room(NOW + journal.EVICT_MARGIN)
    assert kept.room(NOW + journal.EVICT_MARGIN + 1)
    assert [state(kept, number) for number in range(1, 5)] == [State.STARTED, State.DONE, None, State.REPORTED]


def test_refused_entries_make_room_too_and_doubtful_ones_once_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRIES", 1)
    for number in (1, 2):
        kept = open_journal(tmp_path)
        if number == 1:
            kept.refuse(command(number), NOW)
        else:
            kept.start(command(number), NOW, keep_request=False)
            kept.doubt([command(number).id])
            assert not kept.room(NOW + 10**9), "the fabric has not been told"
            kept.reported(command(number).id)
        assert not kept.room(NOW)
        assert kept.room(NOW + 10**9)
        kept.close()


def test_the_bytes_of_outcomes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_OUTCOME_BYTES", 100)
    kept = open_journal(tmp_path)
    kept.start(command(), NOW, keep_request=False)
    assert kept.room(NOW)
    kept.finish(outcome(body=bytes(100)))
    assert not kept.room(NOW + 10**9)


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "foreign"])
def test_damage_is_a_refusal_and_never_a_new_journal(tmp_path: Path, damage: str) -> None:
    kept = open_journal(tmp_path)
    for number in range(200):
        kept.start(command(number), NOW, keep_request=True)
    kept.close()
    path = tmp_path / "journal.db"
    content = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(os.urandom(len(content)))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
        sqlite3.connect(path).execute("CREATE TABLE something (id)").connection.close()
    before = path.read_bytes()
    with pytest.raises(errors.JournalRefused, match=r"journal\.db"):
        open_journal(tmp_path)
    assert path.read_bytes() == before


def test_an_interrupted_creation_leaves_no_journal(tmp_path: Path) -> None:
    (tmp_path / ".journal.db.new").write_bytes(b"half")
    assert open_journal(tmp_path).agent


_WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from test_journal import NOW, command, outcome
from device_agent.journal import open_journal
kept = open_journal(Path(sys.argv[1]))
for number in range(100_000):
    kept.start(command(number), NOW, keep_request=False)
    print("started", number, flush=True)
    kept.finish(outcome(number))
    print("done", number, flush=True)
"""


def test_whatever_was_said_to_be_written_survives_kill_9(tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path), str(here.parent), str(here.parents[3])], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    lines = [writer.stdout.readline().split() for _ in range(301)]
    writer.send_signal(signal.SIGKILL)
    lines += [line.split() for line in writer.stdout if line.endswith(b"\n")]
    writer.wait()
    writer.stdout.close()
    kept = open_journal(tmp_path)
    for what, number in lines:
        found = state(kept, int(number))
        assert found == State.DONE if what == b"done" else found in (State.STARTED, State.DONE)
