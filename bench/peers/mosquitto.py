"""Mosquitto, with a configuration, a folder and ports of its own."""

from pathlib import Path

from api.operator.processes import Child
from api.operator.sockets import free_port
from bench.peers import packages, processes
from bench.peers.mqtt import Place

LOOPBACK = "127.0.0.1"


class Mosquitto:
    """A running server. `no_delay`: as its manual says where latency matters; else it has its defaults."""

    def __init__(self, home: Path, certificate: Path, authority: Path, *, no_delay: bool) -> None:
        """Raises `NotHereError`."""
        program = packages.program("mosquitto", "mosquitto")
        data = home / "data"
        data.mkdir(mode=0o700, parents=True)
        plain = free_port(LOOPBACK, besides=set())
        tls = free_port(LOOPBACK, besides={plain})
        lines = [
            "user root",  # as whom it is started; it would look for a user that only its package makes
            f"listener {plain} {LOOPBACK}",
            "allow_anonymous true",
            f"listener {tls} {LOOPBACK}",
            f"certfile {certificate}",
            f"keyfile {certificate}",
            "persistence true",
            f"persistence_location {data}/",
            "log_type error",
            "log_type warning",
        ]
        if no_delay:
            lines.append("set_tcp_nodelay true")
        configuration = home / "mosquitto.conf"
        configuration.write_text("\n".join(lines) + "\n")
        self._server: Child = processes.start_server(
            [str(program.path), "-c", str(configuration)], program.environment, home, "mosquitto", plain
        )
        self.place = Place(plain, tls, str(authority))

    def stop(self) -> None:
        processes.end(self._server)
