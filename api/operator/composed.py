"""What the one-shot services of `compose.yaml` do.

`files` has no network, and alone sees the authority's key. It gives each service what that one needs and no more, in a
volume of its own. `ledger` brings the database up to date, `welcome` makes the demo's device and says where to go.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from api.operator import authority, edge_control, setup
from api.operator.broker_files import Place, Ports, write
from api.operator.client import Connection, failure
from api.operator.secrets import account_password, private_directory, replace_private, secret
from api.operator.setup import Files
from api.settings import Settings
from topology import access

STATE = Path("/state")  # the state directory in every container
VOLUMES = Path("/volumes")  # where what is another service's is mounted
DEVICE = "garage-7"

_PORTS = Ports(amqps=5671, amqp=5672, management=15672, prometheus=15692)
_DATABASE = "restante"  # the role and its database
# Run by the database's image when it makes the database. URL-safe text needs no quoting.
_ROLE = """\
CREATE ROLE {name} LOGIN PASSWORD '{password}';
CREATE DATABASE {name} OWNER {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C';
"""
_TIMEOUT = 15.0  # seconds for a request

Log = Callable[[str], None]


def files(settings: Settings, volumes: Path, log: Log) -> None:
    """Make what is missing of authority, certificates, keys and passwords, and hand it out. Changes nothing that is
    there and good.

    Raises:
        authority.AuthorityError: one sentence that says what is wrong.
    """
    api, mq = (str(urlsplit(url).hostname) for url in (settings.api_url, settings.amqps_url))
    made = setup.make_files(settings, [api, mq], log)
    if not settings.authority_certificate:
        _check_authority(made, (api, mq))
    setup.make_certificates(settings, [api], [mq], log)

    gateway, worker, operator = volumes / "gateway", volumes / "worker", volumes / "operator"
    for place, secrets in ((gateway, (access.GATEWAY,)), (worker, (access.WORKER, access.ADMIN)), (operator, ())):
        # On these the volumes of the keys and of the revocation log are mounted.
        for directory in (".", "keys", "secrets", "secrets/tokens", "secrets/commands", "revocations"):
            private_directory(place / directory)
        for account in secrets:
            _give(place / "secrets" / account, account_password(settings.state_dir, account).encode())
    _give(gateway / "secrets" / made.cursor_secret.name, made.cursor_secret.read_bytes())
    known = made.authorities
    for place in (gateway, worker, operator):
        for path in (known.certificates, known.succession):
            if path.exists():
                _give(place / "authority" / path.name, path.read_bytes())
        for path in (made.certificate, made.broker_certificate):  # without the key: when it ends is told by these
            public = authority.load_certificate(path).public_bytes(Encoding.PEM)
            _give(place / "certificates" / path.name, public)
    _give(operator / made.stack.name, _summary(settings))

    write(
        volumes / "broker",
        Place("$(EDGE)", _PORTS, "http://auth.backplane:8081/broker/auth", inside="$(BACKPLANE)", console=True),
        made.broker_certificate.read_bytes(),
        made.authority.read_bytes(),
        {account.name: account_password(settings.state_dir, account.name) for account in access.ACCOUNTS},
    )
    _give(volumes / "edge" / "api.pem", made.certificate.read_bytes())
    edge_control.replace_certificate(
        volumes / "control" / "edge.sock", "/certificates/api.pem", made.certificate.read_bytes()
    )
    password = secret(settings.state_dir / "secrets" / "database")
    _give(volumes / "database" / "pgpass", f"*:*:*:{_DATABASE}:{password}\n".encode())
    _give(volumes / "database" / "role.sql", _ROLE.format(name=_DATABASE, password=password).encode())


def welcome(settings: Settings, ticket: Path, log: Log) -> None:
    """Have the demo's device made and a ticket for it written, unless it is enrolled; say where to go.

    Raises:
        CallFailed: the gateway can't be reached, or refuses.
    """
    connection = Connection.of(settings)
    try:
        with connection.client(_TIMEOUT) as client:
            _invite(client, ticket)
    except httpx.HTTPError as error:
        raise connection.unreachable(error) from None
    run = "docker compose run --rm"
    log("the stack is up")
    log(f"callers use {settings.api_url}, devices {settings.amqps_url}")
    log(f"command the demo's garage door:  {run} operator command send {DEVICE} door.open")
    log(f"the operator's token:            {run} --entrypoint cat operator {STATE}/operator.token")
    log(f"the authority to verify with:    {run} --entrypoint cat operator {STATE}/authority/ca.pem")


def _invite(client: httpx.Client, ticket: Path) -> None:
    path = f"/v1/devices/{DEVICE}"
    keys = client.get(f"{path}/keys")
    if keys.status_code == httpx.codes.NOT_FOUND:
        answer = client.post("/v1/devices", json={"id": DEVICE, "groups": ["garages"]})
    elif keys.is_success and keys.json()["items"]:
        return
    else:
        answer = client.post(f"{path}/enrollment")
    if not answer.is_success:
        raise failure(answer)
    document = answer.json()
    replace_private(ticket, document.get("enrollment", document)["ticket"].encode())


def _check_authority(made: Files, names: Iterable[str]) -> None:
    """Devices pin the authority, so another one can't quietly take its place."""
    certificate = authority.load_certificate(made.authority)
    permitted = certificate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
    vouched = {name.value for name in permitted if isinstance(name, x509.DNSName)}
    if missing := set(names) - vouched:
        raise authority.AuthorityError(
            f"The authority vouches for {', '.join(sorted(vouched))} and not for {', '.join(sorted(missing))}. Devices "
            "trust it alone: keep the domain, or begin anew with `docker compose down -v`."
        )


def _give(path: Path, *content: bytes) -> None:
    private_directory(path.parent)
    replace_private(path, b"".join(content))


def _summary(settings: Settings) -> bytes:
    """What `restante` in the operator's container needs to know."""
    there = Files(STATE)
    summary = {
        "api_url": settings.api_url,
        "amqps_url": settings.amqps_url,
        "ca_file": str(there.authority),
        "token_file": str(there.operator_token),
    }
    return (json.dumps(summary, indent=2) + "\n").encode()
