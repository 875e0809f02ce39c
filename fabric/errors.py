"""The fabric's errors. Each has a stable `code`; adapters translate what their libraries raise into them.

`Temporary` means that the same call may succeed later; everything else is permanent. Only `api/` knows
what any of them is in HTTP.
"""


class FabricError(Exception):
    """The root. The text says what happened, why, and what to do."""

    code = "internal"


class Temporary(FabricError):
    code = "temporarily-unavailable"


class BrokerUnavailable(Temporary):
    code = "broker-unavailable"


class LedgerUnavailable(Temporary):
    code = "ledger-unavailable"


class PublishFailed(Temporary):
    """A publish whose fate is unknown (time-out, lost channel) or that the broker refused (nack)."""

    code = "publish-failed"


class NoMailbox(FabricError):
    """A mandatory publish came back: no queue is bound for the key."""

    code = "no-mailbox"


class NotFound(FabricError):
    code = "not-found"


class Conflict(FabricError):
    code = "conflict"


class PreconditionFailed(FabricError):
    code = "precondition-failed"


class Invalid(FabricError):
    code = "invalid"


class Gone(FabricError):
    code = "gone"


class Unauthenticated(FabricError):
    code = "unauthenticated"


class Forbidden(FabricError):
    code = "forbidden"


class TooManyRequests(FabricError):
    """`retry_after` is seconds."""

    code = "too-many-requests"

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after
