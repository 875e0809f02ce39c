"""Follows the gateway's events over lost connections and restarts, missing none that the ledger keeps."""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from api.operator.client import CallFailed, Connection, failure

SILENCE = 45.0  # seconds without a byte after which a connection counts as lost: three heartbeats
LONGEST_PAUSE = 5.0  # seconds between attempts to connect again
NOTICES = frozenset({"gap", "lagging", "reset"})

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Block:
    """One of a server-sent event stream; what it does not have is empty."""

    id: str = ""
    event: str = ""
    data: str = ""


def blocks(lines: Iterable[str]) -> Iterator[Block]:
    """The blocks of a stream, of those fields that the gateway sends; one that was cut off is left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            yield Block(fields.get("id", ""), fields.get("event", ""), fields.get("data", ""))
            fields = {}


def follow(connection: Connection, query: Sequence[tuple[str, str]], say: Say) -> Iterator[str]:
    """Events, each as its JSON in one line, without end; `say` is told of notices, and of a lost connection.

    Raises:
        CallFailed: the gateway refuses, or it can't be reached at the start.
    """
    last, failures = "", 0
    with connection.client(timeout=httpx.Timeout(15.0, read=SILENCE)) as client:
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            try:
                with client.stream("GET", "/v1/events", params=list(query), headers=headers) as answer:
                    if not answer.is_success:
                        answer.read()
                        if not last or (answer.status_code < 500 and answer.status_code != 429):
                            raise failure(answer)
                    else:
                        for block in blocks(answer.iter_lines()):
                            last, failures = block.id or last, 0
                            if block.event == "problem":
                                _check(json.loads(block.data))
                            elif block.event in NOTICES:
                                say(f"{block.event}: {block.data}")
                            elif block.data:
                                yield block.data
            except httpx.HTTPError as error:
                if not last:
                    raise connection.unreachable(error) from None
                if not failures:
                    say(f"the connection is lost ({error or type(error).__name__}); connecting again")
            failures += 1
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2 ** min(failures, 6))))  # noqa: S311 - jitter


def _check(problem: dict[str, object]) -> None:
    """Raises `CallFailed` for what will not be otherwise next time."""
    if problem["status"] in (401, 403):
        raise CallFailed(f"{problem['title']}: {problem['detail']}")
