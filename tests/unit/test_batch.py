"""The batcher, with a flush that does as it is told."""

import asyncio
from collections.abc import Sequence

import pytest

from fabric.batch import Batcher
from fabric.errors import Temporary


class Flush:
    """Doubles what it is given, in its own time."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0

    async def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.running += 1
        assert self.running == 1
        self.batches.append(list(items))
        await self.gate.wait()
        self.running -= 1
        if any(item < 0 for item in items):
            raise ValueError(items)
        if 13 in items:
            raise Temporary("away")
        return [LookupError(item) if item == 7 else 2 * item for item in items]


async def test_what_queues_up_during_a_flush_goes_into_the_next() -> None:
    flush = Flush()
    batcher = Batcher(flush, batch=4)
    batcher.start()
    batcher.start()
    flush.gate.clear()
    first = asyncio.create_task(batcher.submit(0))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(batcher.submit(item)) for item in range(1, 7)]
    await asyncio.sleep(0.01)
    flush.gate.set()
    assert await asyncio.gather(first, *others) == [0, 2, 4, 6, 8, 10, 12]
    assert flush.batches == [[0], [1, 2, 3, 4], [5, 6]]
    await batcher.stop()
    await batcher.stop()
    with pytest.raises(Temporary):
        await batcher.submit(1)


async def test_each_item_has_its_own_result_or_exception() -> None:
    batcher = Batcher(Flush())
    batcher.start()
    results = await asyncio.gather(*(batcher.submit(item) for item in (6, 7, 8)), return_exceptions=True)
    assert (results[0], results[2]) == (12, 16)
    assert isinstance(results[1], LookupError)
    await batcher.stop()


async def test_a_failing_batch_is_tried_item_by_item() -> None:
    flush = Flush()
    batcher = Batcher(flush)
    batcher.start()
    results = await asyncio.gather(*(batcher.submit(item) for item in (1, -2, 7, 4)), return_exceptions=True)
    assert (results[0], results[3]) == (2, 8)
    assert isinstance(results[1], ValueError)
    assert isinstance(results[2], LookupError)
    assert flush.batches == [[1, -2, 7, 4], [1], [-2], [7], [4]]
    await batcher.stop()


async def test_a_temporary_failure_is_everybodys() -> None:
    flush = Flush()
    batcher = Batcher(flush)
    batcher.start()
    results = await asyncio.gather(*(batcher.submit(item) for item in (1, 13)), return_exceptions=True)
    assert all(isinstance(result, Temporary) for result in results)
    assert len(flush.batches) == 1
    assert await batcher.submit(1) == 2
    await batcher.stop()


async def test_a_batch_is_bounded_by_weight() -> None:
    flush = Flush()
    batcher = Batcher(flush, weigh=lambda item: item, batch=10)
    batcher.start()
    await asyncio.gather(*(batcher.submit(item) for item in (4, 5, 6, 99, 1)))
    assert flush.batches == [[4, 5], [6], [99], [1]]
    await batcher.stop()


async def test_a_full_queue_makes_its_callers_wait() -> None:
    flush = Flush()
    batcher = Batcher(flush, batch=2, queue=3)
    batcher.start()
    flush.gate.clear()
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(20, 32)]
    await asyncio.sleep(0.01)
    assert len(batcher._queue) <= 3
    flush.gate.set()
    assert await asyncio.gather(*tasks) == [2 * item for item in range(20, 32)]
    await batcher.stop()


async def test_who_is_cancelled_while_waiting_takes_the_item_back() -> None:
    flush = Flush()
    batcher = Batcher(flush)
    batcher.start()
    flush.gate.clear()
    running = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0.01)
    waiting, last = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
    await asyncio.sleep(0.01)
    waiting.cancel()
    running.cancel()
    flush.gate.set()
    assert await last == 6
    assert flush.batches == [[1], [3]]
    await batcher.stop()


async def test_stopping_flushes_what_is_queued() -> None:
    flush = Flush()
    batcher = Batcher(flush, batch=1)
    batcher.start()
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(20, 25)]
    await asyncio.sleep(0)
    await batcher.stop()
    assert await asyncio.gather(*tasks) == [40, 42, 44, 46, 48]
