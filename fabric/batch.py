"""Batching by load: what has queued up while the last flush ran goes into the next one.

A lone item is flushed at once; under load the batches grow by themselves and one transaction carries many.
An item may be patient: it starts no flush of its own for a while, and goes with the next one that is started.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from fabric.errors import Temporary

T = TypeVar("T")
R = TypeVar("R")

BATCH = 500  # weight of one flush: bounds a transaction's length
QUEUE = 10_000  # items that wait for a flush; more wait outside, in `submit`


class Batcher(Generic[T, R]):
    """Collects items into batches for `flush`, which returns a result or an exception for each, in order.

    When `flush` raises `Temporary`, every item of the batch fails with it. When it raises anything else, each
    item is flushed again alone, so that one the database refuses can't fail its neighbours.

    Args:
        flush: is never called twice at once. May be called again for an item whose batch failed.
        weigh: an item's share of `batch`.
        batch: the weight after which a batch is closed; a single item may be heavier.
        queue: how many items may wait; `submit` waits for room beyond it.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        weigh: Callable[[T], int] = lambda _: 1,
        batch: int = BATCH,
        queue: int = QUEUE,
    ) -> None:
        self._flush, self._weigh, self._batch = flush, weigh, batch
        self._room = asyncio.Semaphore(queue)
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="batcher")

    async def stop(self) -> None:
        """Flush what is queued, then end. Stopping twice is stopping once."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await asyncio.shield(self._task)

    async def submit(self, item: T, patience: float = 0.0) -> R:
        """The item's result, once its batch was flushed.

        Args:
            item: what to flush.
            patience: seconds that it waits for another item to start a flush, at most.

        A caller that is cancelled while the item still waits takes it back; later, its fate is unknown.

        Raises:
            Temporary: stopped, or the flush could not be done.
            Exception: whatever `flush` said about this item.
        """
        await self._room.acquire()
        if self._closed or self._task is None:
            self._room.release()
            raise Temporary("the ledger takes no more writes: it is being stopped")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if patience:
            asyncio.get_running_loop().call_later(patience, self._wake.set)
        else:
            self._wake.set()
        return await future

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            batch = self._take()
            if batch:
                await self._settle(batch)
            elif self._closed:
                return
            else:
                self._wake.clear()

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        taken: list[tuple[T, asyncio.Future[R]]] = []
        weight = 0
        while self._queue:
            item, future = self._queue[0]
            if not future.cancelled():
                weight += self._weigh(item)
                if taken and weight > self._batch:
                    break
                taken.append((item, future))
            self._queue.popleft()
            self._room.release()
        return taken

    async def _settle(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._flush([item for item, _ in batch])
        except Temporary as error:
            results = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must reach those who wait
            if len(batch) > 1:
                for one in batch:
                    await self._settle([one])
                return
            results = [error]
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
