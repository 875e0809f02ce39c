"""What a handler is told about the command it runs, and the one thing it may say while it runs."""

from collections.abc import Callable
from dataclasses import dataclass

from topology import names, wire


@dataclass(frozen=True, slots=True)
class Context:
    """Handed to a handler that has a parameter of this type; `response_timeout` is in seconds."""

    device: names.DeviceId
    command: wire.Command
    report_progress: Callable[[str], None]

    @property
    def id(self) -> names.CommandId:
        return self.command.id

    @property
    def content_type(self) -> str:
        return self.command.content_type

    @property
    def issuer(self) -> str:
        return self.command.issuer

    @property
    def traceparent(self) -> str | None:
        """W3C Trace Context, if the issuer sent one."""
        return self.command.traceparent

    @property
    def response_timeout(self) -> float:
        return self.command.response_timeout / 1000

    def progress(self, text: str) -> None:
        """Say how far it is. Only the latest text counts, and one a second is sent; safe from any thread."""
        self.report_progress(text)
