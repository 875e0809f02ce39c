"""The operator's HTTP client: the gateway's address, authority and token, and its answers as values."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from api.settings import PREFIX, Settings


class CallFailed(Exception):
    """The gateway refused, or could not be reached; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Where to call. `ca_file` None: the system's authorities."""

    api_url: str
    ca_file: Path | None
    token: str

    @classmethod
    def of(cls, settings: Settings) -> "Connection":
        """The running stack of the state directory, or what the settings and `RESTANTE_TOKEN_FILE` say.

        Raises:
            CallFailed: there is no token to be read.
        """
        summary_file = settings.state_dir / "stack.json"
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
        token_file = os.environ.get(f"{PREFIX}TOKEN_FILE") or summary.get("token_file")
        if not token_file:
            raise CallFailed(
                f"No stack is described in {summary_file}: start one with `restante up`, or set RESTANTE_API_URL and "
                "RESTANTE_TOKEN_FILE."
            )
        try:
            token = Path(token_file).read_text().strip()
        except OSError as error:
            raise CallFailed(f"The token file {token_file} can't be read: {error.strerror}.") from None
        ca_file = summary.get("ca_file")
        return cls(summary.get("api_url", settings.api_url), Path(ca_file) if ca_file else None, token)

    def call(self, method: str, path: str, *, timeout: float = 15.0, **arguments: Any) -> Any:
        """One request; the JSON of its answer, or None when it has none.

        Raises:
            CallFailed: with the problem document's title and detail.
        """
        try:
            with self.client(timeout) as client:
                answer = client.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise self.unreachable(error) from None
        if answer.is_success:
            return answer.json() if answer.content else None
        raise failure(answer)

    def client(self, timeout: float | httpx.Timeout) -> httpx.Client:
        """For several requests, with the token."""
        import ssl

        context = ssl.create_default_context(cafile=self.ca_file)
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.api_url, headers=headers, verify=context, timeout=timeout)

    def unreachable(self, error: httpx.HTTPError) -> CallFailed:
        return CallFailed(f"The gateway {self.api_url} can't be reached: {error}. Is the stack up?")


def failure(answer: httpx.Response) -> CallFailed:
    """What a refusal says: the title and the detail of its problem document."""
    try:
        problem = answer.json()
        return CallFailed(f"{problem['title']}: {problem.get('detail', '')}")
    except (ValueError, KeyError):
        return CallFailed(f"The gateway answered {answer.status_code}.")
