"""`restante doctor`: is everything as it must be? Each check looks at the thing itself, and says what to do in a line.

It asks, and changes nothing. It needs a worker's secrets, so it runs where a worker runs.
"""

import asyncio
import shutil
import ssl
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from typing import Final

import httpx

from api.operator import broker_checks, certificates
from api.operator.errors import KNOWN_ERRORS
from api.operator.findings import Finding, Level, Problem, by_limits
from api.operator.setup import Files
from api.settings import Settings
from fabric.identity.revocation_log import RevocationLog
from fabric.sql import health

_LONGEST = 45.0  # seconds of one check
_TIMEOUT = 5.0  # seconds for a request
_SKEW = (2.0, 30.0)  # seconds by which clocks may differ: until a word, until tokens are refused
_UNPUBLISHED = (10.0, 60.0)  # seconds that an event may wait for its stream
_FREE = (1 << 30, 100 << 20)  # bytes that should be free on a disk, and that must be
_PRIVATE: Final = (
    "secrets", "secrets/**/*", "certificates/*", "authority/*.key", "operator.token", "revocations/*", "*.sqlite*"
)  # fmt: skip

Check = Callable[[Settings], Awaitable[str]]
"""What is well. Raises `Problem` with what is not; an error that is known says it as well."""


def run(settings: Settings, tell: Callable[[Finding], None], skipped: Collection[str] = ()) -> Level:
    """Look at everything but what is skipped, and tell of each at once; how bad it is."""

    async def look() -> Level:
        worst = Level.OK
        for name, check in CHECKS.items():
            if name not in skipped:
                finding = await _one(name, check, settings)
                tell(finding)
                worst = max(worst, finding.level)
                if name == "settings" and worst:
                    break  # there is nothing to look at
        return worst

    return asyncio.run(look())


async def _one(name: str, check: Check, settings: Settings) -> Finding:
    try:
        async with asyncio.timeout(_LONGEST):
            return Finding(name, Level.OK, await check(settings))
    except Problem as problem:
        return Finding(name, problem.level, str(problem))
    except TimeoutError:
        return Finding(name, Level.FAIL, f"no answer within {_LONGEST:g} s")
    except (*KNOWN_ERRORS, httpx.HTTPError, OSError, ValueError, TypeError, KeyError) as error:
        return Finding(name, Level.FAIL, f"{type(error).__name__}: {error}")


async def _settings(settings: Settings) -> str:
    kind = settings.database.partition(":")[0]
    if not settings.state_dir.is_dir():
        raise Problem(f"there is no state directory {settings.state_dir}; run `restante setup`, or name it")
    return f"fabric {settings.fabric}, cell {settings.cell}, {kind}, state in {settings.state_dir}"


async def _files(settings: Settings) -> str:
    paths = [settings.state_dir, *(path for pattern in _PRIVATE for path in settings.state_dir.glob(pattern))]
    open_ones = [str(path) for path in paths if path.exists() and path.stat().st_mode & 0o077]
    if open_ones:
        raise Problem(f"others than their owner may use {', '.join(open_ones[:5])}; chmod go= them")
    return f"{len(paths)} private files and directories are their owner's"


async def _database(settings: Settings) -> str:
    found = await asyncio.to_thread(health.look, settings.database)
    return f"answers, schema {found.schema}"


async def _clock(settings: Settings) -> str:
    found = await asyncio.to_thread(health.look, settings.database)
    skew = abs(found.offset)
    if level := by_limits(skew, _SKEW):
        raise Problem(f"this machine's clock and the database's differ by {skew:.1f} s; keep both by NTP", level)
    return f"{skew:.1f} s from the database's"


async def _events(settings: Settings) -> str:
    waits = (await asyncio.to_thread(health.look, settings.database)).unpublished
    if level := by_limits(waits, _UNPUBLISHED):
        raise Problem(f"the oldest event waits for its stream for {waits:.0f} s; is a worker running?", level)
    return "none waits for long"


async def _closures(settings: Settings) -> str:
    found = (await asyncio.to_thread(health.look, settings.database)).closures
    if found:
        raise Problem(
            f"{found} connections are to be closed and are not yet; if that stays, see the worker", Level.WARN
        )
    return "none open"


async def _revocations(settings: Settings) -> str:
    found = await asyncio.to_thread(health.look, settings.database)
    if found.mark is None:
        raise Problem("there is no revocation log yet; the first gateway or worker begins it", Level.WARN)
    behind = await asyncio.to_thread(_lines_behind, settings, found)
    if found.unlogged:
        raise Problem(f"{found.unlogged} revocations are not in it yet; can it be written?", Level.WARN)
    return f"whole; {behind} lines since the last start"


def _lines_behind(settings: Settings, found: health.Health) -> int:
    assert found.mark is not None  # noqa: S101 - asked before
    return sum(1 for _ in RevocationLog(settings.revocations).read(found.mark))


async def _gateway(settings: Settings) -> str:
    context = ssl.create_default_context(cafile=Files(settings.state_dir).authority)
    async with httpx.AsyncClient(verify=context, timeout=_TIMEOUT, trust_env=False) as http:
        answer = await http.get(f"{settings.api_url}/health/ready")
    if not answer.is_success:
        raise Problem(f"{settings.api_url} answers {answer.status_code}: {answer.text[:300]}")
    return f"{settings.api_url} is ready, with a certificate of our authority"


async def _certificates(settings: Settings) -> str:
    now = datetime.now(UTC)
    ends = certificates.expiries(settings.state_dir)
    if not ends:
        raise Problem(f"there are none in {settings.state_dir}")
    name, soonest = min(ends.items(), key=lambda each: each[1])
    days = (soonest - now).days
    if days < _DAYS_LEFT[0]:
        level = Level.FAIL if days < _DAYS_LEFT[1] else Level.WARN
        raise Problem(f"that of {name} ends in {days} days ({soonest:%Y-%m-%d}); run `restante certs renew`", level)
    return f"the first to end is that of {name}, in {days} days"


async def _disk(settings: Settings) -> str:
    places = {settings.state_dir, settings.revocations.parent}
    free, place = min((shutil.disk_usage(path).free, path) for path in places if path.exists())
    if level := by_limits(-free, (-_FREE[0], -_FREE[1])):
        raise Problem(f"{free >> 20} MiB are free for {place}; make room", level)
    return f"{free >> 30} GiB are free"


CHECKS: Final[dict[str, Check]] = {
    "settings": _settings,
    "files": _files,
    "certificates": _certificates,
    "disk": _disk,
    "database": _database,
    "clock": _clock,
    "revocation-log": _revocations,
    "events": _events,
    "closures": _closures,
    "broker": broker_checks.broker,
    "doors": broker_checks.offers,
    "accounts": broker_checks.accounts,
    "topology": broker_checks.topology,
    "worker": broker_checks.worker,
    "auth": broker_checks.auth,
    "gateway": _gateway,
}
_DAYS_LEFT = (14, 1)  # until a word, until it is urgent; renewal is due long before
