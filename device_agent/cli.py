"""`restante-agent`: enroll, run, publish, status."""

import argparse
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from device_agent import control, enroll, errors, identity, journal, log, publishing, rotation
from device_agent.agent import DEFAULT_STATE_DIR, Agent
from topology import wire

STATE_VARIABLE = "RESTANTE_AGENT_STATE"
TICKET_VARIABLE = "RESTANTE_TICKET"
_MAX_TICKET = 1_000  # characters

_DESCRIPTION = "The agent of a Restante device: it calls for its mail, runs commands and sends telemetry."


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status: 0, or 1 after one clear sentence on stderr (2: wrong usage)."""
    arguments = _parser().parse_args(argv)
    _log_to_stderr(arguments.verbose)
    try:
        return int(arguments.function(arguments))
    except errors.AgentError as error:
        print(f"restante-agent: {error} [{error.code}]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--state-dir",
        type=Path,
        default=Path(os.environ.get(STATE_VARIABLE) or DEFAULT_STATE_DIR),
        help=f"where key, peering and journal are (default: ${STATE_VARIABLE}, else {DEFAULT_STATE_DIR})",
    )
    common.add_argument("-v", "--verbose", action="store_true", help="log details")
    parser = argparse.ArgumentParser(prog="restante-agent", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "enroll",
        parents=[common],
        help="make this device known to a service, with a ticket",
        description="Make a key on this device and have it registered. The ticket names the service's authority,"
        " which is checked before anything is sent. Safe to repeat with the same ticket.",
        epilog="The ticket is never an argument: other users of this machine could read it in the process table.",
    )
    one.add_argument(
        "--api-url", required=True, metavar="URL", help="the service, such as https://gateway.example:8443"
    )
    one.add_argument(
        "--ticket-file",
        metavar="FILE",
        help=f"file with the ticket, - for stdin (default: ${TICKET_VARIABLE}, else stdin)",
    )
    one.set_defaults(function=_enroll)

    one = commands.add_parser(
        "run",
        parents=[common],
        help="connect, and run commands until SIGTERM",
        description="Connect to the service and run commands. On SIGTERM or SIGINT the command in hand is finished"
        " and reported first; a second signal ends at once.",
    )
    one.add_argument(
        "--handlers",
        metavar="MODULE:NAME|FILE.py",
        help="the Agent with the Python handlers (NAME defaults to 'agent')",
    )
    one.add_argument("--commands-dir", type=Path, metavar="DIR", help="executables named like the commands they handle")
    one.add_argument("--slots", type=int, default=1, metavar="N", help="commands that may run at once (default 1)")
    one.add_argument(
        "--system-interval",
        type=_interval,
        default=60.0,
        metavar="SECONDS",
        help="between readings of the channel 'system': load, memory, disk, temperature (default 60, 0 is never)",
    )
    one.set_defaults(function=_run)

    one = commands.add_parser(
        "publish",
        parents=[common],
        help="send telemetry from stdin",
        description="Send what is on stdin to a channel, and wait until the broker has it. Goes through the running"
        " agent if there is one, else over a connection of its own.",
    )
    one.add_argument("channel", metavar="CHANNEL", help="such as door or engine.temperature")
    one.add_argument("--lines", action="store_true", help="each line is a reading, sent as it comes (NDJSON)")
    one.add_argument("--content-type", default=wire.JSON, metavar="TYPE", help=f"default {wire.JSON}, which is checked")
    one.set_defaults(function=_publish)

    one = commands.add_parser(
        "rotate-key",
        parents=[common],
        help="replace this device's key by a new one",
        description="Make a new key on this device, have it registered with the present one, and use it from the next"
        " connection on. The old key stays good beside it, unless it is dropped. Safe to repeat if interrupted.",
    )
    one.add_argument(
        "--drop-old",
        action="store_true",
        help="make the keys before it good for nothing; connections are closed, and come back with the new key",
    )
    one.set_defaults(function=_rotate_key)

    one = commands.add_parser("status", parents=[common], help="say who this device is and how it is doing")
    one.add_argument("--json", action="store_true", help="for programs")
    one.set_defaults(function=_status)
    return parser


def _enroll(arguments: argparse.Namespace) -> int:
    known = enroll.enroll(arguments.state_dir, arguments.api_url, _ticket(arguments.ticket_file))
    peering = known.peering
    print(f"enrolled as {known.device}, key {known.key.kid}, broker {peering.amqps_host}:{peering.amqps_port}")
    return 0


def _rotate_key(arguments: argparse.Namespace) -> int:
    done = rotation.rotate(arguments.state_dir, drop_old=arguments.drop_old)
    print(f"the key is now {done.kid}")
    for kid in done.dropped:
        print(f"dropped {kid}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    agent = _load_agent(arguments.handlers) if arguments.handlers else Agent()
    asked = False

    def stop(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        agent.ask_stop()

    agent.start(
        arguments.state_dir,
        slots=arguments.slots,
        commands_dir=arguments.commands_dir,
        system_interval=arguments.system_interval,
    )
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    agent.wait()
    agent.stop()
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    bodies = _lines(sys.stdin.buffer) if arguments.lines else _whole(sys.stdin.buffer)
    if arguments.content_type == wire.JSON:
        bodies = (_checked_json(body) for body in bodies)
    publishing.publish_all(arguments.state_dir, arguments.channel, bodies, arguments.content_type)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    status = _gather_status(arguments.state_dir)
    if arguments.json:
        print(json.dumps(status, indent=2))
        return 0
    counts = ", ".join(f"{count} {state}" for state, count in status["journal"].items() if count) or "empty"
    for name, value in (
        ("device", status["device"]),
        ("key", status["key"]),
        ("service", status["api_url"]),
        ("broker", status["broker"]),
        ("agent", "running" if status["running"] else "not running"),
        ("connected", "yes" if status["connected"] else "no"),
        ("last error", status["last_error"]["text"] if status["last_error"] else None),
        ("fabric time", status["fabric_time"]),
        ("journal", counts),
    ):
        if value is not None:
            print(f"{name:12} {value}")
    return 0


def _gather_status(state_dir: Path) -> dict[str, Any]:
    known = identity.load(state_dir)
    peering = known.peering
    status: dict[str, Any] = {
        "device": known.device,
        "key": known.key.kid,
        "api_url": peering.api_url,
        "broker": f"{peering.amqps_host}:{peering.amqps_port}",
    }
    client = control.connect(state_dir)
    if client is not None:
        try:
            status |= client.status()
        finally:
            client.close()
    else:
        stored = journal.read_counts(state_dir)
        counts, time = stored or ({}, 0)
        status |= {"running": False, "connected": False, "last_error": None, "commands_in_hand": 0, "journal": counts}
        status["fabric_time"] = time or None
    if status.get("fabric_time") is not None:
        moment = datetime.fromtimestamp(status["fabric_time"] / 1000, UTC)
        status["fabric_time"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return status


def _ticket(file: str | None) -> str:
    if file is None and os.environ.get(TICKET_VARIABLE):
        return os.environ[TICKET_VARIABLE]
    if file in (None, "-"):
        if sys.stdin.isatty():
            print("ticket: ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline(_MAX_TICKET)
        return sys.stdin.read(_MAX_TICKET)
    try:
        with Path(str(file)).open(encoding="ascii", errors="replace") as opened:
            return opened.read(_MAX_TICKET)
    except OSError as error:
        raise errors.InvalidValue(f"the ticket file {file} can't be read: {error.strerror}") from error


def _load_agent(where: str) -> Agent:
    """The `Agent` in `package.module:name`, or in a file that ends in .py."""
    source, _, name = where.partition(":")
    name = name or "agent"
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (ImportError, OSError, SyntaxError) as error:
        raise errors.BadHandler(f"the handlers in {source} can't be loaded: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, Agent):
        raise errors.BadHandler(f"{source} has no Agent named '{name}'")
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"restante_handlers_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look their module up there
    spec.loader.exec_module(module)
    return module


def _whole(stream: IO[bytes]) -> Iterator[bytes]:
    yield stream.read(wire.MAX_BODY + 1)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    while line := stream.readline(wire.MAX_BODY + 2):
        if line.strip():
            yield line.rstrip(b"\r\n")


def _checked_json(body: bytes) -> bytes:
    try:
        json.loads(body)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidValue(
            f"the reading is not JSON ({error}); give --content-type for anything else"
        ) from error
    return body


def _interval(text: str) -> float:
    value = float(text)
    if value != 0 and not 1 <= value <= 86_400:
        raise argparse.ArgumentTypeError("1 to 86400 seconds, or 0 for never")
    return value


def _log_to_stderr(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.logger.addHandler(handler)
    log.logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
