"""Settings, read once at the edge: environment variables `RESTANTE_*` over a TOML file over defaults.

A name or value that is not understood is an error, and nothing starts.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

PREFIX = "RESTANTE_"
CONFIG = f"{PREFIX}CONFIG"  # names the TOML file

# Set for other programs of this project; not settings of the server.
_OTHERS = frozenset({CONFIG, f"{PREFIX}AGENT_STATE", f"{PREFIX}TICKET", f"{PREFIX}RABBITMQ", f"{PREFIX}TOKEN_FILE"})


class BadSettings(ValueError):
    """A setting that is unknown or unusable; the text says which and what is expected."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. In TOML and in the environment they have these names (`RESTANTE_API_PORT=8443`).

    Attributes:
        state_dir: keys, certificates, secrets and the SQLite ledger; 0700.
        database_url: `sqlite:///path` or `postgresql://…`; empty: SQLite in the state directory.
        fabric: the name that tokens' audiences begin with.
        cell: the name of the broker that this stack serves.
        amqp_host, amqp_port: the broker's plain listener, for the fabric.
        management_url: the broker's management API.
        amqps_url: where devices connect; the path is the vhost.
        api_url: where callers and devices reach the gateway.
        api_host, api_port: where the gateway listens.
        auth_host, auth_port: where the gateway answers the broker's questions; internal.
        tls_certificate, tls_key: of the gateway's listener; empty: plain HTTP behind an edge.
    """

    state_dir: Path = Path(".local")
    database_url: str = ""
    fabric: str = "restante"
    cell: str = "local"
    amqp_host: str = "127.0.0.1"
    amqp_port: int = 5672
    management_url: str = "http://127.0.0.1:15672"
    amqps_url: str = "amqps://localhost:5671/devices"
    api_url: str = "https://localhost:8443"
    api_host: str = "127.0.0.1"
    api_port: int = 8443
    auth_host: str = "127.0.0.1"
    auth_port: int = 8081
    tls_certificate: str = ""
    tls_key: str = ""
    log_level: str = "info"

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir.resolve() / 'ledger.sqlite'}"


def load(environment: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Settings:
    """The settings of this process; `overrides` are those of its command line.

    Raises:
        BadSettings: an unknown name, or a value of the wrong form.
    """
    values: dict[str, object] = {}
    if environment.get(CONFIG):
        values.update(_from_file(Path(environment[CONFIG])))
    for name, text in environment.items():
        if name.startswith(PREFIX) and name not in _OTHERS:
            values[name.removeprefix(PREFIX).lower()] = text
    values.update(overrides or {})
    known = {field.name: field.type for field in fields(Settings)}
    checked: dict[str, object] = {}
    for name, value in values.items():
        if name not in known:
            raise BadSettings(f"there is no setting '{name}'; the settings are: {', '.join(sorted(known))}")
        checked[name] = _checked(name, value, getattr(Settings(), name))
    return replace(Settings(), **checked)  # type: ignore[arg-type]  # each was checked against its default's type


def _from_file(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSettings(f"the file that {CONFIG} names can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{path} is not TOML: {error}") from None


def _checked(name: str, value: object, default: object) -> object:
    if isinstance(default, int):
        try:
            number = int(str(value))
        except ValueError:
            raise BadSettings(f"'{name}' is a whole number, not {value!r}") from None
        if not 0 < number < 65536:
            raise BadSettings(f"'{name}' is a port from 1 to 65535, not {number}")
        return number
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
    if name == "log_level" and value not in ("debug", "info", "warning", "error"):
        raise BadSettings("'log_level' is one of debug, info, warning, error")
    return value
