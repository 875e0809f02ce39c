"""The built-in `system` channel: this machine's real load, memory, disk and temperatures.

Read from /proc, /sys and statvfs. What a machine does not have is left out, never made up.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from device_agent import errors, log

CHANNEL = "system"
_PROC = Path("/proc")
_THERMAL = Path("/sys/class/thermal")
_HWMON = Path("/sys/class/hwmon")


def read(disk: Path, proc: Path = _PROC, thermal: Path = _THERMAL, hwmon: Path = _HWMON) -> dict[str, object]:
    """One reading: `load` over 1, 5 and 15 min; memory, swap and disk in bytes; °C by sensor; uptime in s."""
    parts: dict[str, Callable[[], object]] = {
        "load": lambda: [float(word) for word in (proc / "loadavg").read_text().split()[:3]],
        "cpus": os.cpu_count,
        "memory": lambda: _memory(proc, "MemTotal", "MemAvailable"),
        "swap": lambda: _memory(proc, "SwapTotal", "SwapFree"),
        "disk": lambda: _disk(disk),
        "temperature": lambda: _temperatures(thermal, hwmon),
        "uptime": lambda: float((proc / "uptime").read_text().split()[0]),
    }
    reading: dict[str, object] = {}
    for name, part in parts.items():
        try:
            value = part()
        except (OSError, ValueError, KeyError, IndexError):
            continue
        if value not in (None, {}):
            reading[name] = value
    return reading


class SystemReporter:
    """Publishes a reading at once and then every `interval` seconds, from a thread of its own."""

    def __init__(self, interval: float, disk: Path, publish: Callable[[str, object], object]) -> None:
        self._interval = interval
        self._disk = disk
        self._publish = publish
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._work, name="restante-system", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _work(self) -> None:
        while True:
            try:
                self._publish(CHANNEL, read(self._disk))
            except errors.BufferFull as error:
                log.debug("system.dropped", because=str(error))
            if self._ended.wait(self._interval):
                return


def _memory(proc: Path, total: str, free: str) -> dict[str, int] | None:
    found: dict[str, int] = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in (total, free):
            found[name] = int(rest.split()[0]) * 1024
    return {"total": found[total], "available": found[free]} if found[total] else None


def _disk(path: Path) -> dict[str, int]:
    status = os.statvfs(path)
    return {"total": status.f_blocks * status.f_frsize, "available": status.f_bavail * status.f_frsize}


def _temperatures(thermal: Path, hwmon: Path) -> dict[str, float]:
    """Degrees Celsius by sensor; two of the same name are numbered."""
    found: dict[str, float] = {}
    for zone in sorted(thermal.glob("thermal_zone*")):
        _add(found, zone / "type", zone / "temp")
    if not found:
        for sensor in sorted(hwmon.glob("hwmon*/temp*_input")):
            _add(found, sensor.parent / "name", sensor)
    return found


def _add(found: dict[str, float], name_file: Path, value_file: Path) -> None:
    try:
        name, value = name_file.read_text().strip(), int(value_file.read_text()) / 1000
    except (OSError, ValueError):
        return
    if name in found:
        name = f"{name}-{sum(one.startswith(name) for one in found) + 1}"
    found[name] = value
