"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest

from docs import diagrams
from fabric.command import ANSWERED, SETTLED, TABLE, Cell, Input, State, Verdict
from topology import names, wire

ROOT = Path(__file__).parents[2]
STATES = (ROOT / "docs" / "states.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
COLUMNS = (
    "accepted", "queued", "delivered", "running", "D", "expired", "cancelled", "undeliverable", "unanswered",
)  # fmt: skip


def test_the_states_page_is_the_one_that_the_table_makes() -> None:
    assert diagrams.render() == STATES, "docs/states.md is not of this table; run `make docs`"


def test_the_table_has_the_contracts_columns_and_a_row_for_each_input() -> None:
    header, rule, *rows = _table_after("## The table")
    assert header == ["input", *COLUMNS]
    assert set(rule) == {"---"}
    assert [row[0] for row in rows] == [given.value for given in Input]
    assert {len(row) for row in rows} == {len(header)}


def test_each_cell_says_what_the_table_does() -> None:
    header, _, *rows = _table_after("## The table")
    for label, *cells in rows:
        for column, text in zip(header[1:], cells, strict=True):
            for state in ANSWERED if column == "D" else [State(column)]:
                assert _read(text) == TABLE[state, Input(label)], (column, label)


def test_the_diagrams_draw_each_transition_once_and_mark_the_late_ones() -> None:
    in_time, late = re.findall(r"```mermaid\n(.*?)```", STATES, re.DOTALL)
    expected = {
        (state, "D" if cell.to in ANSWERED else cell.to.value, cell.late)
        for (state, _), cell in TABLE.items()
        if cell.to is not None and cell.to is not state
    }
    drawn = [(*edge, False) for edge in _edges(in_time)] + [(*edge, True) for edge in _edges(late)]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == expected
    assert all(": late, " in line for line in late.splitlines() if "-->" in line)
    assert {State(state) for state, _, is_late in drawn if is_late} <= SETTLED


ID = names.CommandId("0199f3a0-5d3e-7c21-8f6e-0b8a4f5d6c7e")
DEVICE = names.DeviceId("garage-7")
AGENT = "agent-one"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MESSAGES = [
    wire.encode_command(
        wire.Command(
            ID, "door.close", b"{}", wire.JSON, 2, 1, "billing", 1, 1, False, 1, "sig", "kid", at=1, traceparent=TRACE
        ),
        now=1,
    ),
    wire.encode_claim_answer(wire.ClaimAnswer("c-1", (ID,), {}, time=1)),
    wire.encode_welcome(wire.Welcome("c-1", 1, "incarnation", wire.VERSION)),
    wire.encode_receipt(wire.Receipt(ID, AGENT, "running", 1, progress="half"), DEVICE),
    wire.encode_outcome(wire.Outcome(ID, AGENT, "failed", "jammed", b"", wire.JSON, 1), DEVICE),
    wire.encode_claim(wire.Claim("c-1", AGENT, (ID,), 1), DEVICE),
    wire.encode_hello(wire.Hello("c-1", AGENT, "1.0", 1), DEVICE),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_the_message_tables_have_what_is_on_the_wire(message: wire.Message) -> None:
    told = _told_of(str(message.type))
    for header in message.headers.keys() - {"v", "at"}:
        assert f"`{header}`" in told
    assert f"`type` = `{message.type}`" in told
    for name in ("message_id", "correlation_id", "reply_to", "content_type"):
        assert (f"`{name}`" in told) == (getattr(message, name) is not None), name
    assert ("`expiration`" in told) == (message.expiration_ms is not None)
    assert ("persistent" in told) == message.persistent


def test_the_page_of_commands_has_each_state() -> None:
    told = COMMANDS.partition("## The states")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (✓?) ?\|$", told, re.MULTILINE)
    assert rows[: len(State)] == [(state.value, "✓" if state in SETTLED else "") for state in State]


def _told_of(kind: str) -> str:
    """What the page says of a message: its table, or its row in the table of what devices say."""
    row = re.search(rf"^\| \*\*{kind}\*\* \|.*$", COMMANDS, re.MULTILINE)
    if row is not None:
        return row[0]
    return re.split(r"\n\*\*|\n#", COMMANDS.partition(f"\n**{kind}**, to")[2])[0]


def _table_after(heading: str) -> list[list[str]]:
    lines = STATES.partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _read(text: str) -> Cell:
    """The cell that is written so."""
    if text == Verdict.ILLEGAL.value:
        return Cell(verdict=Verdict.ILLEGAL)
    if text.startswith("·"):
        return Cell(verdict=Verdict(text.removeprefix("· ")))
    moved, _, verdict = text.partition(", ")
    state, _, late = moved.partition(" ")
    return Cell(State(state), Verdict(verdict) if verdict else Verdict.NONE, late == "L")


def _edges(diagram: str) -> list[tuple[str, str]]:
    """From state to node; an edge of a group is one of each of its members."""
    members: dict[str, list[str]] = {}
    for group, body in re.findall(r"as (group\d+) \{\n(.*?)\n    \}", diagram, re.DOTALL):
        members[group] = [line.strip() for line in body.splitlines() if "-->" not in line]
    edges = []
    for start, end in re.findall(r"^ +(\w+) --> (\w+) :", diagram, re.MULTILINE):
        edges += [(each, end) for each in members.get(start, [start])]
    return edges
