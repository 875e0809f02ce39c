"""RabbitMQ's management API, with the administrator's credential. Lives in the worker only."""

import contextlib
import ssl
from collections.abc import Mapping
from urllib.parse import quote

import httpx

from fabric.errors import BrokerUnavailable, FabricError
from fabric.presence import Listed
from topology import names
from topology.layout import Policy

TIMEOUT = 3.0  # seconds for one call
LISTING_TIMEOUT = 60.0  # seconds: the broker goes on with it when nobody waits any more, so it is not asked twice
_TEXT_LIMIT = 300  # characters of the broker's own words in an error


class ManagementRefused(FabricError):
    """The broker understood the call and refused it: a wrong credential, or a mistake in what was asked.
    No fault of whoever called us, so neither of the fabric's errors for those."""

    code = "management-refused"


class ManagementClient:
    """The port `fabric.ports.BrokerAdmin`."""

    def __init__(
        self,
        base_url: str,
        username: str,
        password: str,
        *,
        vhost: str = names.VHOST,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """`base_url` is the listener's, such as `http://127.0.0.1:15672`."""
        self._vhost = quote(vhost, safe="")
        self._client = httpx.AsyncClient(
            base_url=base_url,
            auth=httpx.BasicAuth(username, password),
            verify=verify,
            trust_env=False,  # the credential must not pass through a proxy that the environment names
            follow_redirects=False,
        )

    async def close_connections(self, username: str) -> int:
        """Close every connection of a user; returns how many there were.

        Goes through the broker's tracking tables, so it sees a connection the moment it is open; one that
        is still in its handshake is not there yet.
        """
        path = f"/api/connections/username/{quote(username, safe='')}"
        found = await self._call("GET", path)
        if not isinstance(found, list) or not found:
            return 0
        await self._call("DELETE", path)
        return len(found)

    async def connections(self) -> list[Listed]:
        """All connections, from the broker's statistics: up to `presence.AGE` old. Those that ended are not in it."""
        columns = "user,node,name,connected_at,recv_oct,send_oct"
        found = await self._call("GET", f"/api/connections?columns={columns}", timeout=LISTING_TIMEOUT)
        listed = [_listed(row) for row in found] if isinstance(found, list) else []
        return [each for each in listed if each is not None]

    async def close_connection(self, name: str) -> None:
        """Close one that `connections` shows. It follows the same statistics, so a younger one is not found."""
        await self._call("DELETE", f"/api/connections/{quote(name, safe='')}")

    async def put_policy(self, policy: Policy) -> None:
        """Create or replace a policy of the vhost."""
        body = {
            "pattern": policy.pattern,
            "apply-to": policy.apply_to,
            "definition": dict(policy.definition),
        }
        await self._call("PUT", f"/api/policies/{self._vhost}/{quote(policy.name, safe='')}", body)

    async def close(self) -> None:
        """Close the HTTP connections. Closing twice is closing once."""
        await self._client.aclose()

    async def _call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, timeout: float = TIMEOUT
    ) -> object:
        """The answer's JSON; None for one without a body, and for what does not exist.

        Raises:
            BrokerUnavailable: not reached, slow, or failing.
            ManagementRefused: anything else that is not a success.
        """
        try:
            answer = await self._client.request(method, path, json=body, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = str(error) or type(error).__name__
            raise BrokerUnavailable(f"the management API did not answer {method} {path}: {text}") from error
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.is_success:
            if not answer.content:
                return None
            with contextlib.suppress(ValueError):
                parsed: object = answer.json()
                return parsed
            raise BrokerUnavailable(f"the management API answered {method} {path} with something else than JSON")
        said = f"the management API answered {method} {path} with {answer.status_code}: {answer.text[:_TEXT_LIMIT]!r}"
        if answer.is_server_error or answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
            raise BrokerUnavailable(said)
        raise ManagementRefused(said)


def _listed(row: object) -> Listed | None:
    """None for a connection of which the statistics have only a part yet."""
    match row:
        case {
            "user": str(user),
            "node": str(node),
            "name": str(name),
            "connected_at": int(opened_at),
            "recv_oct": int(received),
            "send_oct": int(sent),
        }:
            return Listed(user, node, name, opened_at * 1000, received + sent)
        case _:
            return None
