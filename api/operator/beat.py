"""A file that is touched while a process can do its work: what a container's health check looks at."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fabric.worker.clocks import keep_running

EVERY = 2.0  # seconds


async def beat(file: str, ready: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
    """Touch `file` for ever, as long as `ready` has no reason against it; without a file, do nothing."""
    if not file:
        return

    async def once() -> None:
        if not await ready():
            await asyncio.to_thread(Path(file).touch)

    await keep_running("beat", EVERY, once)
