"""`make bench`: how long a command takes over HTTP, as a ratio to a bare AMQP round trip.

Both go over the same broker in the same run, in turns: the floor is a confirmed publish to a durable
classic queue, a bare client that consumes it over TLS, acks and answers, and the answer by direct reply-to.
"""

import argparse
import http.client
import json
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from api.operator.stack import Stack
from api.settings import Settings
from bench.device import Agent
from bench.floor import Floor

BAR = 6.0  # times the floor: above it the design is wrong somewhere


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer round trips")
    parser.add_argument("--database", default="", help="PostgreSQL URL of the ledger (default: SQLite)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    rounds, count = (5, 200) if given.quick else (9, 1000)
    with ExitStack() as cleanup:
        root = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="restante-bench-")))
        _say("starting a stack of its own")
        stack = Stack(Settings(state_dir=root / "stack", database_url=given.database), _say)
        cleanup.callback(stack.stop)
        stack.start()
        caller = Caller(stack)
        agent = Agent(root / "device", stack, caller.create_device("bench-1"))
        cleanup.callback(agent.stop)
        floor = Floor(stack)
        cleanup.callback(floor.stop)
        pairs = []
        for number in range(rounds + 1):
            bare = _round(floor.round_trip, count)
            over_http = _round(lambda: caller.command("bench-1"), count)
            if number:  # the first one warms up
                pairs.append((bare, over_http))
                _say(f"round {number} of {rounds}: bare {_shown(bare)}, over HTTP {_shown(over_http)}")
    return _report(pairs, stack.settings.database, given.json)


class Caller:
    """A back-end service: one kept-alive HTTPS connection of the standard library, so that little is its own cost."""

    def __init__(self, stack: Stack) -> None:
        place = urlsplit(stack.settings.api_url)
        context = ssl.create_default_context(cafile=stack.files.authority)
        self._connection = http.client.HTTPSConnection(place.hostname or "", place.port, context=context, timeout=30)
        self._headers = {
            "Authorization": f"Bearer {stack.files.operator_token.read_text().strip()}",
            "Content-Type": "application/json",
        }

    def create_device(self, id: str) -> str:
        made = self._post("/v1/devices", {"id": id}, {})
        ticket: str = made["enrollment"]["ticket"]  # type: ignore[index]  # the gateway's document
        return ticket

    def command(self, id: str) -> None:
        done = self._post(f"/v1/devices/{id}/commands", {"name": "noop", "args": {}}, {"Prefer": "wait=20"})
        if done["state"] != "succeeded":
            raise RuntimeError(f"a command is {done['state']}: {json.dumps(done)}")

    def _post(self, path: str, body: dict[str, object], headers: dict[str, str]) -> dict[str, object]:
        self._connection.request("POST", path, json.dumps(body), {**self._headers, **headers})
        answer = self._connection.getresponse()
        document: dict[str, object] = json.loads(answer.read())
        if answer.status >= 300:
            raise RuntimeError(f"{answer.status}: {document}")
        return document


def _round(call: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each call."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _report(pairs: list[tuple[list[float], list[float]]], database: str, target: Path | None) -> int:
    ratios = {
        name: [_percentile(http_, part) / _percentile(bare, part) for bare, http_ in pairs]
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }
    ledger = database.partition(":")[0]
    print(f"\ncommand round trip over HTTP, waiting for its outcome (ledger: {ledger}), against a bare AMQP round trip")
    print(
        f"{'':8}{'bare':>12}{'over HTTP':>12}{'ratio':>9}   (median of {len(pairs)} rounds; ratio: lowest to highest)"
    )
    figures = {}
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        bare, over = (statistics.median(_percentile(pair[side], part) for pair in pairs) for side in (0, 1))
        ratio = statistics.median(ratios[name])
        figures[name] = {"bare_ms": bare, "http_ms": over, "ratio": ratio, "ratios": ratios[name]}
        spread = f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        print(f"{name:8}{bare:>9.2f} ms{over:>9.2f} ms{ratio:>8.2f}×   {spread}")
    met = figures["p50"]["ratio"] <= BAR  # type: ignore[operator]  # a float
    print(f"\nthe bar of {BAR:g}× at p50 is {'met' if met else 'NOT met'}")
    if target:
        target.write_text(json.dumps({"ledger": ledger, "rounds": len(pairs), **figures}, indent=2) + "\n")
    return 0 if met else 1


def _percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def _shown(values: list[float]) -> str:
    return f"p50 {_percentile(values, 0.5):.2f} ms"


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
