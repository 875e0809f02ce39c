"""The composition root: which adapter stands behind which port, from the settings."""

from dataclasses import dataclass
from functools import partial

from api.operator.secrets import account_password
from api.settings import Settings
from fabric.amqp.connection import Endpoint, Link
from fabric.amqp.declarer import declare_topology
from fabric.amqp.mending import mend_streams
from fabric.amqp.publisher import AmqpPublisher
from fabric.ports import BrokerAdmin, Ledger
from fabric.worker.clocks import refill
from topology import layout


@dataclass(frozen=True, slots=True)
class Broker:
    """Two connections: an alarm blocks a publishing connection, acks included."""

    publishing: Link
    consuming: Link
    publisher: AmqpPublisher

    async def start(self) -> None:
        await self.publishing.start()
        await self.consuming.start()

    def problems(self) -> dict[str, str]:
        """Which of the two is missing."""
        links = (("broker-publishing", self.publishing), ("broker-consuming", self.consuming))
        return {what: "not connected" for what, link in links if not link.connected.is_set()}

    async def stop(self) -> None:
        await self.consuming.stop()
        await self.publisher.close()
        await self.publishing.stop()


def broker(settings: Settings, account: str) -> Broker:
    """The links of one process, logged in as its service account."""
    endpoint = Endpoint(settings.amqp_host, settings.amqp_port, account, account_password(settings.state_dir, account))
    publishing = Link(endpoint, f"{account} publishing")
    return Broker(publishing, Link(endpoint, f"{account} consuming"), AmqpPublisher(publishing))


async def prepare(link: Link, ledger: Ledger, admin: BrokerAdmin, settings: Settings) -> None:
    """Give a broker its topology and policies, and what its streams have lost; idempotent. For the worker's account."""
    await declare_topology(link)
    await mend_streams(link, partial(refill, ledger))
    for policy in layout.policies(settings.largest_backlog):
        await admin.put_policy(policy)
