"""`restante`: the operator's command line."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from api.operator.errors import KNOWN_ERRORS
from api.settings import BadSettings, Settings, load
from topology import access, layout

_EXIT_FAILED = 1
_EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = load(os.environ, {"state_dir": given.state_dir} if given.state_dir else {})
    except BadSettings as error:
        print(f"restante: {error}", file=sys.stderr)
        return _EXIT_USAGE
    try:
        status: int = given.run(settings, given) or 0
        return status
    except KeyboardInterrupt:
        return 130
    except KNOWN_ERRORS as error:
        print(f"restante: {error}", file=sys.stderr)
        return _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="restante",
        description="Operate Restante: a messaging fabric in which every device has a mailbox.",
        epilog="Settings come from RESTANTE_* variables or the TOML file that RESTANTE_CONFIG names.",
    )
    parser.add_argument("--state-dir", type=Path, help="keys, certificates, secrets, ledger (default: .local)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="run broker, worker and gateway here, in the foreground")
    up.add_argument("--host", action="append", help="a name or address this machine is reached by (repeatable)")
    up.set_defaults(run=_up)

    setup = commands.add_parser("setup", help="make authority, certificates, keys, database and operator token")
    setup.add_argument("--host", action="append", help="a name or address for the certificate (repeatable)")
    setup.set_defaults(run=_setup)

    commands.add_parser("migrate", help="bring the database's tables up to date").set_defaults(run=_migrate)
    commands.add_parser("gateway", help="run the HTTP gateway and the broker's auth endpoint").set_defaults(
        run=_gateway
    )
    commands.add_parser("worker", help="run the consumers, the clocks and the event log").set_defaults(run=_worker)

    topology = commands.add_parser("topology", help="what exists on the broker").add_subparsers(required=True)
    show = topology.add_parser("show", help="print exchanges, queues, bindings, policies and accounts")
    show.add_argument("--json", action="store_true", help="as one JSON object")
    show.set_defaults(run=_topology_show)

    _device_commands(commands)
    _command_commands(commands)
    _token_commands(commands)
    return parser


def _device_commands(commands: Any) -> None:
    device = commands.add_parser("device", help="make, list and delete devices").add_subparsers(required=True)
    create = device.add_parser("create", help="make a device; prints its enrollment ticket once")
    create.add_argument("id")
    create.add_argument("--group", action="append", default=[], help="a group it is in (repeatable)")
    create.add_argument(
        "--ticket-file", type=Path, help="write the ticket to this new file (0600) instead of printing it"
    )
    create.set_defaults(run=_device_create)
    get = device.add_parser("get", help="print one device")
    get.add_argument("id")
    get.set_defaults(run=lambda settings, given: _print(_call(settings, "GET", f"/v1/devices/{_segment(given.id)}")))
    listing = device.add_parser("list", help="print all devices, one a line")
    listing.set_defaults(run=lambda settings, _: _print_pages(settings, "/v1/devices"))
    delete = device.add_parser("delete", help="delete a device with its mail, keys and connections")
    delete.add_argument("id")
    delete.set_defaults(run=lambda settings, given: _call(settings, "DELETE", f"/v1/devices/{_segment(given.id)}"))


def _command_commands(commands: Any) -> None:
    command = commands.add_parser("command", help="send commands and look at them").add_subparsers(required=True)
    send = command.add_parser("send", help="send a command and wait for its outcome")
    send.add_argument("device")
    send.add_argument("name", help="such as door.close")
    send.add_argument("--args", default="{}", help="the arguments, a JSON object (default: {})")
    send.add_argument("--ttl", type=float, default=60.0, help="seconds until it must be picked up (default: 60)")
    send.add_argument("--wait", type=int, default=10, help="seconds to wait for the outcome, 60 at most (default: 10)")
    send.set_defaults(run=_command_send)
    get = command.add_parser("get", help="print one command with its timeline")
    get.add_argument("id")
    get.set_defaults(run=lambda settings, given: _print(_call(settings, "GET", f"/v1/commands/{_segment(given.id)}")))


def _token_commands(commands: Any) -> None:
    token = commands.add_parser("token", help="make, list and revoke tokens of callers").add_subparsers(required=True)
    create = token.add_parser("create", help="make a token; prints it once")
    create.add_argument("subject", help="who it is for, such as billing")
    create.add_argument("--scope", action="append", required=True, help="such as commands:send (repeatable)")
    create.add_argument("--life", type=int, default=90 * 24 * 3600, help="seconds it lives (default: 90 days)")
    create.set_defaults(run=_token_create)
    listing = token.add_parser("list", help="print all tokens (never their secret), one a line")
    listing.set_defaults(run=lambda settings, _: _print_pages(settings, "/v1/tokens"))
    revoke = token.add_parser("revoke", help="revoke a token by its jti")
    revoke.add_argument("jti")
    revoke.set_defaults(run=lambda settings, given: _call(settings, "DELETE", f"/v1/tokens/{_segment(given.jti)}"))


# ---- The stack ---------------------------------------------------------------------------------------


def _up(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator.setup import LOCAL_NAMES
    from api.operator.stack import Stack

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    stack = Stack(settings, _say, hosts=[*(given.host or []), *LOCAL_NAMES])
    stack.start()
    try:
        _say(f"the stack is up: callers use {stack.settings.api_url}, devices {stack.settings.amqps_url}")
        _say(f"the operator's token is in {stack.files.operator_token}, the authority in {stack.files.authority}")
        _say("Ctrl-C stops it")
        stack.supervise(ended)
    finally:
        _say("stopping")
        stack.stop()
    return 0


def _setup(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import setup

    setup.run(settings, [*(given.host or []), *setup.LOCAL_NAMES], _say)
    return 0


def _migrate(settings: Settings, _: argparse.Namespace) -> int:
    from fabric.sql import migrate

    migrate(settings.database)
    return 0


def _gateway(settings: Settings, _: argparse.Namespace) -> int:
    from api.operator import gateway

    return gateway.run(settings)


def _worker(settings: Settings, _: argparse.Namespace) -> int:
    from api.operator import worker

    return worker.run(settings)


# ---- Looking -----------------------------------------------------------------------------------------


def _topology_show(_: Settings, given: argparse.Namespace) -> int:
    shown = {
        "exchanges": [asdict(exchange) for exchange in layout.EXCHANGES],
        "queues": [asdict(queue) for queue in (*layout.QUEUES, replace(layout.MAILBOX, name="mailbox.DEVICE"))],
        "bindings": [asdict(binding) for binding in layout.BINDINGS],
        "policies": [asdict(policy) for policy in layout.POLICIES],
        "accounts": [asdict(account) for account in access.ACCOUNTS],
    }
    if given.json:
        _print(shown)
        return 0
    for title, things in shown.items():
        print(f"{title}:")
        for thing in things:
            name = thing.pop("name", None) or f"{thing.pop('exchange')} -> {thing.pop('queue')}"
            details = "  ".join(f"{key}={_brief(value)}" for key, value in thing.items() if value not in ({}, (), ""))
            print(f"  {name:<20} {details}")
    return 0


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items())
    return str(value)


# ---- Through the gateway -----------------------------------------------------------------------------


def _device_create(settings: Settings, given: argparse.Namespace) -> int:
    made = _call(settings, "POST", "/v1/devices", json={"id": given.id, "groups": given.group})
    ticket = made["enrollment"]["ticket"]
    if given.ticket_file:
        from api.operator.secrets import write_private

        write_private(given.ticket_file, f"{ticket}\n".encode())
        _say(f"the ticket is in {given.ticket_file}; it is good until {made['enrollment']['expires_at']}")
    else:
        print(ticket)
    return 0


def _command_send(settings: Settings, given: argparse.Namespace) -> int:
    try:
        arguments = json.loads(given.args)
    except ValueError as error:
        print(f"restante: --args is not JSON: {error}", file=sys.stderr)
        return _EXIT_USAGE
    command = _call(
        settings,
        "POST",
        f"/v1/devices/{_segment(given.device)}/commands",
        json={"name": given.name, "args": arguments, "ttl": given.ttl},
        headers={"Prefer": f"wait={given.wait}"},
        timeout=given.wait + 15.0,
    )
    _print(command)
    return 0 if command["state"] == "succeeded" else _EXIT_FAILED


def _token_create(settings: Settings, given: argparse.Namespace) -> int:
    made = _call(
        settings, "POST", "/v1/tokens", json={"subject": given.subject, "scopes": given.scope, "life": given.life}
    )
    print(made["token"])
    return 0


def _call(settings: Settings, method: str, path: str, **arguments: Any) -> Any:
    from api.operator.client import Connection

    return Connection.of(settings).call(method, path, **arguments)


def _print_pages(settings: Settings, path: str) -> int:
    query: dict[str, str] = {}
    while True:
        page = _call(settings, "GET", path, params=query)
        for item in page["items"]:
            print(json.dumps(item))
        if not page.get("next"):
            return 0
        query = {"cursor": page["next"]}


def _print(value: object) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _segment(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _say(text: str) -> None:
    print(f"restante: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.captureWarnings(capture=True)
    sys.exit(main())
