"""The local certificate authority: it vouches for the broker and the gateway, for the names it was made for only.

Its private key is needed to issue certificates and nowhere else: keep it 0600, and off the machine when it isn't used.
"""

import base64
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from api.operator.secrets import private_directory, replace_private

AUTHORITY_VALIDITY = timedelta(days=3650)
SERVER_VALIDITY = timedelta(days=90)
_CLOCK_SKEW = timedelta(hours=1)  # a device whose clock is a little behind accepts a new certificate

Address = IPv4Address | IPv6Address


class AuthorityError(Exception):
    """A certificate can't be issued or read; the message is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def certificate_der(self) -> bytes:
        """The certificate in DER."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        """The private key in PEM (PKCS #8, unencrypted)."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def make_authority(
    name: str,
    hosts: Sequence[str],
    *,
    now: datetime,
    validity: timedelta = AUTHORITY_VALIDITY,
) -> Credential:
    """Make an authority that can vouch for `hosts` and for nothing else.

    ECDSA P-256, self-signed, path length 0, critical name constraints (RFC 5280, section 4.2.1.10). A DNS name permits
    the names below it too; an address permits itself. OpenSSL, and so Python, enforces them; Erlang's `ssl` accepts
    the authority but does not apply the constraints of a trust anchor.

    Args:
        name: its common name, for people.
        hosts: DNS names and IP addresses, one at least.
        now: the time, with a zone.
        validity: from `now` on; it starts an hour earlier for clocks that are behind.
    """
    names, addresses = split_hosts(hosts)
    # A kind of name that is not listed would be unconstrained: a kind without any name excludes everything of it.
    permitted: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    permitted += [x509.IPAddress(ip_network(address)) for address in addresses]
    excluded: list[x509.GeneralName] = [] if names else [x509.DNSName("")]
    if not addresses:
        excluded += [x509.IPAddress(ip_network("0.0.0.0/0")), x509.IPAddress(ip_network("::/0"))]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key.public_key(), key.public_key(), now, validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.NameConstraints(permitted or None, excluded or None), critical=True)
    )
    return Credential(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Credential,
    hosts: Sequence[str],
    *,
    now: datetime,
    validity: timedelta = SERVER_VALIDITY,
) -> Credential:
    """Issue a server certificate (P-256, serverAuth) for DNS names and IP addresses.

    Nothing keeps it within the authority's names but the verifying side, which is the point of constraints.

    Args:
        authority: who signs.
        hosts: the subject's alternative names, one at least.
        now: the time, with a zone; in the past for one that has expired.
        validity: from `now` on; it starts an hour earlier for clocks that are behind.
    """
    names, addresses = split_hosts(hosts)
    alternatives = [*map(x509.DNSName, names), *map(x509.IPAddress, addresses)]
    key = ec.generate_private_key(ec.SECP256R1())
    # Not one of the hosts: where there is no DNS name, OpenSSL checks a common name that looks like one against the
    # constraints, and an address looks like one.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Restante server")])
    issuer = authority.certificate.subject
    builder = (
        _builder(subject, issuer, key.public_key(), authority.key.public_key(), now, validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    )
    return Credential(builder.sign(authority.key, hashes.SHA256()), key)


def fingerprint(certificate: x509.Certificate | bytes) -> bytes:
    """SHA-256 of the certificate's DER, 32 bytes: what an enrollment ticket carries of the authority."""
    if isinstance(certificate, x509.Certificate):
        certificate = certificate.public_bytes(serialization.Encoding.DER)
    return sha256(certificate).digest()


def pem_to_der(pem: str) -> bytes:
    """The DER of the one certificate in this PEM text.

    Raises:
        AuthorityError: it is not exactly one certificate.
    """
    body = pem.strip()
    if body.count("-----BEGIN ") != 1:
        raise AuthorityError("This is not one certificate in PEM.")
    try:
        der = ssl.PEM_cert_to_DER_cert(body)
        x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise AuthorityError("This is not one certificate in PEM.") from error
    return der


def to_der(certificate: x509.Certificate) -> bytes:
    """The certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def der_to_pem(der: bytes) -> str:
    """The certificate in PEM, lines of 64 characters."""
    text = base64.b64encode(der).decode("ascii")
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def save_together(credential: Credential, path: Path) -> None:
    """Write certificate and key to one file, 0600: whoever reads it while it is replaced never has one without the
    other."""
    private_directory(path.parent)
    replace_private(path, credential.certificate_pem + credential.key_pem)


def save(credential: Credential, certificate: Path, key: Path) -> None:
    """Write certificate and key, each at once and 0600. The key comes first: a certificate never lacks its key."""
    private_directory(key.parent)
    replace_private(key, credential.key_pem)
    replace_private(certificate, credential.certificate_pem)


def load(certificate: Path, key: Path) -> Credential:
    """Read what `save` wrote.

    Raises:
        AuthorityError: a file is missing or not what it should be, or the two do not belong together.
    """
    loaded = load_certificate(certificate)
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise AuthorityError(f"The private key {key} can't be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"{key} is not an unencrypted private key in PEM.") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
        raise AuthorityError(f"The key {key} does not belong to the certificate {certificate}.")
    return Credential(loaded, private)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM.

    Raises:
        AuthorityError: it is missing or not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise AuthorityError(f"The certificate {path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise AuthorityError(f"{path} is not a certificate in PEM.") from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that an authority may vouch for, or that a server's certificate is for."""
    extensions = certificate.extensions
    names: Iterable[x509.GeneralName]
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        try:
            names = extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
        except x509.ExtensionNotFound:
            names = ()
    return [str(name.value).partition("/")[0] for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def split_hosts(hosts: Sequence[str]) -> tuple[list[str], list[Address]]:
    """The DNS names (lower case, IDNs in their ASCII form) and the addresses among `hosts`.

    Raises:
        AuthorityError: there is none, or one is not ASCII or empty.
    """
    names: list[str] = []
    addresses: list[Address] = []
    for host in hosts:
        try:
            addresses.append(ip_address(host.strip("[]")))
        except ValueError:
            if not host or not host.isascii() or any(character in host for character in " :/*"):
                raise AuthorityError(f"{host!r} is neither a DNS name nor an IP address.") from None
            names.append(host.lower())
    if not hosts:
        raise AuthorityError("A certificate needs one DNS name or IP address at least.")
    return names, addresses


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now: datetime,
    validity: timedelta,
) -> x509.CertificateBuilder:
    start = now.astimezone(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SKEW)
        .not_valid_after(start + validity)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
