"""What the gateway's routes work with, assembled by the composition root (`api.operator.wiring`)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from api.lasting import Lasting
from api.paging import Cursors
from fabric.authorities import Pinned
from fabric.clock import Clock
from fabric.commands import Commands
from fabric.cutting import Cutter
from fabric.devices import Devices
from fabric.feed import Feed
from fabric.identity.enrollment import Enrollment
from fabric.identity.external import ExternalTokens
from fabric.identity.issued import IssuedTokens
from fabric.identity.login import Audiences, DeviceLogins
from fabric.identity.revocation import Revocation
from fabric.identity.rotation import Rotation
from fabric.keyring import Keys
from fabric.ports import Audit, ConnectionCloser, Ledger, Registry
from fabric.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class Peering:
    """What a device is told at enrollment: where to go, and whom to believe."""

    amqps_url: str
    api_url: str
    audiences: Audiences
    authorities: Pinned
    signing_keys: Keys


@dataclass(frozen=True, slots=True)
class Services:
    """`leaving` is set when the gateway is to stop: it goes on until the edge in front has noticed. `stopping` is set
    when it stops: whatever would go on for long then ends. `backlog` is the limit of mailboxes that have none of
    their own. `ready` names what is not ready yet, with its reason; empty when the gateway can do its work."""

    commands: Commands
    lasting: Lasting
    cutter: Cutter
    devices: Devices
    telemetry: Telemetry
    enrollment: Enrollment
    rotation: Rotation
    revocation: Revocation
    logins: DeviceLogins
    tokens: IssuedTokens
    external: ExternalTokens
    ledger: Ledger
    registry: Registry
    audit: Audit
    clock: Clock
    peering: Peering
    token_keys: Keys
    cursors: Cursors
    vhost: str
    closer: ConnectionCloser
    feed: Feed
    leaving: asyncio.Event
    stopping: asyncio.Event
    backlog: int
    ready: Callable[[], Awaitable[Mapping[str, str]]]
