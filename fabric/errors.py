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


class ProviderUnavailable(Temporary):
    """The keys of an external identity provider can't be had, so that its tokens can't be verified."""

    code = "provider-unavailable"


class NotLogged(Temporary):
    """What was revoked is revoked, and not yet in the revocation log: a backup restored now would undo it."""

    code = "not-logged"


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


class KeyReused(FabricError):
    """An idempotency key that stands for another request."""

    code = "key-reused"


class BacklogFull(FabricError):
    """As many copies may be in the mailbox as its limit allows. `retry_after` is seconds until one is gone."""

    code = "backlog-full"

    def __init__(self, text: str, depth: int, limit: int, oldest_age: float, retry_after: float) -> None:
        super().__init__(text)
        self.depth, self.limit, self.oldest_age, self.retry_after = depth, limit, oldest_age, retry_after


class TooLate(FabricError):
    """A command that can't be withdrawn any more; `state` says why."""

    code = "too-late"

    def __init__(self, text: str, state: str) -> None:
        super().__init__(text)
        self.state = state
