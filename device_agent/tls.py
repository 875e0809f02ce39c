"""TLS as this agent speaks it: the pinned authorities and nothing else, host name checked, 1.2 or newer.

A certificate's times are checked here, not by OpenSSL, which knows no other clock than the machine's.
"""

import ssl
from collections.abc import Callable
from typing import Any

from device_agent import errors

# OpenSSL's X509_V_ERR_ codes (x509_vfy.h), which Python hands through as `verify_code`.
_EXPIRED = {10}
_NOT_YET_VALID = {9}
_WRONG_HOST = {62, 63, 64}
_WRONG_AUTHORITY = {2, 7, 18, 19, 20, 21, 24, 25, 26, 30, 47, 48}


# OpenSSL's X509_V_FLAG_NO_CHECK_TIME: all else of a chain is checked.
_NO_CHECK_TIME = 0x200000

Validity = tuple[int, int]
"""From when to when, in epoch ms."""


class _Socket(ssl.SSLSocket):
    """Ends the handshake of a `Pinned` context's connection with the check of the times: before it, nothing is sent."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        context = self.context
        assert isinstance(context, Pinned)  # noqa: S101 - it made this socket
        context.met(self.getpeercert())


class Pinned(ssl.SSLContext):
    """A client context that trusts exactly the pinned authorities; made by `pinned`."""

    sslsocket_class = _Socket

    floor: Callable[[], int] | None = None
    """Epoch ms against which times are checked; None: they are not."""

    validity: Validity = (0, 0)
    """When the certificate of the last connection, and its authority, are both valid."""

    def met(self, certificate: dict[str, Any] | None) -> None:
        """Raises `ssl.SSLCertVerificationError`, like OpenSSL itself."""
        shown, trusted = certificate or {}, self.get_ca_certs()
        issuers = [each for each in trusted if each["subject"] == shown.get("issuer")]
        times = [_validity(each) for each in (shown, *(issuers or trusted))]
        self.validity = max(first for first, _ in times), min(last for _, last in times)
        if self.floor is not None and (code := _outside(self.validity, self.floor())):
            error = ssl.SSLCertVerificationError(ssl.SSL_ERROR_SSL, "the certificate is outside its times")
            error.verify_code, error.verify_message = code, str(error)
            raise error


def pinned(authority_pem: str, floor: Callable[[], int] | None) -> Pinned:
    """A client context that trusts exactly the authorities in this PEM text: no system store, no environment.

    Args:
        floor: the time, in epoch ms, that certificates must be valid at; None for the one question that asks for it.

    Raises:
        errors.BadAnswer: the text is no certificate.
    """
    context = Pinned(ssl.PROTOCOL_TLS_CLIENT)
    context.floor = floor
    context.verify_flags |= _NO_CHECK_TIME
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    try:
        context.load_verify_locations(cadata=authority_pem)
    except (ssl.SSLError, ValueError) as error:
        raise errors.BadAnswer("the authority is not a certificate in PEM form") from error
    return context


def unverified() -> ssl.SSLContext:
    """For the one connection that only fetches the authority to compare it with the ticket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_times(validity: Validity, at: int, host: str, port: int) -> None:
    """Raises `errors.CertificateExpired` or `errors.CertificateNotYetValid`."""
    if code := _outside(validity, at):
        raise _of_code(code, "", f"{host}:{port}", host)


def translate(error: BaseException, host: str, port: int) -> errors.AgentError:
    """What a failed connection means, in words and as a type: the same for HTTPS and AMQPS."""
    where = f"{host}:{port}"
    if isinstance(error, errors.AgentError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_code(error.verify_code, error.verify_message, where, host)
    if isinstance(error, ssl.SSLError):
        return errors.Unreachable(
            f"TLS with {where} failed ({error.reason or error}); check that this port speaks TLS 1.2 or newer"
        )
    if isinstance(error, TimeoutError):
        return errors.Unreachable(f"{where} did not answer in time; check the network and that the service runs")
    if isinstance(error, OSError):
        return errors.Unreachable(
            f"{where} can't be reached ({error.strerror or error}); check address, network and that the service runs"
        )
    return errors.Unreachable(f"the connection to {where} failed ({type(error).__name__}: {error})")


def _validity(certificate: dict[str, Any]) -> Validity:
    first, last = (ssl.cert_time_to_seconds(certificate[name]) * 1000 for name in ("notBefore", "notAfter"))
    return first, last


def _outside(validity: Validity, at: int) -> int:
    """OpenSSL's code for a time outside these; 0 within."""
    if at < validity[0]:
        return min(_NOT_YET_VALID)
    return min(_EXPIRED) if at > validity[1] else 0


def _of_code(code: int, message: str, where: str, host: str) -> errors.AgentError:
    if code in _EXPIRED:
        return errors.CertificateExpired(
            f"the certificate of {where} has expired; it has to be renewed there"
            " (or this machine's clock is ahead: check it)"
        )
    if code in _NOT_YET_VALID:
        return errors.CertificateNotYetValid(
            f"the certificate of {where} is not valid yet; this machine's clock is probably behind: set it"
        )
    if code in _WRONG_HOST:
        return errors.WrongHostName(
            f"the certificate of {where} is not for the host name {host!r};"
            " use the name it was issued for, or have it issued for this one"
        )
    if code in _WRONG_AUTHORITY:
        return errors.WrongAuthority(
            f"the certificate of {where} was not issued by the authority this device is pinned to;"
            " this is another service or an interception: nothing was sent."
            " If the authority was replaced, enroll again with a new ticket"
        )
    return errors.PeerNotTrusted(f"the certificate of {where} is refused: {message}")
