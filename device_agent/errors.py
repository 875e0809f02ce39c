"""The agent's errors. Each has a stable `code`; adapters translate what their libraries raise into them.

`Temporary` means that the same call may succeed later; everything else is permanent. The text says what
happened, why, and what to do; it never contains a secret.
"""


class AgentError(Exception):
    """The root."""

    code = "internal"


class Temporary(AgentError):
    code = "temporarily-unavailable"


class Unreachable(Temporary):
    code = "unreachable"


class BufferFull(Temporary):
    """A bounded buffer has no room: the caller should slow down or drop."""

    code = "buffer-full"


class NotConfirmed(Temporary):
    """A publish whose fate is unknown: lost connection, or no confirm in time."""

    code = "not-confirmed"


class PeerNotTrusted(AgentError):
    """The other end's certificate is refused; the subclasses say why."""

    code = "peer-not-trusted"


class WrongAuthority(PeerNotTrusted):
    code = "wrong-authority"


class CertificateExpired(PeerNotTrusted):
    code = "certificate-expired"


class CertificateNotYetValid(PeerNotTrusted):
    code = "certificate-not-yet-valid"


class WrongHostName(PeerNotTrusted):
    code = "wrong-host-name"


class LoginRefused(Temporary):
    """The broker refused this device's token. It may be enabled again, so the agent goes on trying."""

    code = "login-refused"


class EnrollmentRefused(AgentError):
    code = "enrollment-refused"


class RotationRefused(AgentError):
    """The service did not take the new key, or did not drop the old one. The present key is as good as before."""

    code = "rotation-refused"


class BadAnswer(AgentError):
    """The service answered something outside the contract."""

    code = "bad-answer"


class KeysRefused(AgentError):
    """What was said of the keys that sign commands is not to be believed. The keys stay as they were."""

    code = "keys-refused"


class AuthoritiesRefused(AgentError):
    """What was said of the authorities is not to be believed. The pins stay as they were."""

    code = "authorities-refused"


class NotEnrolled(AgentError):
    code = "not-enrolled"


class StateRefused(AgentError):
    """The state directory, or something in it, can't be used as it is."""

    code = "state-refused"


class JournalRefused(AgentError):
    """The journal can't be opened or trusted. Starting without it could run a command twice."""

    code = "journal-refused"


class Unguarded(AgentError):
    """pika's decoder is not behind the guard: one poisonous message would silence this device."""

    code = "unguarded"


class BadHandler(AgentError):
    """A handler that can't be registered or found; raised at start, never while a command runs."""

    code = "bad-handler"


class InvalidValue(AgentError):
    """A value from the caller outside the contract: a channel's name, a content type, a size."""

    code = "invalid-value"


class AlreadyRunning(AgentError):
    code = "already-running"
