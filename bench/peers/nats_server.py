"""nats-server, with a configuration and a port of its own, and request–reply over it with nats-py.

Run as a module it is the device: it connects over TLS, and answers each request with the number of those it has had.
"""

import asyncio
import json
import ssl
import sys
from pathlib import Path

import nats
import uvloop
from nats.aio.msg import Msg

from api.operator.sockets import free_port
from bench.peers import packages, processes

LOOPBACK = "127.0.0.1"
_SUBJECT = "commands.device"
_PATIENCE = 10.0  # seconds for one request


class Nats:
    """A running server, the sending side, and the process of the device."""

    def __init__(self, home: Path, certificate: Path, authority: Path) -> None:
        """Raises `NotHereError`."""
        program = packages.program("nats-server", "nats-server")
        home.mkdir(mode=0o700)
        port = free_port(LOOPBACK, besides=set())
        configuration = home / "nats.conf"
        configuration.write_text(
            json.dumps(
                {
                    "host": LOOPBACK,
                    "port": port,
                    "tls": {"cert_file": str(certificate), "key_file": str(certificate)},
                    "allow_non_tls": True,  # the back end is on the same machine
                }
            )
        )
        self._server = processes.start_server(
            [str(program.path), "-c", str(configuration)], program.environment, home, "nats", port
        )
        self._device = processes.start_device(
            "bench.peers.nats_server", home, "nats-device", {"port": port, "authority": str(authority)}
        )
        self._sent = 0
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._client = self._runner.run(nats.connect(f"nats://{LOOPBACK}:{port}", max_reconnect_attempts=0))

    def round_trip(self) -> None:
        """Ask; return when the device's answer is there."""
        self._runner.run(self._ask())

    def stop(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        processes.end(self._device)
        processes.end(self._server)

    async def _ask(self) -> None:
        self._sent += 1
        answer = await self._client.request(_SUBJECT, b"{}", timeout=_PATIENCE)
        if int(answer.data) != self._sent:
            raise RuntimeError(f"the device has had {int(answer.data)} commands of {self._sent}")


async def _device(port: int, authority: str) -> None:
    """Answer until told to end."""
    had = 0

    async def on_command(message: Msg) -> None:
        nonlocal had
        had += 1
        await message.respond(str(had).encode())

    context = ssl.create_default_context(cafile=authority)
    client = await nats.connect(f"tls://localhost:{port}", tls=context, tls_hostname="localhost")
    await client.subscribe(_SUBJECT, cb=on_command)
    await client.flush()
    print(processes.READY)
    await asyncio.Event().wait()


if __name__ == "__main__":
    given = processes.told(sys.argv)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_device(given["port"], given["authority"]))
