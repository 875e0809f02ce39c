"""Settings, read once at the edge: environment variables `RESTANTE_*` over a TOML file over defaults.

A name or value that is not understood is an error, and nothing starts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from api import providers
from fabric.identity.meters import Limits
from fabric.identity.providers import Provider
from topology import layout

PREFIX = "RESTANTE_"
CONFIG = f"{PREFIX}CONFIG"  # names the TOML file

# Set for other programs of this project; not settings of the server.
_OTHERS = frozenset({CONFIG, f"{PREFIX}AGENT_STATE", f"{PREFIX}TICKET", f"{PREFIX}RABBITMQ", f"{PREFIX}TOKEN_FILE"})

_CHOICES = {"log_level": ("debug", "info", "warning", "error"), "log_format": ("text", "json")}
_LIMITS = Limits()
_WHOLE = "whole"  # where a field keeps what its number may be


class BadSettings(ValueError):
    """A setting that is unknown or unusable; the text says which and what is expected."""


@dataclass(frozen=True, slots=True)
class _Whole:
    """What a whole number counts, and its bounds, both included."""

    what: str
    lowest: int
    highest: int


def _whole(default: int, what: str, lowest: int, highest: int) -> int:
    setting: int = field(default=default, metadata={_WHOLE: _Whole(what, lowest, highest)})
    return setting


def _port(default: int) -> int:
    return _whole(default, "a port", 1, 65535)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. In TOML and in the environment they have these names (`RESTANTE_API_PORT=8443`).

    Attributes:
        state_dir: keys, certificates, secrets and the SQLite ledger; 0700.
        database_url: `sqlite:///path` or `postgresql://…`; empty: SQLite in the state directory.
        revocation_log: a file that no backup of the database has, and all gateways and workers share; empty:
            `revocations/revocations.log` in the state directory.
        fabric: the name that tokens' audiences begin with.
        cell: the name of the broker that this stack serves.
        amqp_host, amqp_port: the broker's plain listener, for the fabric.
        management_url: the broker's management API.
        amqps_url: where devices connect; the path is the vhost.
        api_url: where callers and devices reach the gateway.
        api_host, api_port: where the gateway listens.
        auth_host, auth_port: where the gateway answers the broker's questions and shows its metrics; internal. Here and
            there a host of `@NAME` is the address of this machine on the way to that one.
        worker_host, worker_port: where the worker shows its metrics and health; internal.
        edge: the host in front of the gateway, whose `X-Forwarded-For` is believed, and nobody else's; empty: none.
        tls_certificate, tls_key: of the gateway's listener, in PEM; with a chain after the certificate if need be. No
            key: it is in the same file. Both empty: plain HTTP behind an edge.
        broker_certificate, broker_key: the same for devices' connections; empty: those of the gateway.
        authority_certificate: who issued these, in PEM, if it is not our own authority; devices trust it alone.
        backlog: commands that may wait for a device that has no limit of its own.
        largest_backlog: the highest limit that a device may be given.
        log_level: debug, info, warning or error.
        log_format: text, or json: one object a line.
        ready_file: touched every two seconds while gateway or worker can do its work; empty: none.
        retention: days that settled commands and their events are kept.
        audit_retention: days that the audit is kept; the database lets none go within 90.
        limit_reports, limit_inquiries: of one device, a second; twenty times that at once.
        limit_channels: telemetry channels that one device writes within an hour.
        limit_refusals: requests of one device that it has no right to, a minute.
        limit_connections: of one device, at once; the newest stays.
        limit_logins, limit_login_interval: so many logins at once, then one each so many seconds.
        limit_traffic: bytes a second over one device's connections, both ways together.
        limit_takeovers: connections of one device that newcomers replace within a minute.
        providers: external identity providers of callers; `[[providers]]` in TOML, in the environment its JSON.
    """

    state_dir: Path = Path(".local")
    database_url: str = ""
    revocation_log: str = ""
    fabric: str = "restante"
    cell: str = "local"
    amqp_host: str = "127.0.0.1"
    amqp_port: int = _port(5672)
    management_url: str = "http://127.0.0.1:15672"
    amqps_url: str = "amqps://localhost:5671/devices"
    api_url: str = "https://localhost:8443"
    api_host: str = "127.0.0.1"
    api_port: int = _port(8443)
    auth_host: str = "127.0.0.1"
    auth_port: int = _port(8081)
    worker_host: str = "127.0.0.1"
    worker_port: int = _port(8082)
    edge: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    broker_certificate: str = ""
    broker_key: str = ""
    authority_certificate: str = ""
    log_level: str = "info"
    log_format: str = "text"
    backlog: int = _whole(layout.DEFAULT_BACKLOG, "commands", 1, 10_000)
    largest_backlog: int = _whole(layout.LARGEST_BACKLOG, "commands", 1, 10_000)
    ready_file: str = ""
    retention: int = _whole(30, "days", 1, 3650)
    audit_retention: int = _whole(400, "days", 91, 3650)
    limit_reports: int = _whole(_LIMITS.reports, "reports a second", 1, 1_000_000)
    limit_inquiries: int = _whole(_LIMITS.inquiries, "inquiries a second", 1, 1_000_000)
    limit_channels: int = _whole(_LIMITS.channels, "channels an hour", 1, 10_000)
    limit_refusals: int = _whole(_LIMITS.refusals, "refusals a minute", 1, 1_000_000)
    limit_connections: int = _whole(_LIMITS.connections, "connections", 1, 1_000)
    limit_logins: int = _whole(_LIMITS.logins, "logins", 1, 1_000_000)
    limit_login_interval: int = _whole(_LIMITS.login_interval, "seconds", 1, 3600)
    limit_traffic: int = _whole(_LIMITS.traffic, "bytes a second", 1_000, 1_000_000_000)
    limit_takeovers: int = _whole(_LIMITS.takeovers, "takeovers a minute", 1, 1_000_000)
    providers: tuple[Provider, ...] = ()

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir.resolve() / 'ledger.sqlite'}"

    @property
    def revocations(self) -> Path:
        return Path(self.revocation_log or self.state_dir.resolve() / "revocations" / "revocations.log")

    @property
    def limits(self) -> Limits:
        return Limits(**{each.name: getattr(self, f"limit_{each.name}") for each in fields(Limits)})


def as_environment(settings: Settings) -> dict[str, str]:
    """What `load` makes the same settings of."""
    values = {each.name: getattr(settings, each.name) for each in fields(Settings)}
    told = {name: str(value) for name, value in values.items()} | {"providers": providers.write(settings.providers)}
    return {f"{PREFIX}{name.upper()}": text for name, text in told.items()}


def load(environment: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Settings:
    """The settings of this process; `overrides` are those of its command line.

    Raises:
        BadSettings: an unknown name, a value of the wrong form, or values that contradict each other.
    """
    values: dict[str, object] = {}
    if environment.get(CONFIG):
        values.update(_from_file(Path(environment[CONFIG])))
    for name, text in environment.items():
        if name.startswith(PREFIX) and name not in _OTHERS:
            values[name.removeprefix(PREFIX).lower()] = text
    values.update(overrides or {})
    known = {setting.name: setting for setting in fields(Settings)}
    checked: dict[str, object] = {}
    for name, value in values.items():
        if name not in known:
            raise BadSettings(f"there is no setting '{name}'; the settings are: {', '.join(sorted(known))}")
        checked[name] = _checked(name, value, known[name].default, known[name].metadata.get(_WHOLE))
    settings = replace(Settings(), **checked)  # type: ignore[arg-type]  # each was checked against its default's type
    if settings.backlog > settings.largest_backlog:
        raise BadSettings(
            f"'backlog' ({settings.backlog}) is above 'largest_backlog' ({settings.largest_backlog}): "
            "raise the one or lower the other"
        )
    return settings


def _from_file(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSettings(f"the file that {CONFIG} names can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path} is not TOML: {error}") from None


def _checked(name: str, value: object, default: object, whole: _Whole | None) -> object:
    if whole is not None:
        try:
            number = int(str(value))
        except ValueError:
            raise BadSettings(f"'{name}' is a whole number, not {value!r}") from None
        if not whole.lowest <= number <= whole.highest:
            raise BadSettings(f"'{name}' is {whole.what} from {whole.lowest} to {whole.highest}, not {number}")
        return number
    if name == "providers":
        try:
            return providers.read(value)
        except ValueError as error:
            raise BadSettings(str(error)) from None
    if isinstance(default, Path):
        return Path(str(value))
    if not isinstance(value, str):
        raise BadSettings(f"'{name}' is a text")
    schemes: dict[str, tuple[str, ...]] = {
        "amqps_url": ("amqps://",),
        "api_url": ("https://", "http://"),
        "management_url": ("http://", "https://"),
    }
    if name in schemes and not value.startswith(schemes[name]):
        raise BadSettings(f"'{name}' starts with {' or '.join(schemes[name])}, unlike {value!r}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise BadSettings(f"'{name}' is one of {', '.join(_CHOICES[name])}")
    return value
