"""Devices' mail over HTTPS polling and long polling: as little as an honest server of that kind can do.

uvicorn with httptools and uvloop over TLS, as the gateway has them, but a bare ASGI callable on top; commands in an SQL
table with an index on the device, every bearer token looked up in another. What was accepted is committed and fsynced,
and so is that it was handed out.

    POST /v1/devices/{id}/commands    202, once the command is in the table (the back end's token)
    GET  /v1/mail                     200 with the device's waiting commands, or 204 (the device's token)
    GET  /v1/mail?wait=30             the same, after 30 seconds at the latest; never more
"""

import asyncio
import hashlib
import json
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from bench.peers import processes

BACKEND = "the back end"
WAIT = 30.0  # seconds that a long poll is held
_KEEP_ALIVE = 150  # seconds: longer than any device's interval
_AT_ONCE = 50  # commands of one answer

_SCHEMA = """
CREATE TABLE tokens (hash BLOB PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE commands (
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, body TEXT NOT NULL, at REAL NOT NULL, delivered_at REAL
);
CREATE INDEX waiting ON commands (device, id) WHERE delivered_at IS NULL;
"""

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def make_database(path: Path, tokens: Sequence[tuple[str, str]]) -> None:
    """An empty one, that knows these pairs of token and owner for a day."""
    with sqlite3.connect(path) as database:
        database.executescript(f"PRAGMA journal_mode=WAL; {_SCHEMA}")
        expires = time.time() + 86_400
        rows = [(_hash(token), owner, expires) for token, owner in tokens]
        database.executemany("INSERT INTO tokens VALUES (?, ?, ?)", rows)
    database.close()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class MailServer:
    """The ASGI application. One process; its statements take microseconds, so they run on the loop itself."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA synchronous=FULL")
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = self._owner(scope)
        path = scope["path"]
        if owner is None:
            await _answer(send, 401)
        elif scope["method"] == "GET" and path == "/v1/mail" and owner != BACKEND:
            await self._mail(owner, _wait(scope["query_string"]), send)
        elif scope["method"] == "POST" and path.startswith("/v1/devices/") and owner == BACKEND:
            await self._accept(path.split("/")[3], receive, send)
        else:
            await _answer(send, 404)

    def _owner(self, scope: Scope) -> str | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.decode("latin-1").partition(" ")
        if scheme != "Bearer":
            return None
        query = "SELECT owner FROM tokens WHERE hash = ? AND expires > ?"
        found = self._database.execute(query, (_hash(token), time.time())).fetchone()
        return None if found is None else str(found[0])

    async def _mail(self, device: str, wait: float, send: Send) -> None:
        commands = self._take(device)
        if wait and not commands:
            news = self._waiting[device] = asyncio.get_running_loop().create_future()
            await asyncio.wait([news], timeout=wait)
            if self._waiting.get(device) is news:
                del self._waiting[device]
            commands = self._take(device)
        if commands:
            await _answer(send, 200, json.dumps({"commands": commands}).encode())
        else:
            await _answer(send, 204)

    def _take(self, device: str) -> list[dict[str, object]]:
        query = "SELECT id, body, at FROM commands WHERE device = ? AND delivered_at IS NULL ORDER BY id LIMIT ?"
        rows = self._database.execute(query, (device, _AT_ONCE)).fetchall()
        if rows:
            now = time.time()
            self._database.execute("BEGIN IMMEDIATE")
            update = "UPDATE commands SET delivered_at = ? WHERE id = ?"
            self._database.executemany(update, [(now, id) for id, _, _ in rows])
            self._database.execute("COMMIT")
        return [{"id": id, "at": at, **json.loads(body)} for id, body, at in rows]

    async def _accept(self, device: str, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        json.loads(body)
        insert = "INSERT INTO commands (device, body, at) VALUES (?, ?, ?)"
        made = self._database.execute(insert, (device, body.decode(), time.time()))
        news = self._waiting.pop(device, None)
        if news is not None and not news.done():
            news.set_result(None)
        await _answer(send, 202, json.dumps({"id": made.lastrowid}).encode())


def _wait(query: bytes) -> float:
    name, _, value = query.partition(b"=")
    return min(float(value), WAIT) if name == b"wait" else 0.0


async def _answer(send: Send, status: int, body: bytes = b"") -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())] if body else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _serve(port: int, certificate: str, database: Path) -> None:
    config = uvicorn.Config(
        MailServer(database),
        host="127.0.0.1",
        port=port,
        http="httptools",
        ssl_certfile=certificate,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    given = processes.told(sys.argv)
    _serve(given["port"], given["certificate"], Path(given["database"]))
