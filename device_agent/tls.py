"""TLS as this agent speaks it: one pinned authority and nothing else, host name checked, 1.2 or newer."""

import ssl

from device_agent import errors

# OpenSSL's X509_V_ERR_ codes (x509_vfy.h), which Python hands through as `verify_code`.
_EXPIRED = {10}
_NOT_YET_VALID = {9}
_WRONG_HOST = {62, 63, 64}
_WRONG_AUTHORITY = {2, 7, 18, 19, 20, 21, 24, 25, 26, 30, 47, 48}


def pinned(authority_pem: str) -> ssl.SSLContext:
    """A client context that trusts exactly this authority: no system store, no environment.

    Raises:
        errors.BadAnswer: the text is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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


def translate(error: BaseException, host: str, port: int) -> errors.AgentError:
    """What a failed connection means, in words and as a type: the same for HTTPS and AMQPS."""
    where = f"{host}:{port}"
    if isinstance(error, errors.AgentError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return _refused_certificate(error, where, host)
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


def _refused_certificate(error: ssl.SSLCertVerificationError, where: str, host: str) -> errors.AgentError:
    code = error.verify_code
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
    return errors.PeerNotTrusted(f"the certificate of {where} is refused: {error.verify_message}")
