"""The composition root: which adapter stands behind which port, from the settings."""

from dataclasses import dataclass

from api.operator.secrets import account_password
from api.settings import Settings
from fabric.amqp.connection import Endpoint, Link
from fabric.amqp.publisher import AmqpPublisher


@dataclass(frozen=True, slots=True)
class Broker:
    """Two connections: an alarm blocks a publishing connection, acks included."""

    publishing: Link
    consuming: Link
    publisher: AmqpPublisher

    async def start(self) -> None:
        await self.publishing.start()
        await self.consuming.start()

    async def stop(self) -> None:
        await self.consuming.stop()
        await self.publisher.close()
        await self.publishing.stop()


def broker(settings: Settings, account: str) -> Broker:
    """The links of one process, logged in as its service account."""
    endpoint = Endpoint(settings.amqp_host, settings.amqp_port, account, account_password(settings.state_dir, account))
    publishing = Link(endpoint, f"{account} publishing")
    return Broker(publishing, Link(endpoint, f"{account} consuming"), AmqpPublisher(publishing))
