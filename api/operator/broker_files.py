"""What a node is told by file, here and in a container: its configuration, certificate, cookie and definitions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from api.operator.secrets import broker_password_hash, private_directory, replace_private, secret
from topology.access import ACCOUNTS
from topology.names import VHOST

LOOPBACK = "127.0.0.1"
_SERVER = Path("tls") / "server.pem"

_HERE = Path(__file__).resolve()
# In a checkout the configuration that all nodes share is in deploy/; in a wheel it is beside this file.
CONFIGURATION = next(
    place for place in (_HERE.parent / "rabbitmq", _HERE.parents[2] / "deploy" / "rabbitmq") if place.is_dir()
)


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


@dataclass(frozen=True, slots=True)
class Place:
    """What varies from node to node.

    Attributes:
        host: the address the AMQPS listener binds to, IPv6 without brackets; `$(NAME)` is read from the node's
            environment.
        inside: the address that everything else binds to, in the same form.
        ports: all chosen.
        auth_url: what `/user`, `/vhost`, `/resource` and `/topic` are appended to.
        console: whether the node logs to its standard output instead of files.
    """

    host: str
    ports: Ports
    auth_url: str
    inside: str = LOOPBACK
    console: bool = False


def write(home: Path, place: Place, certificate: bytes, authority: bytes, passwords: Mapping[str, str]) -> None:
    """Put all files of a node under `home`, where it will find them: `etc`, `tls`, and `home` with the cookie.

    Args:
        certificate: the broker's certificate, its chain and its private key, in PEM.
        authority: the authority's certificate, in PEM.
        passwords: of each account in `topology.access.ACCOUNTS`.

    Raises:
        ValueError: a value does not fit into a configuration file.
    """
    etc = home / "etc"
    for directory in (home, etc, etc / "conf.d", home / "home", home / "tls"):
        private_directory(directory)
    replace_certificate(home, certificate)
    replace_private(home / "tls" / "authority.pem", authority)
    secret(home / "home" / ".erlang.cookie")
    replace_private(etc / "enabled_plugins", (CONFIGURATION / "enabled_plugins").read_bytes())
    replace_private(etc / "conf.d" / "10-common.conf", (CONFIGURATION / "rabbitmq.conf").read_bytes())
    replace_private(etc / "advanced.config", (CONFIGURATION / "advanced.config").read_bytes())
    # The node's name ends in @localhost, which a minimal userland may not resolve.
    replace_private(etc / "inetrc", b'{host, {127,0,0,1}, ["localhost"]}.\n{lookup, [file, native]}.\n')
    replace_private(etc / "definitions.json", definitions(passwords).encode())
    replace_private(etc / "conf.d" / "20-local.conf", local_configuration(home, place).encode())


def replace_certificate(home: Path, certificate: bytes) -> None:
    """Give a node another certificate with its key; while it runs, it takes it within seconds."""
    replace_private(home / _SERVER, certificate)


def local_configuration(home: Path, place: Place) -> str:
    """The second configuration file, read after `deploy/rabbitmq/rabbitmq.conf`.

    Raises:
        ValueError: a value holds a line break or a comment sign, and would not be read as one value.
    """
    auth, ports, tls = place.auth_url.rstrip("/"), place.ports, home / "tls"
    options = {
        "listeners.tcp.fabric": f"{place.inside}:{ports.amqp}",
        "listeners.ssl.devices": f"{place.host}:{ports.amqps}",
        # One file for both: there is no moment in which one is new and the other old.
        "ssl_options.certfile": home / _SERVER,
        "ssl_options.keyfile": home / _SERVER,
        "ssl_options.cacertfile": tls / "authority.pem",
        "management.tcp.ip": place.inside,
        "management.tcp.port": ports.management,
        "prometheus.tcp.ip": place.inside,
        "prometheus.tcp.port": ports.prometheus,
        "load_definitions": home / "etc" / "definitions.json",
        "auth_http.user_path": f"{auth}/user",
        "auth_http.vhost_path": f"{auth}/vhost",
        "auth_http.resource_path": f"{auth}/resource",
        "auth_http.topic_path": f"{auth}/topic",
        # Asked for over plain HTTP, too: without it Erlang looks for the system's authorities, and a small
        # userland has none, which would refuse every login.
        "auth_http.ssl_options.cacertfile": tls / "authority.pem",
        "log.console": str(place.console).lower(),
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
