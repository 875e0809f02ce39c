"""A second RabbitMQ node, with the broker's own MQTT plugin."""

from pathlib import Path

from api.operator.broker_files import LOOPBACK
from api.operator.node import BrokerNode
from api.operator.secrets import replace_private
from api.operator.sockets import free_port
from api.operator.stack import Stack
from api.operator.userland import find_binaries
from bench.peers import accounts
from bench.peers.mqtt import Place
from topology import access, names

_PLUGINS = b"[rabbitmq_auth_backend_cache,rabbitmq_auth_backend_http,rabbitmq_event_exchange,rabbitmq_management,"
_PLUGINS += b"rabbitmq_mqtt,rabbitmq_prometheus].\n"
_ACCOUNT = "bench.mqtt"


class _MqttNode(BrokerNode):
    """The same node as the fabric's, with MQTT listeners beside. It lets in its own accounts alone."""

    plain_port = 0
    tls_port = 0

    def _write_files(self) -> None:
        super()._write_files()
        self.plain_port = free_port(LOOPBACK, besides=set())
        self.tls_port = free_port(LOOPBACK, besides={self.plain_port})
        options = {
            "mqtt.listeners.tcp.1": f"{LOOPBACK}:{self.plain_port}",
            "mqtt.listeners.ssl.1": f"{LOOPBACK}:{self.tls_port}",
            "mqtt.vhost": names.VHOST,
            "mqtt.tcp_listen_options.nodelay": "true",
            "mqtt.max_packet_size_authenticated": "327680",  # not above `max_message_size`
        }
        text = "".join(f"{name} = {value}\n" for name, value in options.items())
        replace_private(self._home / "etc" / "conf.d" / "30-mqtt.conf", text.encode())
        replace_private(self._home / "etc" / "enabled_plugins", _PLUGINS)


class RabbitMqtt:
    """A running node that speaks MQTT."""

    def __init__(self, home: Path, stack: Stack) -> None:
        self._node = _MqttNode(
            home,
            certificate=stack.files.broker_certificate,
            key=None,
            authority=stack.files.authority,
            auth_url="http://127.0.0.1:9/none",  # nobody: all accounts are internal
            binaries=find_binaries(log=lambda _: None),
            log=lambda _: None,
        )
        self._node.start()
        try:
            url = f"http://{LOOPBACK}:{self._node.management_port}"
            made = accounts.make(url, self._node.password(access.ADMIN), _ACCOUNT)
        except BaseException:
            self._node.stop()
            raise
        self.place = Place(
            self._node.plain_port, self._node.tls_port, str(stack.files.authority), made.name, made.password
        )

    def stop(self) -> None:
        self._node.stop()
