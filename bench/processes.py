"""What processes cost: CPU time from `/proc/PID/stat`, memory from `/proc/PID/smaps_rollup`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg

from api.operator.stack import Stack

_TICK = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Usage:
    """`cpu` in seconds since the processes began. `pss` (shared pages divided among those who map them) and `uss`
    (pages that nobody else maps) in KB."""

    cpu: float = 0.0
    pss: int = 0
    uss: int = 0

    def __add__(self, other: Self) -> "Usage":
        return Usage(self.cpu + other.cpu, self.pss + other.pss, self.uss + other.uss)

    def __sub__(self, other: Self) -> "Usage":
        return Usage(self.cpu - other.cpu, self.pss - other.pss, self.uss - other.uss)


def usage(pids: Iterable[int]) -> Usage:
    """The sum; a process that has ended counts nothing."""
    return sum((_of(pid) for pid in pids), Usage())


def cpu(pids: Iterable[int]) -> float:
    """Seconds, user and system; cheaper than `usage`, which walks all pages."""
    return sum(_cpu(pid) for pid in pids)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += children.get(one, [])
    return found


def parts(stack: Stack) -> Mapping[str, list[int]]:
    """The processes of a running stack: `broker`, `gateway`, `worker`, and `database` if it is PostgreSQL on this
    machine."""
    assert stack.broker is not None
    assert stack.broker.pid is not None
    return {"broker": tree(stack.broker.pid), **service_parts(stack)}


def service_parts(stack: Stack) -> Mapping[str, list[int]]:
    """`parts` without the broker, which may be down."""
    found = {name: tree(stack.service_pid(name)) for name in ("gateway", "worker")}
    postmaster = _postmaster(stack.settings.database)
    if postmaster is not None:
        found["database"] = tree(postmaster)
    return found


def _postmaster(url: str) -> int | None:
    if not url.startswith("postgresql"):
        return None
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql", 1)) as connection:
        backend = connection.info.backend_pid
        parent = _parent(backend)
    name = _PROC / str(parent) / "comm"
    return parent if parent is not None and name.read_text().startswith("postgres") else None


def _of(pid: int) -> Usage:
    sizes = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return Usage()
    return Usage(_cpu(pid), sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"])


def _cpu(pid: int) -> float:
    fields = _stat(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / _TICK


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _stat(pid: int) -> list[str] | None:
    """From the state on: a name may hold spaces and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
