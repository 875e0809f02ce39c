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

from api.operator import calls
from api.operator.auditing import operator
from api.operator.console import EXIT_FAILED, EXIT_USAGE, say, show
from api.operator.errors import KNOWN_ERRORS
from api.settings import BadSettings, Settings, load
from fabric.audit import By, Kind, acting_as
from topology import access, layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = load(os.environ, {"state_dir": given.state_dir} if given.state_dir else {})
    except BadSettings as error:
        print(f"restante: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        # What a service does, it does for its callers.
        with acting_as(By(Kind.FABRIC) if given.run in (_gateway, _worker) else operator()):
            status: int = given.run(settings, given) or 0
        return status
    except KeyboardInterrupt:
        return 130
    except KNOWN_ERRORS as error:
        print(f"restante: {error}", file=sys.stderr)
        return EXIT_FAILED


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

    compose = commands.add_parser("compose", help="what the services of compose.yaml do once").add_subparsers(
        required=True
    )
    compose.add_parser("files", help="make keys, certificates and passwords, and hand them out").set_defaults(
        run=_compose_files
    )
    compose.add_parser("ledger", help="bring the tables up to date, make the operator's token").set_defaults(
        run=_compose_ledger
    )
    compose.add_parser("welcome", help="make the demo's device, say where to go").set_defaults(run=_compose_welcome)

    commands.add_parser("rebuild", help="make again what a broker held that lost its disk").set_defaults(run=_rebuild)

    _backup_commands(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check that everything is as it must be",
        description="Check settings, files, database, broker, gateway and workers, each over a real connection; one "
        "line for each says what to do. The exit status is 0, 1 with warnings, 2 with failures. It needs a worker's "
        "secrets, so run it where one runs.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object a line")
    doctor.add_argument("--skip", action="append", default=[], metavar="CHECK", help="do without it (repeatable)")
    doctor.set_defaults(run=_doctor)

    accept = commands.add_parser(
        "accept-revocation-log",
        help="go on with the revocation log as it is, or with a new one if it is lost",
        description="After a refusal to start. What the log has lost, a backup that is restored brings back to life.",
    )
    accept.set_defaults(run=_accept_revocation_log)

    topology = commands.add_parser("topology", help="what exists on the broker").add_subparsers(required=True)
    show = topology.add_parser("show", help="print exchanges, queues, bindings, policies and accounts")
    show.add_argument("--json", action="store_true", help="as one JSON object")
    show.set_defaults(run=_topology_show)

    calls.add(commands)
    _key_commands(commands)
    _certificate_commands(commands)
    return parser


def _backup_commands(commands: Any) -> None:
    backup = commands.add_parser(
        "backup",
        help="write all that the ledger knows to one file, while everything runs",
        description="Write the ledger, as it is at one moment, and what is public of the state directory to one file "
        "(0600). Keep the revocation log elsewhere: a backup has none.",
    )
    backup.add_argument("file", type=Path)
    backup.add_argument("--force", action="store_true", help="overwrite the file")
    backup.add_argument("--with-secrets", action="store_true", help="add signing keys and passwords, in the clear")
    backup.add_argument("--with-authority-key", action="store_true", help="add the authority's key, in the clear")
    backup.set_defaults(run=_backup)
    restore = commands.add_parser(
        "restore",
        help="fill an empty database from a backup",
        description="Fill an empty database from a backup of this version or an older one, and put back what the state "
        "directory lacks. All gateways and workers must be stopped. See docs/recovery.md for what is true afterwards.",
    )
    restore.add_argument("file", type=Path)
    restore.add_argument("--replace", action="store_true", help="throw away what the database has")
    restore.set_defaults(run=_restore)


def _certificate_commands(commands: Any) -> None:
    certs = commands.add_parser("certs", help="show and renew certificates, replace the authority")
    actions = certs.add_subparsers(required=True)
    actions.add_parser("show", help="print all authorities and certificates, one a line").set_defaults(run=_certs_show)
    renew = actions.add_parser(
        "renew",
        help="issue the certificates again that end soon",
        description="Issue again what has less than a third of its life left. Running processes take it up, and no "
        "connection is dropped. Safe to run every day.",
    )
    renew.add_argument("--force", action="store_true", help="whether it is time or not")
    renew.add_argument("--days", type=int, default=0, help="that the new ones are good for; implies --force")
    renew.set_defaults(run=_certs_renew)
    ca = actions.add_parser("ca", help="export the authority's key; replace the authority").add_subparsers(
        required=True
    )
    export = ca.add_parser("export", help="write the authority's private key to a new file, encrypted")
    export.add_argument("file", type=Path)
    export.add_argument("--delete", action="store_true", help="and take it off this machine")
    export.set_defaults(run=_certs_export)
    rotate = ca.add_parser(
        "rotate",
        help="make a successor of the authority, and announce it to devices",
        description="Make a successor of the authority. Devices learn of it from the present one, and believe both; no "
        "certificate changes yet.",
    )
    rotate.add_argument("--host", action="append", default=[], help="a name it vouches for, too (repeatable)")
    rotate.set_defaults(run=_certs_rotate)
    switch = ca.add_parser("switch", help="have the successor issue all certificates")
    switch.add_argument(
        "--retire-after", type=int, metavar="SECONDS", help="that the one before is still believed (default: a week)"
    )
    switch.set_defaults(run=_certs_switch)
    for command in (renew, rotate, switch):
        command.add_argument("--ca-key", type=Path, metavar="FILE", help="the authority's exported key")
    for command in (renew, export, rotate, switch):
        command.add_argument(
            "--passphrase-file", type=Path, metavar="FILE", help="with that key's passphrase (default: it is asked for)"
        )


def _key_commands(commands: Any) -> None:
    keys = commands.add_parser("keys", help="list, rotate and retire the keys that sign tokens and commands")
    actions = keys.add_subparsers(required=True)
    actions.add_parser("list", help="print all signing keys, one a line").set_defaults(run=_keys_list)
    rotate = actions.add_parser(
        "rotate",
        help="make the next signing keys",
        description="Publish a next key, which signs after a while. What the present one has signed counts on for as "
        "long as it may be of use; no process needs a restart. Run again before the next key signs, it does nothing.",
    )
    which = rotate.add_mutually_exclusive_group()
    for name in ("tokens", "commands"):
        which.add_argument(f"--{name}", action="store_const", dest="purpose", const=name, help=f"those of {name} only")
    rotate.add_argument("--lead", type=int, metavar="SECONDS", help="until the next key signs (default: 120)")
    rotate.add_argument(
        "--retire-after",
        type=int,
        metavar="SECONDS",
        help="that the present key's signatures count after that (default: as long as a token or a command may live)",
    )
    rotate.set_defaults(run=_keys_rotate)
    retire = actions.add_parser(
        "retire",
        help="refuse whatever a leaked key has signed",
        description="Refuse whatever a key has signed, tokens and waiting commands. If it is the one that signs, "
        "another takes its place first.",
    )
    retire.add_argument("kid", help="its thumbprint, as `restante keys list` shows it")
    retire.add_argument("--now", action="store_true", required=True, help="needed, since there is no way back")
    retire.set_defaults(run=_keys_retire)


# ---- The stack ---------------------------------------------------------------------------------------


def _up(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator.setup import LOCAL_NAMES
    from api.operator.stack import Stack

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    stack = Stack(settings, say, hosts=[*(given.host or []), *LOCAL_NAMES])
    stack.start()
    try:
        say(f"the stack is up: callers use {stack.settings.api_url}, devices {stack.settings.amqps_url}")
        say(f"the operator's token is in {stack.files.operator_token}, the authority in {stack.files.authority}")
        say("Ctrl-C stops it")
        stack.supervise(ended)
    finally:
        say("stopping")
        stack.stop()
    return 0


def _setup(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import setup

    setup.run(settings, [*(given.host or []), *setup.LOCAL_NAMES], say)
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


def _compose_files(settings: Settings, _: argparse.Namespace) -> None:
    from api.operator import composed

    composed.files(settings, composed.VOLUMES, say)


def _compose_ledger(settings: Settings, _: argparse.Namespace) -> None:
    from api.operator import setup

    setup.make_ledger(settings, say)


def _compose_welcome(settings: Settings, _: argparse.Namespace) -> None:
    from api.operator import composed

    composed.welcome(settings, composed.VOLUMES / "ticket" / "ticket", say)


def _backup(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import backup

    done = backup.make(
        settings,
        given.file,
        say,
        force=given.force,
        with_secrets=given.with_secrets,
        with_authority_key=given.with_authority_key,
    )
    return show(done)


def _restore(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import backup

    done = backup.restore(settings, given.file, say, replace=given.replace)
    say(f"next: keep the newest revocation log at {settings.revocations}, start the workers and gateways, which replay")
    say("it, then `restante rebuild`; docs/recovery.md says what the database can't know")
    return show(done)


def _doctor(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import doctor
    from api.operator.running import as_running

    if unknown := sorted(set(given.skip) - set(doctor.CHECKS)):
        say(f"there is no check '{unknown[0]}'; the checks are {', '.join(doctor.CHECKS)}")
        return EXIT_USAGE
    show = (lambda finding: print(finding.as_json())) if given.json else (lambda finding: print(finding.line()))
    return doctor.run(as_running(settings), show, given.skip)


def _accept_revocation_log(settings: Settings, _: argparse.Namespace) -> int:
    from fabric.sql import accept_revocation_log

    accept_revocation_log(settings.database)
    say(f"the next start takes {settings.revocations} as it is")
    return 0


def _rebuild(settings: Settings, _: argparse.Namespace) -> int:
    from api.operator import rebuild
    from api.operator.running import as_running

    done = rebuild.run(as_running(settings), say)
    return show(asdict(done))


def _certs_show(settings: Settings, _: argparse.Namespace) -> int:
    from api.operator import certs

    for each in certs.listing(settings):
        print(json.dumps(each))
    return 0


def _certs_renew(settings: Settings, given: argparse.Namespace) -> None:
    from api.operator import certs

    unlock = certs.unlock(given.ca_key, given.passphrase_file)
    certs.renew(settings, given.days, say, force=given.force, unlock=unlock)


def _certs_export(settings: Settings, given: argparse.Namespace) -> None:
    from api.operator import certs

    certs.export(settings, given.file, given.passphrase_file, say, delete=given.delete)


def _certs_rotate(settings: Settings, given: argparse.Namespace) -> None:
    from api.operator import certs

    certs.rotate(settings, given.host, certs.unlock(given.ca_key, given.passphrase_file), say)


def _certs_switch(settings: Settings, given: argparse.Namespace) -> None:
    from api.operator import certs

    certs.switch(settings, given.retire_after, certs.unlock(given.ca_key, given.passphrase_file), say)


def _keys_list(settings: Settings, _: argparse.Namespace) -> int:
    from api.operator import keys

    for key in keys.listing(settings):
        print(json.dumps(key))
    return 0


def _keys_rotate(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import keys

    keys.rotate(settings, given.purpose, given.lead, given.retire_after, say)
    return 0


def _keys_retire(settings: Settings, given: argparse.Namespace) -> int:
    from api.operator import keys

    keys.retire(settings, given.kid, say)
    return 0


# ---- Looking -----------------------------------------------------------------------------------------


def _topology_show(settings: Settings, given: argparse.Namespace) -> int:
    shown = {
        "exchanges": [asdict(exchange) for exchange in layout.EXCHANGES],
        "queues": [asdict(queue) for queue in (*layout.QUEUES, replace(layout.MAILBOX, name="mailbox.DEVICE"))],
        "bindings": [asdict(binding) for binding in layout.BINDINGS],
        "policies": [asdict(policy) for policy in layout.policies(settings.largest_backlog)],
        "accounts": [asdict(account) for account in access.ACCOUNTS],
    }
    if given.json:
        show(shown)
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


if __name__ == "__main__":
    logging.captureWarnings(capture=True)
    sys.exit(main())
