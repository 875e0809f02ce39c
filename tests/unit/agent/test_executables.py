"""Executables as handlers: what is refused, and what becomes of exit status and output."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_agent import Context, errors
from device_agent.executables import Executables
from device_agent.handlers import CannotTake
from topology import names, wire

COMMAND = wire.Command(
    id=names.CommandId("0199c0de-0000-7000-8000-000000000001"),
    name="light.on",
    body=b'{"minutes": 5}',
    content_type=wire.JSON,
    not_after=2**50,
    response_timeout=5_000,
    issuer="billing",
    seq=1,
    attempt=1,
    claim=False,
    generation=1,
    sig="",
    sig_kid="",
    at=0,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "commands.d"
    made.mkdir(mode=0o755)
    return made


def script(directory: Path, text: str, name: str = "light.on", mode: int = 0o755) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def run(directory: Path, **changed: Any) -> Any:
    command = replace(COMMAND, **changed)
    job = Executables(directory).bind(command)
    assert job is not None
    return job.run(Context(names.DeviceId("garage-7"), command, lambda _: None))


def test_stdin_is_the_arguments_and_stdout_the_result(directory: Path) -> None:
    script(directory, "cat")
    done = run(directory)
    assert (done.status, done.content_type, json.loads(done.body)) == ("succeeded", wire.JSON, {"minutes": 5})


@pytest.mark.parametrize(
    ("output", "body", "kind"),
    [
        ("true", b"null", "application/json"),
        ("echo hello", b"hello\n", "text/plain; charset=utf-8"),
        (r"printf '\377'", b"\xff", "application/octet-stream"),
    ],
)
def test_output_is_json_if_it_parses_else_text_else_bytes(directory: Path, output: str, body: bytes, kind: str) -> None:
    script(directory, output)
    done = run(directory)
    assert (done.status, done.body, done.content_type) == ("succeeded", body, kind)
    assert wire.is_content_type(kind)


def test_another_exit_status_fails_with_the_end_of_stderr(directory: Path) -> None:
    script(directory, "head -c 100000 /dev/zero | tr '\\0' x >&2; echo the reason >&2; exit 3")
    done = run(directory)
    assert done.status == "failed"
    assert done.reason.startswith("exit status 3: ")
    assert done.reason.endswith("the reason")
    assert len(done.reason) <= wire.MAX_REASON


def test_a_signal_fails_by_name(directory: Path) -> None:
    script(directory, "kill -TERM $$")
    assert run(directory).reason == "ended by SIGTERM"


def test_the_whole_group_is_killed_when_the_time_is_up(directory: Path, tmp_path: Path) -> None:
    marker = tmp_path / "child"
    script(directory, f"sh -c 'echo $$ > {marker}; exec sleep 60' & echo started; wait")
    began = time.monotonic()
    done = run(directory, response_timeout=500)
    assert done.status == "failed"
    assert "did not end within its 0.5 s" in done.reason
    assert time.monotonic() - began < 5
    child = int(marker.read_text())
    until = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < until


def test_a_child_left_behind_does_not_hold_the_outcome_up(directory: Path) -> None:
    script(directory, "sleep 30 & echo '{}'")
    began = time.monotonic()
    assert run(directory).body == b"{}"
    assert time.monotonic() - began < 10


def test_output_is_bounded(directory: Path) -> None:
    script(directory, "exec cat /dev/zero")
    done = run(directory)
    assert done.status == "failed"
    assert "more than 262144 bytes" in done.reason


def test_input_that_is_not_read_is_no_error(directory: Path) -> None:
    script(directory, "exec <&-; echo 1")
    assert run(directory, body=b"x" * wire.MAX_BODY).body == b"1"


def test_the_environment_is_minimal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTANTE_TICKET", "secret")
    script(directory, "env")
    found = dict(line.split("=", 1) for line in run(directory).body.decode().splitlines())
    assert found.keys() - {"PWD", "SHLVL", "_", "OLDPWD"} == {
        "PATH", "LANG", "RESTANTE_COMMAND", "RESTANTE_COMMAND_ID", "RESTANTE_DEVICE", "RESTANTE_CONTENT_TYPE",
    }  # fmt: skip
    assert found["RESTANTE_COMMAND"] == "light.on"
    assert found["RESTANTE_DEVICE"] == "garage-7"


def test_the_trace_goes_on_in_the_environment(directory: Path) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    script(directory, 'printf "%s" "$TRACEPARENT"')
    assert run(directory, traceparent=trace).body == trace.encode()


def test_arguments_never_reach_the_command_line(directory: Path) -> None:
    script(directory, 'printf "%s" "$#"')
    assert run(directory).body == b"0"


def test_no_file_is_no_handler(directory: Path) -> None:
    assert Executables(directory).bind(COMMAND) is None


@pytest.mark.parametrize("name", ["../light.on", "Light.on", "light.on/", "light on", ".", "..", "light.on\n"])
def test_names_outside_the_grammar_are_no_files(directory: Path, name: str) -> None:
    script(directory, "true")
    assert Executables(directory).bind(replace(COMMAND, name=name)) is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o644])
def test_a_file_others_may_write_or_nobody_execute_is_refused(directory: Path, mode: int) -> None:
    script(directory, "true", mode=mode)
    with pytest.raises(CannotTake, match="unknown-command: its handler is refused"):
        Executables(directory).bind(COMMAND)


def test_links_and_directories_are_refused(directory: Path, tmp_path: Path) -> None:
    (directory / "light.on").symlink_to(script(tmp_path, "true", "elsewhere"))
    (directory / "light.off").mkdir()
    handlers = Executables(directory)
    for name in ("light.on", "light.off"):
        with pytest.raises(CannotTake, match="plain file"):
            handlers.bind(replace(COMMAND, name=name))
    assert handlers.commands == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(directory: Path) -> None:
    os.chown(script(directory, "true"), 12345, 12345)
    with pytest.raises(CannotTake, match="another user"):
        Executables(directory).bind(COMMAND)


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_directory_others_may_write_stops_the_start_and_each_command(directory: Path, mode: int) -> None:
    script(directory, "true")
    handlers = Executables(directory)
    directory.chmod(mode)
    with pytest.raises(CannotTake, match="writable by group or others"):
        handlers.bind(COMMAND)
    with pytest.raises(errors.BadHandler, match="writable by group or others"):
        Executables(directory)


def test_a_linked_or_missing_directory_stops_the_start(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    for path in (link, tmp_path / "missing"):
        with pytest.raises(errors.BadHandler):
            Executables(path)


def test_a_directory_below_one_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    directory = shared / "commands.d"
    directory.mkdir(parents=True)
    shared.chmod(0o777)
    with pytest.raises(errors.BadHandler, match="writable by everybody"):
        Executables(directory)
    shared.chmod(0o1777)
    Executables(directory)
