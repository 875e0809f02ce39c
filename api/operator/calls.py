"""The commands of `restante` that ask the gateway: devices, commands, tokens, events, the audit."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from api.operator.console import EXIT_FAILED, EXIT_USAGE, say, show
from api.settings import Settings


def add(commands: Any) -> None:
    """Add them to the subparsers of `restante`; each sets `run(settings, given) -> status`."""
    _device_commands(commands)
    _command_commands(commands)
    _token_commands(commands)
    _events_command(commands)
    _audit_command(commands)


def _device_commands(commands: Any) -> None:
    device = commands.add_parser("device", help="make, list, revoke and delete devices").add_subparsers(required=True)
    create = device.add_parser("create", help="make a device; prints its enrollment ticket once")
    create.add_argument("id")
    create.add_argument("--group", action="append", default=[], help="a group it is in (repeatable)")
    create.add_argument("--limit", type=int, help="commands that may wait for it (default: the setting 'backlog')")
    create.add_argument(
        "--ticket-file", type=Path, help="write the ticket to this new file (0600) instead of printing it"
    )
    create.set_defaults(run=_device_create)
    get = device.add_parser("get", help="print one device")
    get.add_argument("id")
    get.set_defaults(run=lambda settings, given: show(_call(settings, "GET", f"/v1/devices/{_segment(given.id)}")))
    listing = device.add_parser("list", help="print all devices, one a line")
    listing.set_defaults(run=lambda settings, _: _print_pages(settings, "/v1/devices"))
    _device_rights(device)
    delete = device.add_parser("delete", help="delete a device with its mail, keys and connections")
    delete.add_argument("id")
    delete.set_defaults(run=lambda settings, given: _call(settings, "DELETE", f"/v1/devices/{_segment(given.id)}"))


def _device_rights(device: Any) -> None:
    for name, enabled, what in (
        ("suspend", False, "close a device's connections and let it in no more; its mail waits"),
        ("resume", True, "let a suspended device in again"),
    ):
        switch = device.add_parser(name, help=what)
        switch.add_argument("id")
        switch.set_defaults(run=_device_switch, enabled=enabled)
    revoke = device.add_parser("revoke", help="void all keys, tickets and waiting commands of a device, and cut it off")
    revoke.add_argument("id")
    revoke.set_defaults(
        run=lambda settings, given: show(_call(settings, "POST", f"/v1/devices/{_segment(given.id)}/revoke"))
    )
    keys = device.add_parser("keys", help="print a device's keys, one a line")
    keys.add_argument("id")
    keys.set_defaults(run=lambda settings, given: _print_pages(settings, f"/v1/devices/{_segment(given.id)}/keys"))
    revoke_key = device.add_parser("revoke-key", help="revoke a key with those registered under it, and cut it off")
    revoke_key.add_argument("id")
    revoke_key.add_argument("kid", help="its thumbprint")
    revoke_key.set_defaults(
        run=lambda settings, given: show(
            _call(settings, "DELETE", f"/v1/devices/{_segment(given.id)}/keys/{_segment(given.kid)}")
        )
    )
    enroll = device.add_parser("enroll", help="make a new enrollment ticket; the ones before it are void")
    enroll.add_argument("id")
    enroll.add_argument("--ticket-file", type=Path, help="write it to this new file (0600) instead of printing it")
    enroll.set_defaults(run=_device_enroll)
    importing = device.add_parser(
        "import",
        help="make many devices from a file",
        description="Make the devices of a file: CSV with the columns id, groups and labels ('a b', 'x=1 y=2'), or one "
        "JSON object a line. Prints how far it is, and at last what was done.",
    )
    importing.add_argument("file", type=Path)
    importing.add_argument("--ticket-file", type=Path, required=True, help="a new file (0600) for the tickets, as CSV")
    importing.add_argument("--resume", action="store_true", help="go on with a ticket file that was begun")
    importing.set_defaults(run=_device_import)


def _command_commands(commands: Any) -> None:
    command = commands.add_parser("command", help="send commands and look at them").add_subparsers(required=True)
    send = command.add_parser("send", help="send a command and wait for its outcome")
    send.add_argument("device")
    send.add_argument("name", help="such as door.close")
    send.add_argument("--args", default="{}", help="the arguments, a JSON object (default: {})")
    send.add_argument("--ttl", type=float, default=60.0, help="seconds until it must be picked up (default: 60)")
    send.add_argument(
        "--response-timeout", type=float, default=30.0, help="seconds from pick-up to outcome (default: 30)"
    )
    send.add_argument("--claim", action="store_true", help="the device asks before it runs it")
    send.add_argument("--supersedes", metavar="KEY", help="withdraw what waits of the same device, name and key")
    send.add_argument("--key", metavar="KEY", help="an idempotency key: sent again with it, it is the same command")
    send.add_argument("--wait", type=int, default=10, help="seconds to wait for the outcome, 60 at most (default: 10)")
    send.set_defaults(run=_command_send)
    get = command.add_parser("get", help="print one command with its timeline")
    get.add_argument("id")
    get.set_defaults(run=lambda settings, given: show(_call(settings, "GET", f"/v1/commands/{_segment(given.id)}")))
    cancel = command.add_parser("cancel", help="withdraw a command that nobody has picked up")
    cancel.add_argument("id")
    cancel.set_defaults(
        run=lambda settings, given: show(_call(settings, "DELETE", f"/v1/commands/{_segment(given.id)}"))
    )


def _token_commands(commands: Any) -> None:
    token = commands.add_parser("token", help="make, list and revoke tokens of callers").add_subparsers(required=True)
    create = token.add_parser("create", help="make a token; prints it once")
    create.add_argument("subject", help="who it is for, such as billing")
    create.add_argument("--scope", action="append", required=True, help="such as commands:send (repeatable)")
    create.add_argument("--life", type=int, default=90 * 24 * 3600, help="seconds it lives (default: 90 days)")
    create.set_defaults(run=_token_create)
    listing = token.add_parser("list", help="print all tokens (never their secret), one a line")
    listing.set_defaults(run=lambda settings, _: _print_pages(settings, "/v1/tokens"))
    revoke = token.add_parser("revoke", help="revoke a token, or all of a subject, and what was made with them")
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("jti", nargs="?")
    which.add_argument("--subject", help="all tokens that are for it")
    revoke.add_argument("--purge", action="store_true", help="withdraw the commands of their subjects that wait")
    revoke.add_argument("--issuer", help="of the subject, when it is an external provider's")
    revoke.set_defaults(run=_token_revoke)


def _events_command(commands: Any) -> None:
    events = commands.add_parser("events", help="follow what happens, one JSON object a line, until Ctrl-C")
    events.add_argument("--after", type=int, help="the position to go on behind (default: from now on)")
    for name, what in (("kind", "such as command.succeeded or device.*"), ("device", "an id"), ("group", "a name")):
        events.add_argument(f"--{name}", action="append", default=[], help=f"{what} (repeatable)")
    events.set_defaults(run=_events)


def _audit_command(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="show who did what, the newest first",
        description="Show who did what to which device, when, from where and with which token, the newest first. "
        "What others have said is escaped.",
    )
    audit.add_argument("--device", help="what was done to this one only")
    audit.add_argument("--subject", help="what they did only, such as billing")
    audit.add_argument("--action", help="such as device.revoked")
    audit.add_argument("--since", metavar="TIME", help="from then on, such as 2026-01-31T12:00:00Z")
    audit.add_argument("--until", metavar="TIME", help="before then")
    audit.add_argument("--limit", type=int, default=50, help="entries at most (default: 50)")
    audit.add_argument("--json", action="store_true", help="one JSON object a line")
    audit.set_defaults(run=_audit)


def _device_create(settings: Settings, given: argparse.Namespace) -> int:
    body: dict[str, object] = {"id": given.id, "groups": given.group}
    if given.limit is not None:
        body["mailbox"] = {"limit": given.limit}
    return _show_ticket(given, _call(settings, "POST", "/v1/devices", json=body)["enrollment"])


def _device_enroll(settings: Settings, given: argparse.Namespace) -> int:
    return _show_ticket(given, _call(settings, "POST", f"/v1/devices/{_segment(given.id)}/enrollment"))


def _show_ticket(given: argparse.Namespace, enrollment: dict[str, str]) -> int:
    if given.ticket_file:
        from api.operator.secrets import write_private

        write_private(given.ticket_file, f"{enrollment['ticket']}\n".encode())
        say(f"the ticket is in {given.ticket_file}; it is good until {enrollment['expires_at']}")
    else:
        print(enrollment["ticket"])
    return 0


def _device_switch(settings: Settings, given: argparse.Namespace) -> int:
    headers = {"Content-Type": "application/merge-patch+json"}
    body = json.dumps({"enabled": given.enabled})
    return show(_call(settings, "PATCH", f"/v1/devices/{_segment(given.id)}", content=body, headers=headers))


def _device_import(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import importing
    from api.operator.client import Connection

    done = importing.run(Connection.of(settings), given.file, given.ticket_file, say, resume=given.resume)
    show(asdict(done))
    return EXIT_FAILED if done.refused else 0


def _command_send(settings: Settings, given: argparse.Namespace) -> int:
    try:
        arguments = json.loads(given.args)
    except ValueError as error:
        print(f"restante: --args is not JSON: {error}", file=sys.stderr)
        return EXIT_USAGE
    body = {
        "name": given.name,
        "args": arguments,
        "ttl": given.ttl,
        "response_timeout": given.response_timeout,
        "claim": given.claim,
    }
    if given.supersedes is not None:
        body["supersedes"] = given.supersedes
    headers = {"Prefer": f"wait={given.wait}"}
    if given.key is not None:
        headers["Idempotency-Key"] = given.key
    path = f"/v1/devices/{_segment(given.device)}/commands"
    command = _call(settings, "POST", path, json=body, headers=headers, timeout=given.wait + 15.0)
    show(command)
    return 0 if command["state"] == "succeeded" else EXIT_FAILED


def _events(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator.client import Connection
    from api.operator.following import follow

    query = [(name, value) for name in ("kind", "device", "group") for value in getattr(given, name)]
    if given.after is not None:
        query.append(("after", str(given.after)))
    try:
        for event in follow(Connection.of(settings), query, say):
            print(event, flush=True)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
    return 0


def _audit(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator.auditing import lines
    from api.operator.client import Connection

    asked = {name: getattr(given, name) for name in ("device", "subject", "action", "since", "until")}
    query = {name: value for name, value in asked.items() if value is not None}
    for line in lines(Connection.of(settings), query, given.limit, as_json=given.json):
        print(line)
    return 0


def _token_create(settings: Settings, given: argparse.Namespace) -> int:
    made = _call(
        settings, "POST", "/v1/tokens", json={"subject": given.subject, "scopes": given.scope, "life": given.life}
    )
    print(made["token"])
    return 0


def _token_revoke(settings: Settings, given: argparse.Namespace) -> int:
    query = {"purge": "true"} if given.purge else {}
    if given.issuer is not None:
        query["issuer"] = given.issuer
    if given.subject is None and given.issuer is not None:
        say("--issuer is whose --subject it is")
        return EXIT_USAGE
    if given.subject is None:
        return show(_call(settings, "DELETE", f"/v1/tokens/{_segment(given.jti)}", params=query))
    return show(_call(settings, "DELETE", "/v1/tokens", params={"subject": given.subject, **query}))


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


def _segment(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
