"""A command's round trip over MQTT with paho: a request at QoS 1, and the device's answer at QoS 1.

Run as a module it is the device: it connects over TLS with a session that outlives its connection, and answers each
request with the number of those it has had, so that whoever asks sees that none was answered by anything else.
"""

import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from bench.peers import processes

_PATIENCE = 10.0  # seconds for one step
_QOS = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A server's listeners on loopback, and whom its TLS certificate is from. No user: anybody may."""

    plain_port: int
    tls_port: int
    authority: str
    user: str = ""
    password: str = ""


class MqttCommands:
    """The sending side, and the process of the device.

    With `no_delay` neither end leaves its small packets to Nagle's algorithm, and this side serves its connection
    itself, as `loop()` is for. Without, both are as paho's documentation begins: `loop_start`, the socket's defaults.
    """

    def __init__(self, place: Place, home: Path, name: str, *, no_delay: bool) -> None:
        self._own_loop = no_delay
        self._sent, self._answered = 0, 0
        self._news = threading.Event()
        self._topics = f"commands/{name}", f"outcomes/{name}"
        told = {"place": asdict(place), "topics": self._topics, "name": name, "no_delay": no_delay}
        self._client = _client(place, f"{name}-sender", no_delay=no_delay, lasting=False)
        self._client.on_message = self._on_answer
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.on_connect = lambda client, *_: client.subscribe(self._topics[1], _QOS)
        self._client.connect("127.0.0.1", place.plain_port)
        if not self._own_loop:
            self._client.loop_start()
        self._serve(subscribed.is_set)
        self._device = processes.start_device("bench.peers.mqtt", home, name, told)

    def round_trip(self) -> None:
        """Publish; return when the server has acknowledged it and the device's answer is there."""
        self._sent += 1
        self._news.clear()
        sent = self._client.publish(self._topics[0], b"{}", _QOS)
        if self._own_loop:
            self._serve(lambda: self._news.is_set() and sent.is_published())
        else:
            sent.wait_for_publish(_PATIENCE)
            self._news.wait(_PATIENCE)
        if self._answered != self._sent:
            raise RuntimeError(f"the device has had {self._answered} commands of {self._sent}")

    def stop(self) -> None:
        processes.end(self._device)
        self._client.disconnect()
        if not self._own_loop:
            self._client.loop_stop()

    def _serve(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + _PATIENCE
        while not done():
            if time.monotonic() > until:
                raise TimeoutError("the MQTT server or the device does not answer")
            if self._own_loop:
                self._client.loop(timeout=1.0)
            else:
                time.sleep(0.01)

    def _on_answer(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        self._answered = int(message.payload)
        self._news.set()


def _client(place: Place, id: str, *, no_delay: bool, lasting: bool) -> paho.Client:
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=id, clean_session=not lasting)
    if place.user:
        client.username_pw_set(place.user, place.password)
    if no_delay:
        client.on_socket_open = _no_delay
    return client


def _no_delay(_client: paho.Client, _userdata: object, link: object) -> None:
    cast(socket.socket, link).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _device(place: Place, name: str, topics: tuple[str, str], *, no_delay: bool) -> None:
    """Answer until told to end."""
    commands, outcomes = topics
    had = 0

    def on_command(client: paho.Client, _userdata: object, _message: paho.MQTTMessage) -> None:
        nonlocal had
        had += 1
        client.publish(outcomes, str(had), _QOS)

    client = _client(place, name, no_delay=no_delay, lasting=True)
    client.tls_set_context(ssl.create_default_context(cafile=place.authority))
    client.on_message = on_command
    client.on_connect = lambda client, *_: client.subscribe(commands, _QOS)
    client.on_subscribe = lambda *_: print(processes.READY)
    client.connect("localhost", place.tls_port)
    client.loop_forever()


def _main() -> None:
    told = processes.told(sys.argv)
    _device(Place(**told["place"]), told["name"], tuple(told["topics"]), no_delay=told["no_delay"])


if __name__ == "__main__":
    _main()
