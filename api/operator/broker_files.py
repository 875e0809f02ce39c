"""What a local node is told by file: the part of its configuration that varies by place, and its definitions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from api.operator.secrets import broker_password_hash
from topology.access import ACCOUNTS
from topology.names import VHOST

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a node; 0: any free one, remembered for the next start.

    Attributes:
        amqps: for devices, on the node's host address. All others are on loopback.
        amqp: for the fabric.
        management: the management API.
        prometheus: the broker's metrics.
        distribution: Erlang's own protocol, which command line tools speak.
        epmd: the node's own port mapper, so that it neither depends on another's nor disturbs one.
    """

    amqps: int = 0
    amqp: int = 0
    management: int = 0
    prometheus: int = 0
    distribution: int = 0
    epmd: int = 0


def local_configuration(
    *, host: str, ports: Ports, certificate: Path, key: Path, authority: Path, definitions: Path, auth_url: str
) -> str:
    """The second configuration file, read after `deploy/rabbitmq/rabbitmq.conf`.

    Args:
        host: the address the AMQPS listener binds to, IPv6 without brackets.
        ports: all chosen.
        certificate: PEM file.
        key: PEM file.
        authority: PEM file.
        definitions: JSON file, imported at each boot.
        auth_url: what `/user`, `/vhost`, `/resource` and `/topic` are appended to.

    Raises:
        ValueError: a value holds a line break or a comment sign, and would not be read as one value.
    """
    auth = auth_url.rstrip("/")
    options = {
        "listeners.tcp.fabric": f"{LOOPBACK}:{ports.amqp}",
        "listeners.ssl.devices": f"{host}:{ports.amqps}",
        "ssl_options.certfile": certificate,
        "ssl_options.keyfile": key,
        "ssl_options.cacertfile": authority,
        "management.tcp.ip": LOOPBACK,
        "management.tcp.port": ports.management,
        "prometheus.tcp.ip": LOOPBACK,
        "prometheus.tcp.port": ports.prometheus,
        "load_definitions": definitions,
        "auth_http.user_path": f"{auth}/user",
        "auth_http.vhost_path": f"{auth}/vhost",
        "auth_http.resource_path": f"{auth}/resource",
        "auth_http.topic_path": f"{auth}/topic",
        # Asked for over plain HTTP, too: without it Erlang looks for the system's authorities, and a small
        # userland has none, which would refuse every login.
        "auth_http.ssl_options.cacertfile": authority,
        "log.console": "false",
    }
    for name, value in options.items():
        if not str(value).isprintable() or "#" in str(value):
            raise ValueError(f"{name} holds what a configuration file can't: {value!r}")
    return "".join(f"{name} = {value}\n" for name, value in options.items())


def definitions(passwords: Mapping[str, str]) -> str:
    """The broker's users, the vhost and who may do what in it, as RabbitMQ's definitions JSON.

    Importing it again changes nothing but the salts. It holds password hashes: keep it 0600.

    Args:
        passwords: of each account in `topology.access.ACCOUNTS`.
    """
    return json.dumps(
        {
            "vhosts": [{"name": VHOST}],
            "users": [
                {
                    "name": account.name,
                    "password_hash": broker_password_hash(passwords[account.name]),
                    "hashing_algorithm": "rabbit_password_hashing_sha256",
                    "tags": list(account.tags),
                    "limits": {},
                }
                for account in ACCOUNTS
            ],
            "permissions": [
                {
                    "user": account.name,
                    "vhost": VHOST,
                    "configure": account.configure,
                    "write": account.write,
                    "read": account.read,
                }
                for account in ACCOUNTS
            ],
        },
        indent=1,
    )
