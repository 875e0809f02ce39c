"""What `restante doctor` looks at in the broker: doors, accounts, topology, and whether a worker reads."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from api.operator import doors
from api.operator.findings import Level, Problem
from api.operator.secrets import account_password
from api.operator.sockets import own_address
from api.operator.userland import MINIMUM
from api.settings import Settings
from fabric.amqp.connection import Endpoint, Link
from fabric.amqp.declarer import counts
from topology import access, layout, names

PLUGINS: Final = frozenset(
    {"rabbitmq_management", "rabbitmq_auth_backend_http", "rabbitmq_auth_backend_cache", "rabbitmq_event_exchange",
     "rabbitmq_prometheus"}
)  # fmt: skip
_PUBLIC: Final = frozenset({"amqp/ssl"})
_INSIDE: Final = frozenset({"amqp", "clustering", "http", "http/prometheus"})
_TIMEOUT = 5.0  # seconds for a request
_BACKLOG = 10_000  # reports
_VHOST = quote(names.VHOST, safe="")
_TOLD_WITHIN: Final = 15  # seconds: a node tells so much about itself with its statistics, every 10 s
_NONSENSE: Final = {
    "username": "nobody.at-all",
    "password": "nonsense",
    "vhost": "/",
    "resource": "exchange",
    "name": "amq.default",
    "permission": "write",
    "routing_key": "#",
}


async def broker(settings: Settings) -> str:
    """It answers, is new enough, and blocks nobody."""
    async with _management(settings) as get:
        version, blocked = str((await get("/overview"))["rabbitmq_version"]), await get.alarms()
    if tuple(int(part) for part in version.split("-", maxsplit=1)[0].split(".")) < MINIMUM:
        raise Problem(f"RabbitMQ {version} can't hold a device in its place; install 4.2.6 or newer")
    if blocked:
        raise Problem(f"it blocks all publishers ({', '.join(blocked)}): give it memory or disk (docs/operations.md)")
    return f"RabbitMQ {version}"


async def offers(settings: Settings) -> str:
    """Nobody gets in but by PLAIN with our answer: SECURITY.md's first rule, by knocking."""
    place = urlsplit(settings.management_url)
    password = _password(settings, access.ADMIN)
    try:
        await asyncio.to_thread(doors.check, settings.amqp_host, settings.amqp_port, place.port or 15672, password)
        account = access.WORKER
        await doors.check_amqp_1_0(settings.amqp_host, settings.amqp_port, account, _password(settings, account))
    except doors.DoorOpen as error:
        raise Problem(f"{error}; see deploy/rabbitmq") from None
    async with _management(settings) as get:
        overview, plugins = await get("/overview"), await _plugins(get)
    if more := plugins - PLUGINS:
        raise Problem(f"it has the plugins {', '.join(sorted(more))}; disable what is not needed")
    for listener in overview["listeners"]:
        protocol, address = str(listener["protocol"]), str(listener["ip_address"])
        if protocol not in _PUBLIC | _INSIDE:
            raise Problem(f"it listens for {protocol}; switch that off")
        if protocol in _INSIDE and not _is_inside(address):
            raise Problem(f"its listener for {protocol} is on {address}; bind it to loopback or the internal network")
    return "PLAIN only, no AMQP 1.0, our users, vhost and plugins; what is internal listens internally"


async def accounts(settings: Settings) -> str:
    """Each service account has its rights, and no more."""
    async with _management(settings) as get:
        users, permissions = await get("/users"), await get(f"/vhosts/{_VHOST}/permissions")
    held = {row["user"]: (row["configure"], row["write"], row["read"]) for row in permissions}
    tags = {row["name"]: set(_tags(row["tags"])) for row in users}
    for account in access.ACCOUNTS:
        if account.name not in tags:
            raise Problem(f"{account.name} is missing: import etc/definitions.json, or start the node anew")
        if tags[account.name] != set(account.tags):
            raise Problem(
                f"{account.name} has the tags {sorted(tags[account.name])} and must have {list(account.tags)}"
            )
        if held.get(account.name) != (account.configure, account.write, account.read):
            raise Problem(f"{account.name} has other rights than `restante topology show` says: import the definitions")
    return f"{len(access.ACCOUNTS)} service accounts, each with its rights"


async def topology(settings: Settings) -> str:
    """Exchanges, queues, bindings and policies are there, and as they must be."""
    async with _management(settings) as get:
        exchanges = {row["name"]: row["type"] for row in await get(f"/exchanges/{_VHOST}?columns=name,type")}
        bindings = {
            (row["source"], row["destination"], row["routing_key"])
            for queue in layout.QUEUES
            for row in await get(f"/queues/{_VHOST}/{queue.name}/bindings") or ()
        }
        found = {queue.name: await get(f"/queues/{_VHOST}/{queue.name}") for queue in layout.QUEUES}
        policies = {row["name"]: row for row in await get(f"/policies/{_VHOST}")}
    wrong = [f"exchange {each.name}" for each in layout.EXCHANGES if exchanges.get(each.name) != each.kind]
    wrong += [f"queue {each.name}" for each in layout.QUEUES if not _is_like(found[each.name], each)]
    wrong += [
        f"binding {each.key} of {each.queue}"
        for each in layout.BINDINGS
        if (each.exchange, each.queue, each.key) not in bindings
    ]
    for policy in layout.policies(settings.largest_backlog):
        row = policies.get(policy.name, {})
        said = (row.get("pattern"), row.get("apply-to"), row.get("definition"))
        if said != (policy.pattern, policy.apply_to, dict(policy.definition)):
            wrong.append(f"policy {policy.name}")
    if wrong:
        raise Problem(
            f"{', '.join(wrong)}: missing or different; a worker declares them when it starts, and says why not"
        )
    return f"{len(layout.QUEUES)} queues and all exchanges, bindings and policies are as they must be"


async def worker(settings: Settings) -> str:
    """Somebody reads what devices say, and keeps up."""
    endpoint = Endpoint(settings.amqp_host, settings.amqp_port, access.WORKER, _password(settings, access.WORKER))
    link = Link(endpoint, "doctor")
    await link.start()
    try:
        await link.ready(_TIMEOUT)
        ready, consumers = await counts(link, names.REPORTS)
    finally:
        await link.stop()
    if not consumers:
        raise Problem("no worker reads the reports of devices; start one")
    if ready > _BACKLOG:
        raise Problem(f"{ready} reports wait for {consumers} workers; start more of them", Level.WARN)
    return f"{consumers} at work, {ready} reports wait"


async def auth(settings: Settings) -> str:
    """Nonsense is denied, with that word and no other."""
    host = own_address(settings.auth_host)
    base = f"http://{f'[{host}]' if ':' in host else host}:{settings.auth_port}/broker/auth"
    async with httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False) as http:
        for what in ("user", "vhost", "resource", "topic"):
            answer = await http.post(f"{base}/{what}", data=_NONSENSE)
            if answer.status_code != httpx.codes.OK or answer.content != b"deny":
                raise Problem(f"{base}/{what} answers nonsense with {answer.content[:40]!r} and must say deny")
    return "denies nonsense"


async def _plugins(get: "_Get") -> set[str]:
    """Those of all nodes; a node that has just started has not told them yet."""
    for _ in range(_TOLD_WITHIN):
        nodes = await get("/nodes")
        if all("enabled_plugins" in node for node in nodes):
            return {plugin for node in nodes for plugin in node["enabled_plugins"]}
        await asyncio.sleep(1.0)
    raise Problem(f"it has not said within {_TOLD_WITHIN} s which plugins it has; look again")


class _Get:
    """GETs of the management API; None for what is not there."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def __call__(self, path: str) -> Any:
        answer = await self._http.get(f"/api{path}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise Problem(f"the management API refuses the password of {access.ADMIN} in the state directory")
        answer.raise_for_status()
        return answer.json()

    async def alarms(self) -> list[str]:
        """What has run out, as of now; `/nodes` tells it as of the last statistics."""
        answer = await self._http.get("/api/health/checks/alarms")
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return sorted({str(alarm["resource"]) for alarm in answer.json()["alarms"]})
        answer.raise_for_status()
        return []


@asynccontextmanager
async def _management(settings: Settings) -> AsyncIterator[_Get]:
    auth = httpx.BasicAuth(access.ADMIN, _password(settings, access.ADMIN))
    url = settings.management_url
    async with httpx.AsyncClient(base_url=url, auth=auth, timeout=_TIMEOUT, trust_env=False) as http:
        yield _Get(http)


def _password(settings: Settings, account: str) -> str:
    """It must be there already: one that was made now would be nobody's."""
    if not (settings.state_dir / "secrets" / account).exists():
        raise Problem(f"the password of {account} is not here; run this where a worker runs")
    return account_password(settings.state_dir, account)


def _is_inside(address: str) -> bool:
    """Loopback, or an address of a private network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_loopback or (found.is_private and not found.is_unspecified)


def _is_like(found: Mapping[str, Any] | None, queue: layout.Queue) -> bool:
    return (
        found is not None
        and found["durable"]
        and all(found["arguments"].get(name) == value for name, value in queue.arguments.items())
    )


def _tags(given: object) -> list[str]:
    return [tag for tag in given.split(",") if tag] if isinstance(given, str) else list(given or ())  # type: ignore[call-overload]  # as older brokers write it
