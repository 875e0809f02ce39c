"""The floor: a command's round trip with nothing but the broker and two bare pika clients.

Run as a module it is the device: it consumes over TLS, acks, and answers at `reply_to`.
"""

import json
import ssl
import subprocess
import sys
from contextlib import ExitStack

import pika
from pika.adapters.blocking_connection import BlockingChannel

from api.operator.stack import Stack
from bench.peers import accounts
from topology import names

ACCOUNT = "bench.floor"
QUEUE = "bench.mailbox"


class Floor:
    """The sending side, and the process of the receiving one."""

    def __init__(self, stack: Stack) -> None:
        assert stack.broker is not None
        self._cleanup = ExitStack()
        password = self._cleanup.enter_context(accounts.account(stack, ACCOUNT)).password
        place = {
            "host": "localhost",
            "port": stack.broker.amqps_port,
            "authority": str(stack.files.authority),
            "password": password,
        }
        credentials = pika.PlainCredentials(ACCOUNT, password)
        self._connection = pika.BlockingConnection(
            # Without heartbeats: between its rounds nobody serves this connection.
            pika.ConnectionParameters("127.0.0.1", stack.settings.amqp_port, names.VHOST, credentials, heartbeat=0)
        )
        self._channel = self._connection.channel()
        self._channel.queue_declare(QUEUE, durable=True)
        self._channel.confirm_delivery()
        self._channel.basic_consume(names.DIRECT_REPLY_TO, self._answered, auto_ack=True)
        self._answers = 0
        self._device = subprocess.Popen([sys.executable, "-m", "bench.floor"], stdin=subprocess.PIPE)
        assert self._device.stdin is not None
        self._device.stdin.write(json.dumps(place).encode())
        self._device.stdin.close()
        self.round_trip()

    def round_trip(self) -> None:
        """Publish, confirmed and persistent; return when the answer is there."""
        wanted = self._answers + 1
        properties = pika.BasicProperties(
            reply_to=names.DIRECT_REPLY_TO, delivery_mode=2, content_type="application/json"
        )
        self._channel.basic_publish("", QUEUE, b"{}", properties, mandatory=True)
        while self._answers < wanted:
            self._connection.process_data_events(time_limit=10)

    def stop(self) -> None:
        self._device.terminate()
        self._device.wait(10)
        self._connection.close()
        self._cleanup.close()

    def _answered(self, *_: object) -> None:
        self._answers += 1


def _answer(channel: BlockingChannel, method: object, properties: pika.BasicProperties, body: bytes) -> None:
    channel.basic_ack(method.delivery_tag)  # type: ignore[attr-defined]  # pika.spec.Basic.Deliver
    channel.basic_publish("", properties.reply_to, body, pika.BasicProperties(correlation_id=properties.correlation_id))


def _device() -> None:
    place = json.loads(sys.stdin.read())
    context = ssl.create_default_context(cafile=place["authority"])
    parameters = pika.ConnectionParameters(
        place["host"],
        place["port"],
        names.VHOST,
        pika.PlainCredentials(ACCOUNT, place["password"]),
        ssl_options=pika.SSLOptions(context, place["host"]),
    )
    channel = pika.BlockingConnection(parameters).channel()
    channel.basic_qos(prefetch_count=3)
    channel.basic_consume(QUEUE, _answer)
    channel.start_consuming()


if __name__ == "__main__":
    _device()
