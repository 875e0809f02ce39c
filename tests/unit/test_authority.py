"""The local authority: what it issues is accepted where it should be, and nowhere else."""

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from api.operator import authority
from api.operator.authority import AuthorityError, Credential

NOW = datetime.now(UTC)
HOSTS = ["localhost", "fabric.example.com", "127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def ours() -> Credential:
    return authority.make_authority("Restante test authority", HOSTS, now=NOW)


def handshake(
    trusted: Credential, server: Credential, host: str, directory: Path, *, intermediate: bytes = b""
) -> None:
    """A TLS handshake in memory, verified as strictly as OpenSSL can; ssl.SSLError if the client refuses."""
    authority.save(server, directory / "server.pem", directory / "server.key")
    with (directory / "server.pem").open("ab") as chain:
        chain.write(intermediate)
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(directory / "server.pem", directory / "server.key")
    connecting = ssl.create_default_context(cadata=trusted.certificate_pem.decode())
    connecting.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = connecting.wrap_bio(to_client, to_server, server_hostname=host)
    answering = listening.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        done = 0
        for side in (client, answering):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                pass
        if done == 2:
            return
    raise AssertionError("the handshake did not end")


@pytest.mark.parametrize("host", HOSTS)
def test_what_it_issues_is_trusted_for_each_of_its_hosts(ours: Credential, host: str, tmp_path: Path) -> None:
    server = authority.issue(ours, HOSTS, now=NOW)
    handshake(ours, server, host, tmp_path)


def test_another_host_name_is_refused(ours: Credential, tmp_path: Path) -> None:
    server = authority.issue(ours, ["fabric.example.com"], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(ours, server, "localhost", tmp_path)


def test_an_expired_certificate_is_refused(ours: Credential, tmp_path: Path) -> None:
    server = authority.issue(ours, ["localhost"], now=NOW - timedelta(days=2), validity=timedelta(days=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(ours, server, "localhost", tmp_path)


def test_a_certificate_of_another_authority_is_refused(ours: Credential, tmp_path: Path) -> None:
    other = authority.make_authority("Restante test authority", HOSTS, now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ours, authority.issue(other, HOSTS, now=NOW), "localhost", tmp_path)


@pytest.mark.parametrize(
    ("permitted", "issued"),
    [
        (HOSTS, "bank.example.org"),
        (HOSTS, "example.com"),
        (HOSTS, "10.0.0.1"),
        (HOSTS, "127.0.0.2"),
        (["localhost"], "127.0.0.1"),  # no address permitted: none is, rather than all
        (["127.0.0.1"], "localhost"),
        (["127.0.0.1"], "::1"),
    ],
)
def test_it_is_not_trusted_outside_its_names(permitted: list[str], issued: str, tmp_path: Path) -> None:
    constrained = authority.make_authority("constrained", permitted, now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="subtree violation"):
        handshake(constrained, authority.issue(constrained, [issued], now=NOW), issued, tmp_path)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_an_authority_for_one_kind_of_name_works(host: str, tmp_path: Path) -> None:
    single = authority.make_authority("single", [host], now=NOW)
    handshake(single, authority.issue(single, [host], now=NOW), host, tmp_path)


def test_a_server_certificate_can_not_issue(ours: Credential, tmp_path: Path) -> None:
    server = authority.issue(ours, ["localhost"], now=NOW)
    forged = authority.issue(server, ["localhost"], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        handshake(ours, forged, "localhost", tmp_path, intermediate=server.certificate_pem)


def test_the_authority_says_what_it_may(ours: Credential) -> None:
    extensions = ours.certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert extensions.get_extension_for_class(x509.NameConstraints).critical
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert isinstance(ours.key.curve, ec.SECP256R1)


def test_a_server_certificate_says_what_it_is_for(ours: Credential) -> None:
    server = authority.issue(ours, HOSTS, now=NOW, validity=timedelta(days=5)).certificate
    assert list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.not_valid_after_utc == NOW.replace(microsecond=0) + timedelta(days=5)
    assert server.not_valid_before_utc < NOW
    server.verify_directly_issued_by(ours.certificate)


def test_files_are_private_and_read_back(ours: Credential, tmp_path: Path) -> None:
    certificate, key = tmp_path / "ca" / "ca.pem", tmp_path / "ca" / "ca.key"
    authority.save(ours, certificate, key)
    authority.save(ours, certificate, key)  # again, over the first
    for path, mode in ((certificate, 0o600), (key, 0o600), (key.parent, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert {path.name for path in key.parent.iterdir()} == {"ca.pem", "ca.key"}
    loaded = authority.load(certificate, key)
    assert loaded.certificate == ours.certificate
    assert loaded.key_pem == ours.key_pem


def test_a_key_of_another_certificate_is_refused(ours: Credential, tmp_path: Path) -> None:
    authority.save(ours, tmp_path / "a.pem", tmp_path / "a.key")
    authority.save(authority.issue(ours, HOSTS, now=NOW), tmp_path / "b.pem", tmp_path / "b.key")
    with pytest.raises(AuthorityError, match="does not belong"):
        authority.load(tmp_path / "a.pem", tmp_path / "b.key")


def test_missing_and_broken_files_are_one_sentence(ours: Credential, tmp_path: Path) -> None:
    authority.save(ours, tmp_path / "a.pem", tmp_path / "a.key")
    with pytest.raises(AuthorityError, match="can't be read: No such file"):
        authority.load(tmp_path / "none.pem", tmp_path / "a.key")
    with pytest.raises(AuthorityError, match="can't be read: No such file"):
        authority.load(tmp_path / "a.pem", tmp_path / "none.key")
    (tmp_path / "broken").write_text("not a certificate")
    with pytest.raises(AuthorityError, match="not a certificate in PEM"):
        authority.load(tmp_path / "broken", tmp_path / "a.key")
    with pytest.raises(AuthorityError, match="not an unencrypted private key"):
        authority.load(tmp_path / "a.pem", tmp_path / "broken")


def test_pem_and_der_are_each_others_inverse(ours: Credential) -> None:
    pem = ours.certificate_pem.decode()
    assert authority.pem_to_der(pem) == ours.certificate_der
    assert authority.der_to_pem(ours.certificate_der) == pem


@pytest.mark.parametrize("text", ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_not_one_certificate_is_refused(text: str) -> None:
    with pytest.raises(AuthorityError):
        authority.pem_to_der(text)


def test_two_certificates_are_not_one(ours: Credential) -> None:
    with pytest.raises(AuthorityError):
        authority.pem_to_der(ours.certificate_pem.decode() * 2)


def test_the_fingerprint_is_of_the_der(ours: Credential) -> None:
    assert authority.fingerprint(ours.certificate) == authority.fingerprint(ours.certificate_der)
    assert len(authority.fingerprint(ours.certificate)) == 32


@pytest.mark.parametrize("hosts", [[], [""], ["*.example.com"], ["https://example.com"], ["bücher.example"]])
def test_what_is_no_host_is_refused(hosts: list[str]) -> None:
    with pytest.raises(AuthorityError):
        authority.make_authority("none", hosts, now=NOW)
