"""One of several processes that write to the same ledger at once; started by `test_sql_processes.py`.

Reads the URL, its own name, the devices and the ids of commands they all fight over from its first line of
input, says `ready`, starts at the second line, and prints what it was told as one JSON document.
"""

import asyncio
import json
import random
import sys

from fabric.command import Answered, Confirmed, Event, Receipted, Republished, State
from fabric.model import Change, Changed
from fabric.sql import open_store
from tests.integration.sql.values import accept, draft
from topology.names import CommandId, DeviceId

ACCEPTS = 60


async def main() -> None:
    told = json.loads(sys.stdin.readline())
    store = await open_store(told["url"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    agent = f"agent-{told['name']}"
    events: list[Event] = [
        Confirmed(1),
        Republished(1, agent),
        Receipted(agent, running=True, progress=agent),
        Answered(agent, State.SUCCEEDED, None, "text/plain", agent.encode()),
    ]
    changes: list[tuple[str, int]] = []
    settled: list[str] = []

    async def fight(id: CommandId) -> None:
        for event in events:
            await asyncio.sleep(random.uniform(0, 0.01))
            (result,) = await store.ledger.write(Change(id, event))
            assert isinstance(result, Changed)
            if result.step.entry is not None:
                changes.append((id, result.step.command.version))
            if result.step.settled:
                settled.append(id)

    async def submit(number: int) -> tuple[str, int]:
        await asyncio.sleep(random.uniform(0, 0.05))
        command = await accept(store.ledger, draft(DeviceId(told["devices"][number % len(told["devices"])])))
        return command.device, command.seq

    fights = asyncio.gather(*(fight(CommandId(id)) for id in told["commands"]))
    accepted = await asyncio.gather(*(submit(number) for number in range(ACCEPTS)))
    await fights
    await store.close()
    sys.stdout.write(json.dumps({"accepted": accepted, "changes": changes, "settled": settled}))


asyncio.run(main())
