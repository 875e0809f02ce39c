"""The threads that handlers run on: never the I/O thread, so that heartbeats survive a slow handler.

Threads are daemons: one that hangs can't keep the process from ending.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from device_agent import log
from device_agent.context import Context
from device_agent.handlers import Done, Job, PythonHandlers, failed


@dataclass(frozen=True, slots=True)
class _Task:
    job: Job
    context: Context
    ended: Callable[[Done], None]


class Runner:
    """`slots` workers, and the loop for async handlers if there are any. The caller bounds what is submitted."""

    def __init__(self, slots: int, handlers: PythonHandlers) -> None:
        self._slots = slots
        self._handlers = handlers
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._started = False

    def start(self) -> None:
        if self._started:
            return
        self._started = True
        if self._handlers.has_async:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="restante-async", daemon=True).start()
            self._handlers.loop = loop
        for number in range(self._slots):
            threading.Thread(target=self._work, name=f"restante-handler-{number}", daemon=True).start()

    def submit(self, job: Job, context: Context, ended: Callable[[Done], None]) -> None:
        """Run the job; `ended` is called once, on a worker's thread."""
        self._tasks.put(_Task(job, context, ended))

    def stop(self) -> None:
        """Let idle workers go. What still runs is abandoned: its journal entry stays open."""
        if not self._started:
            return
        for _ in range(self._slots):
            self._tasks.put(None)
        loop = self._handlers.loop
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._handlers.loop = None

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                done = task.job.run(task.context)
            except BaseException as error:  # noqa: BLE001 - a slot must never be lost
                log.error("runner.fault", command=task.context.id, error=repr(error))
                done = failed(f"the agent failed while running it: {type(error).__name__}")
            task.ended(done)
