"""What the gateway's routes work with, assembled by the composition root (`api.operator.wiring`)."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from fabric.clock import Clock
from fabric.commands import Commands
from fabric.devices import Devices
from fabric.identity.enrollment import Enrollment
from fabric.identity.issued import IssuedTokens
from fabric.identity.login import Audiences, DeviceLogins
from fabric.ports import Ledger, Registry
from fabric.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Peering:
    """What a device is told at enrollment: where to go, and whom to believe."""

    amqps_url: str
    api_url: str
    audiences: Audiences
    authority_pem: str
    signing_keys: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Services:
    """`ready` names what is not ready yet, with its reason; empty when the gateway can do its work."""

    commands: Commands
    devices: Devices
    telemetry: Telemetry
    enrollment: Enrollment
    logins: DeviceLogins
    tokens: IssuedTokens
    ledger: Ledger
    registry: Registry
    clock: Clock
    peering: Peering
    token_keys: Mapping[str, object]
    vhost: str
    ready: Callable[[], Awaitable[Mapping[str, str]]]
