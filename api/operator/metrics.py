"""What gateway and worker measure, in Prometheus' text format: the only module that imports its library.

Labels are enumerations. What is read here was counted elsewhere, so that counting costs next to nothing; and however
often it is asked for, the ledger is looked at every `LOOK_EVERY` seconds at most.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fabric.measures import Histogram

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
LOOK_EVERY = 5.0  # seconds
LOOK_TIMEOUT = 3.0  # seconds
LAG_EVERY = 0.5  # seconds

Source = Callable[[], Mapping[Any, float]]
Look = Callable[[], Awaitable[None]]

_PREFIX = "restante_"


class Metrics:
    """The metrics of one process; their names begin with `restante_`, or `process_`.

    Args:
        looks: read what has to be asked for, before the metrics are. What one does not know in time, it forgets.

    Attributes:
        lag: by how much the event loop was late.
    """

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks = looks
        self._looked_at = -math.inf
        self._turn = asyncio.Lock()
        self._gauges: list[_Gauge] = []
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self.lag = Histogram()
        self.histogram("event_loop_lag_seconds", "By how much the event loop is late.", (), {(): self.lag})

    def counter(self, name: str, help: str, labels: tuple[str, ...], source: Source) -> None:
        """Counts by what they are of: a text for one label, a tuple of texts for several or none. `source` is called in
        another thread."""
        self._registry.register(_Counter(name, help, labels, source))

    def gauge(self, name: str, help: str, labels: tuple[str, ...], source: Source) -> None:
        """Values by what they are of. `source` is called in the event loop's thread, and leaves out what is unknown."""
        gauge = _Gauge(name, help, labels, source)
        self._gauges.append(gauge)
        self._registry.register(gauge)

    def histogram(self, name: str, help: str, labels: tuple[str, ...], source: Mapping[Any, Histogram]) -> None:
        self._registry.register(_Histograms(name, help, labels, source))

    async def text(self) -> bytes:
        """All of them as they are now, but what has to be asked for as it was up to `LOOK_EVERY` seconds ago."""
        async with self._turn:
            if time.monotonic() - self._looked_at >= LOOK_EVERY:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_TIMEOUT):
                        await asyncio.gather(*(look() for look in self._looks))
                self._looked_at = time.monotonic()
            for gauge in self._gauges:
                gauge.read()
            # Thousands of lines take milliseconds, which the event loop has other use for.
            return await asyncio.to_thread(generate_latest, self._registry)

    async def measure_lag(self) -> None:
        """Measure for ever by how much the event loop is late."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self.lag.observe(max(loop.time() - due, 0.0))


class _Counter(Collector):
    def __init__(self, name: str, help: str, labels: tuple[str, ...], source: Source) -> None:
        self._name, self._help, self._labels, self._source = _PREFIX + name, help, labels, source

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for key, value in list(self._source().items()):
            family.add_metric(_texts(key), value)
        yield family


class _Gauge(Collector):
    def __init__(self, name: str, help: str, labels: tuple[str, ...], source: Source) -> None:
        self._name, self._help, self._labels, self._source = _PREFIX + name, help, labels, source
        self._values: Mapping[Any, float] = {}

    def read(self) -> None:
        self._values = self._source()

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._help, labels=self._labels)
        for key, value in self._values.items():
            family.add_metric(_texts(key), value)
        yield family


class _Histograms(Collector):
    def __init__(self, name: str, help: str, labels: tuple[str, ...], source: Mapping[Any, Histogram]) -> None:
        self._name, self._help, self._labels, self._source = _PREFIX + name, help, labels, source

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for key, histogram in list(self._source.items()):
            buckets, so_far = [], 0
            for bound, count in zip((*histogram.bounds, math.inf), list(histogram.counts), strict=True):
                so_far += count
                buckets.append(("+Inf" if math.isinf(bound) else str(bound), so_far))
            family.add_metric(_texts(key), buckets, histogram.total)
        yield family


def _texts(key: object) -> tuple[str, ...]:
    return tuple(map(str, key)) if isinstance(key, tuple) else (str(key),)
