"""A GET over HTTPS to whoever the configuration names, within bounds: no redirect, no proxy, no address that is not
ours to call, so many bytes and seconds at most."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpcore

from fabric.errors import ProviderUnavailable
from fabric.outward import addresses
from fabric.outward.addresses import Network

MAX_BODY = 256 * 1024  # bytes
WITHIN = 3.0  # seconds for all of it: the name, the connection, TLS, and the answer however slowly it drips
_CONNECT = 1.0  # seconds for one address
_ADDRESSES = 4  # of one name that are tried

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host, in the order in which they are to be tried. Raises `OSError`."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """As the system does it, so also `127.1` and `0x7f000001` become what they mean."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class HttpsKeySource:
    """The port `fabric.ports.KeySource`: reads a JWK set from its URL."""

    def __init__(
        self, url: str, private: Collection[Network] = (), authority: Path | None = None, resolve: Resolve = resolve
    ) -> None:
        """
        Args:
            private: networks of ours that may be called.
            authority: who vouches for the host, in PEM; None: the system's authorities.

        Raises:
            OSError: the authority can't be read, or is no certificate.
        """
        self._url = url
        self._tls = ssl.create_default_context(cafile=authority)
        self._backend = _CheckedAddresses(private, resolve)

    async def fetch(self) -> bytes:
        """Raises `ProviderUnavailable`."""
        headers = [("Accept", "application/jwk-set+json, application/json"), ("Accept-Encoding", "identity")]
        try:
            async with (
                asyncio.timeout(WITHIN),
                httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._backend) as pool,
                pool.stream("GET", self._url, headers=headers) as answer,
            ):
                return await _body(answer)
        except TimeoutError:
            raise ProviderUnavailable(f"{self._url} did not answer within {WITHIN:g} s") from None
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise ProviderUnavailable(f"{self._url} can't be read: {said}") from error


async def _body(answer: httpcore.Response) -> bytes:
    if answer.status != 200:
        raise ProviderUnavailable(f"the answer is {answer.status}; it must be 200, and redirects are not followed")
    if any(name.lower() == b"content-encoding" for name, _ in answer.headers):
        raise ProviderUnavailable("the answer is encoded, which was not asked for")
    body = bytearray()
    async for chunk in answer.aiter_stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ProviderUnavailable(f"the answer has more than {MAX_BODY} bytes")
    return bytes(body)


class _CheckedAddresses(httpcore.AsyncNetworkBackend):
    """Connects to an address that was looked at: the name is resolved here, once, and nowhere else. TLS is checked for
    the name."""

    def __init__(self, private: Collection[Network], resolve: Resolve) -> None:
        self._private, self._resolve = private, resolve
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - httpcore's signature; ours is `_CONNECT`
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await self._resolve(host, port)
        allowed = [each for each in found if addresses.may_call(ip_address(each), self._private)][:_ADDRESSES]
        if not allowed:
            raise ProviderUnavailable(f"{host} has no address that may be called; 'allow_private' names private ones")
        for address in allowed[:-1]:
            try:
                return await self._network.connect_tcp(address, port, _CONNECT, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(allowed[-1], port, None, local_address, socket_options)
