"""A back-end service that calls the gateway."""

import http.client
import json
import ssl
import time
from urllib.parse import urlsplit

from api.operator.stack import Stack

_IDLE = 3.0  # seconds: the gateway ends connections that were idle for five


class Caller:
    """One kept-alive HTTPS connection of the standard library, so that little is its own cost."""

    def __init__(self, stack: Stack) -> None:
        place = urlsplit(stack.settings.api_url)
        context = ssl.create_default_context(cafile=stack.files.authority)
        self._connection = http.client.HTTPSConnection(place.hostname or "", place.port, context=context, timeout=30)
        self._used = time.monotonic()
        self._headers = {
            "Authorization": f"Bearer {stack.files.operator_token.read_text().strip()}",
            "Content-Type": "application/json",
        }

    def create_device(self, id: str) -> str:
        made = self._post("/v1/devices", {"id": id}, {})
        ticket: str = made["enrollment"]["ticket"]  # type: ignore[index]  # the gateway's document
        return ticket

    def revoke(self, id: str) -> dict[str, object]:
        """Revoke a device; the answer."""
        return self._post(f"/v1/devices/{id}/revoke", {}, {})

    def command(self, id: str) -> None:
        done = self._post(f"/v1/devices/{id}/commands", {"name": "noop", "args": {}}, {"Prefer": "wait=20"})
        if done["state"] != "succeeded":
            raise RuntimeError(f"a command is {done['state']}: {json.dumps(done)}")

    def _post(self, path: str, body: dict[str, object], headers: dict[str, str]) -> dict[str, object]:
        if time.monotonic() - self._used > _IDLE:
            self._connection.close()  # before the gateway does; it opens again by itself
        self._connection.request("POST", path, json.dumps(body), {**self._headers, **headers})
        answer = self._connection.getresponse()
        self._used = time.monotonic()
        document: dict[str, object] = json.loads(answer.read())
        if answer.status >= 300:
            raise RuntimeError(f"{answer.status}: {document}")
        return document
