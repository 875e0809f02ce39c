"""`restante-bench`: load for a stack, from devices that behave as real ones do."""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:  # at run time they are imported where they are used: without the extra there is a plain word
    from api.settings import Settings
    from bench.devices import Fleet
    from bench.enrolled import Enrolled

SPARE_FILES = 100  # that a process opens besides its devices' sockets and journals
JOURNAL_FILES = 4  # of a device with a journal: its socket, and SQLite's three
PROCESS = 2_500  # devices of one process, unless told otherwise: one core can serve about so many
TELL_EVERY = 2.0  # seconds between two lines of progress
REPORT_EVERY = 1.0  # seconds between two lines of a report

DESCRIPTION = """
Simulate devices by the thousand: each with a key, a self-signed token for every connection, TLS to the stack's
authority, and the agent's own rules of picking up commands. They have one command, `noop`, with any arguments.

They are enrolled first. On a stack of this machine that is done in bulk; elsewhere over HTTP, as fast as the gateway
lets one address enroll (30 a minute). Their keys are kept, so that a second run has them again.
Ctrl-C ends it.
"""


class _Usage(Exception):
    """What was asked for can't be done; the text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
        return status
    except ModuleNotFoundError as error:
        print(f'restante-bench: {error.name} is missing: pip install "restante[server]"', file=sys.stderr)
        return 1
    except _Usage as error:
        print(f"restante-bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="restante-bench", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    devices = commands.add_parser(
        "devices",
        help="simulate thousands of devices",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    devices.add_argument("--count", type=_whole(1), default=100, help="how many (default: 100)")
    devices.add_argument("--processes", type=_whole(1), help=f"of how many processes (default: one for {PROCESS:,})")
    devices.add_argument("--rate", type=_number, default=100.0, help="first connects a second (default: 100)")
    devices.add_argument("--name-prefix", default="bench", help="ids are PREFIX-0, PREFIX-1, … (default: bench)")
    devices.add_argument("--handler-delay", type=_number, default=0.0, help="seconds that a command runs (default: 0)")
    devices.add_argument("--telemetry", type=_number, default=0.0, help="readings of each device a second (default: 0)")
    devices.add_argument(
        "--journal", action="store_true", help="the agent's journal for each device, on disk (default: in memory)"
    )
    devices.add_argument(
        "--state-dir", type=Path, default=Path(".bench-devices"), help="keys and journals (default: .bench-devices)"
    )
    devices.add_argument(
        "--stack", type=Path, help="stack.json of a stack on this machine (default: .local/stack.json)"
    )
    devices.add_argument("--api-url", help="the gateway of a stack elsewhere, instead of --stack")
    devices.add_argument("--token-file", type=Path, help="with --api-url: a token for devices:write devices:enroll")
    devices.add_argument("--ca-file", type=Path, help="with --api-url: its authority (default: the system's)")
    devices.add_argument("--for", dest="seconds", type=_number, help="end after so many seconds (default: Ctrl-C)")
    devices.add_argument("--report", type=Path, help="append a JSON object a second to this file; - is stdout")
    devices.set_defaults(run=_devices)
    return parser


def _devices(given: argparse.Namespace) -> int:
    from bench.devices import Fleet, Load
    from bench.enrolled import Unusable
    from device_agent import errors
    from fabric.errors import FabricError

    processes: int = given.processes or -(-given.count // PROCESS)
    _check_files(given.count, processes, journal=given.journal)
    try:
        enrolled = _enrolled(given)
        journals = given.state_dir / "journals" if given.journal else None
        load = Load(given.rate, handler_delay=given.handler_delay, telemetry=given.telemetry, journals=journals)
        with Fleet(enrolled, load, processes=processes) as fleet, _Report(given.report) as report:
            # A second Ctrl-C while they say goodbye is none.
            try:
                _watch(fleet, report, given.count, given.seconds)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _say("closing the connections")
            fleet.stop()
            _say(f"{fleet.ran} commands were run")
    except (Unusable, FabricError, errors.AgentError, OSError, RuntimeError, ValueError) as error:
        raise _Usage(str(error)) from error
    return 0


def _enrolled(given: argparse.Namespace) -> "Enrolled":
    from bench import registering
    from bench.enrolled import Enrolled, Kept, Registrar, device_ids

    kept = Kept(given.state_dir)
    if given.api_url is None:
        place = _Place.of(given.stack or Path(".local/stack.json"))
        return asyncio.run(
            registering.enrolled_on(
                place.settings, place.authority, place.token, given.name_prefix, given.count, _say, kept
            )
        )
    if given.token_file is None:
        raise _Usage("--api-url needs --token-file")
    known = kept.load() or Enrolled({}, ())
    have, answer = {own.id: own for own in known.devices}, known.answer
    ids = device_ids(given.name_prefix, given.count)
    registrar = Registrar(given.api_url, given.ca_file, _token(given.token_file))
    try:
        for answer, own in registrar.enroll_all([id for id in ids if id not in have], _say):
            kept.add(Enrolled(answer, (own,)))
            have[own.id] = own
    finally:
        registrar.close()
    return Enrolled(answer, tuple(have[id] for id in ids))


@dataclass(frozen=True, slots=True)
class _Place:
    """A stack on this machine."""

    settings: "Settings"
    authority: Path
    token: str

    @classmethod
    def of(cls, summary: Path) -> "_Place":
        from api.operator.running import as_running
        from api.settings import load

        try:
            said = json.loads(summary.read_text())
            authority, token = Path(said["ca_file"]), Path(said["token_file"])
        except (OSError, ValueError, KeyError) as error:
            raise _Usage(
                f"{summary} describes no stack ({error}): start one with `restante up`, name its stack.json with"
                " --stack, or use --api-url"
            ) from None
        settings = as_running(load(os.environ, {"state_dir": summary.parent.absolute()}))
        return cls(settings, authority, _token(token))


class _Report:
    """JSON lines in a file; nothing without one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def add(self, line: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def __enter__(self) -> "_Report":
        if self._path is not None:
            self._file = sys.stdout if str(self._path) == "-" else self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._file is not sys.stdout:
            self._file.close()


def _watch(fleet: "Fleet", report: _Report, count: int, seconds: float | None) -> None:
    """Tell how they do, until the time is over. Raises `RuntimeError`: a process died."""
    began = told = time.monotonic()
    ran_then = 0
    while seconds is None or time.monotonic() - began < seconds:
        time.sleep(min(REPORT_EVERY, seconds or REPORT_EVERY))
        fleet.check()
        counts, now = fleet.counts(), time.monotonic()
        delays, confirms = fleet.latencies()
        latencies = {"delay_ms": _percentiles(delays), "confirm_ms": _percentiles(confirms)}
        report.add({"time": round(time.time(), 3), **asdict(counts), "at": round(now - began, 3), **latencies})
        if now - told >= TELL_EVERY:
            rate = (counts.ran - ran_then) / (now - told)
            told, ran_then = now, counts.ran
            text = f"{counts.serving} of {count} connected"
            text += f", {counts.refused} logins refused" if counts.refused else ""
            text += f", {counts.ran} commands run ({rate:.0f}/s)"
            text += f", {counts.readings} readings" if counts.readings else ""
            _say(text)


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    values.sort()
    last = len(values) - 1
    found = {"p50": values[last // 2], "p99": values[int(last * 0.99)], "max": values[-1]}
    return {"count": len(values), **{name: round(value, 2) for name, value in found.items()}}


def _check_files(count: int, processes: int, *, journal: bool) -> None:
    """Raises `_Usage` when so many devices can't be in so few processes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = JOURNAL_FILES if journal else 1
    room = (most - SPARE_FILES) // each
    if -(-count // processes) > room:
        raise _Usage(
            f"a process may open {most} files here, so it can have {room} such devices:"
            f" use --processes {-(-count // room)} or more"
        )


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise _Usage(f"the token file {path} can't be read: {error.strerror}") from None


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least}")
        return value

    read.__name__ = "whole number"
    return read


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("not a number from 0 on")
    return value


def _say(text: str) -> None:
    print(f"restante-bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
