"""The revocation log: what is in it, and what becomes of it in a crash, or in bad hands."""

import fcntl
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric.errors import NotLogged
from fabric.identity import revocation_log, revoked
from fabric.identity.revocation_log import LogRefused, Mark, RevocationLog
from fabric.identity.revoked import DeviceState, KeyRevoked, NotUnderstood, Revoked, SubjectRevoked, TokenRevoked
from topology.names import DeviceId

PUMP = DeviceId("pump-17")
EACH: list[Revoked] = [
    DeviceState(1_790_000_000_000_000, PUMP, 2, 7, enabled=False),
    DeviceState(1, PUMP, 2, 8, deleted=True),
    KeyRevoked(2, PUMP, "kid", retired=True),
    TokenRevoked(3, "0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e"),
    SubjectRevoked(4, 'billing "é'),
]


@pytest.fixture
def log(tmp_path: Path) -> RevocationLog:
    made = RevocationLog(tmp_path / "apart" / "revocations.log")
    made.begin()
    return made


def lines(log: RevocationLog, after: Mark | None = None) -> list[bytes]:
    return [content for _, content in log.read(after or log.begin())]


@pytest.mark.parametrize("given", EACH, ids=lambda given: type(given).__name__)
def test_what_is_written_is_read_again(given: Revoked) -> None:
    assert revoked.decode(revoked.encode(given).encode()) == given


@pytest.mark.parametrize(
    "line",
    [
        "", "[]", "{}", '{"v":2,"kind":"token","at":1,"jti":"x"}', '{"v":1,"kind":"moon","at":1}', '{"v":1,"kind":[]}',
        '{"v":1,"kind":"token","at":1}', '{"v":1,"kind":"token","at":"1","jti":"x"}',
        '{"v":1,"kind":"token","at":true,"jti":"x"}', '{"v":1,"kind":"token","at":1,"jti":"x","more":1}',
    ],
)  # fmt: skip
def test_other_lines_are_not_understood(line: str) -> None:
    with pytest.raises(NotUnderstood):
        revoked.decode(line.encode())


def test_lines_are_read_behind_any_mark(log: RevocationLog) -> None:
    log.append(['{"a":1}', '{"a":2}'])
    log.append(['{"a":3}'])
    read = list(log.read(log.begin()))
    assert [json.loads(content)["a"] for _, content in read] == [1, 2, 3]
    assert lines(log, read[0][0]) == [b'{"a":2}', b'{"a":3}']
    assert lines(log, read[-1][0]) == []
    assert log.begin() == log.begin()


def test_nobody_else_can_read_it(log: RevocationLog) -> None:
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("torn", [1, 20, 40_000])
def test_a_torn_last_line_is_cut_off(log: RevocationLog, torn: int) -> None:
    log.append(['{"a":1}'])
    with log.path.open("ab") as file:
        file.write(b"{" + b"\0" * (torn - 1))
    assert lines(log) == [b'{"a":1}']
    with log.path.open("ab") as file:
        file.write(b"{" * torn)
    log.append(['{"a":2}'])
    assert lines(log) == [b'{"a":1}', b'{"a":2}']


def test_a_torn_beginning_is_made_anew(tmp_path: Path) -> None:
    log = RevocationLog(tmp_path / "revocations.log")
    log.path.write_bytes(b'{"v":1,"kind":"lo')
    assert lines(log, log.begin()) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_is_refused_wherever_the_mark_is(log: RevocationLog, number: int) -> None:
    log.append(['{"a":1}', '{"a":2}'])
    first, *_, last = log.begin(), *(mark for mark, _ in log.read(log.begin()))
    raw = log.path.read_bytes().splitlines(keepends=True)
    raw[number - 1] = raw[number - 1].replace(b"a" if number > 1 else b"log", b"b")
    log.path.write_bytes(b"".join(raw))
    for mark in (first, last):
        with pytest.raises(LogRefused, match=rf"Line {number} .* is damaged.*accept-revocation-log"):
            list(log.read(mark))


def test_a_log_that_lost_lines_is_refused(log: RevocationLog) -> None:
    before = log.path.read_bytes()
    log.append(['{"a":1}', '{"a":2}'])
    *_, (last, _) = log.read(log.begin())
    log.path.write_bytes(before)
    with pytest.raises(LogRefused, match="has lost lines"):
        list(log.read(last))
    raw = [*before.splitlines(keepends=True), before]
    log.path.write_bytes(b"".join(raw))
    with pytest.raises(LogRefused, match="has lost lines"):
        list(log.read(Mark(last.id, last.offset - 1)))


def test_another_log_or_none_is_refused(log: RevocationLog, tmp_path: Path) -> None:
    mark = log.begin()
    other = RevocationLog(tmp_path / "other.log")
    other.begin()
    with pytest.raises(LogRefused, match=r"not the one .*setting 'revocation_log'"):
        list(other.read(mark))
    log.path.unlink()
    with pytest.raises(LogRefused, match=r"is not there.*setting 'revocation_log'"):
        list(log.read(mark))
    with pytest.raises(NotLogged):
        log.append(["{}"])
    assert not log.path.exists()


def test_writers_at_once_leave_whole_lines(log: RevocationLog) -> None:
    each, many = 20, 8
    with ThreadPoolExecutor(many) as pool:  # each opens the file for itself, as processes do
        list(pool.map(lambda writer: [log.append([f'{{"a":"{writer}-{n}"}}']) for n in range(each)], range(many)))
    assert sorted(json.loads(line)["a"] for line in lines(log)) == sorted(
        f"{writer}-{n}" for writer in range(many) for n in range(each)
    )


def test_whoever_holds_the_lock_for_long_is_not_waited_for(log: RevocationLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation_log, "LOCK_FOR", 0.0)
    with log.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(NotLogged, match="locked"):
            log.append(["{}"])
    log.append(['{"a":1}'])
    assert lines(log) == [b'{"a":1}']
