"""Certificates and the authority as files: renewed in time, replaced whole, brought along, exported, succeeded."""

import ssl
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from api.operator import authority, certificates, certs, cli, setup, succession
from api.operator.authority import AuthorityError, Credential
from api.operator.certificates import Reloaded
from api.operator.setup import Files
from api.operator.succession import Unlock
from api.settings import Settings
from fabric.errors import Conflict, Invalid

HOSTS = ["localhost", "api.example.org"]
PASSPHRASE = b"correct horse"


def quiet(_: str) -> None:
    return


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(state_dir=tmp_path / "state")
    files(made).state_dir.mkdir(mode=0o700)
    succession.prepare(files(made).authorities, HOSTS, quiet)
    setup.make_certificates(made, HOSTS, HOSTS[:1], quiet)
    return made


def files(settings: Settings) -> Files:
    return Files(settings.state_dir)


def contents(settings: Settings) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in settings.state_dir.rglob("*") if path.is_file()}


def serial(path: Path) -> int:
    return authority.load_certificate(path).serial_number


def restante(settings: Settings, *arguments: str) -> int:
    return cli.main(["--state-dir", str(settings.state_dir), "certs", *arguments])


def reissue(settings: Settings, begun: timedelta, validity: timedelta) -> None:
    """As if the certificates had been issued then."""
    signer = succession.signer(files(settings).authorities, succession.serving(files(settings).authorities), None)
    for path in (files(settings).certificate, files(settings).broker_certificate):
        issued = authority.issue(signer, HOSTS, now=datetime.now(UTC) - begun, validity=validity)
        authority.save_together(issued, path)


# ---- Renewal -----------------------------------------------------------------------------------------


def test_a_certificate_and_its_key_are_one_private_file(settings: Settings) -> None:
    for path in (files(settings).certificate, files(settings).broker_certificate):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_renewing_is_idempotent_and_forced(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(settings)
    assert restante(settings, "renew") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert contents(settings) == before
    assert restante(settings, "renew", "--force") == 0
    changed = {name for name, content in contents(settings).items() if content != before[name]}
    assert changed == {str(files(settings).certificate), str(files(settings).broker_certificate)}
    assert restante(settings, "renew", "--days", "5") == 0
    ends = authority.load_certificate(files(settings).certificate).not_valid_after_utc
    assert timedelta(days=4) < ends - datetime.now(UTC) <= timedelta(days=5)


@pytest.mark.parametrize(("days", "due"), [(55, False), (65, True), (89, True), (91, True)])
def test_less_than_a_third_of_its_life_is_when_it_is_renewed(settings: Settings, days: int, due: bool) -> None:
    reissue(settings, timedelta(days=days), timedelta(days=90))
    before = serial(files(settings).certificate)
    assert certificates.is_due(authority.load_certificate(files(settings).certificate), datetime.now(UTC)) is due
    certs.renew(settings, 0, quiet, force=False, unlock=None)
    assert (serial(files(settings).certificate) != before) is due
    assert certificates.expiries(settings.state_dir).keys() == {"api", "broker", "authority"}


@pytest.mark.parametrize("days", [-1, 398])
def test_days_out_of_bounds_are_refused(settings: Settings, days: int) -> None:
    with pytest.raises(Invalid):
        certs.renew(settings, days, quiet, force=False, unlock=None)


def test_a_name_that_is_missing_is_issued_at_the_next_start(settings: Settings) -> None:
    setup.make_certificates(settings, HOSTS, HOSTS, quiet)
    assert authority.hosts_of(authority.load_certificate(files(settings).broker_certificate)) == HOSTS


class Pair:
    """A connection in memory; the client trusts whoever."""

    def __init__(self, serving: ssl.SSLContext) -> None:
        asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = asking.wrap_bio(back, there)
        self.server = serving.wrap_bio(there, back, server_side=True)
        for side in (self.client, self.server, self.client, self.server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue

    @property
    def serial(self) -> int:
        shown = self.client.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number

    def talk(self) -> bool:
        self.client.write(b"ping")
        return self.server.read() == b"ping"


async def test_a_live_listener_takes_a_new_certificate_and_keeps_its_connections(settings: Settings) -> None:
    path = files(settings).certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    followed = Reloaded(context, path, path)
    before = Pair(context)
    old = before.serial
    certs.renew(settings, 0, quiet, force=True, unlock=None)
    assert Pair(context).serial == old, "nobody has looked yet"
    await followed.look()
    assert Pair(context).serial == serial(path) != old
    assert before.talk()

    path.write_bytes(b"damaged")
    await followed.look()
    assert Pair(context).serial != old, "what it had is kept"
    path.unlink()
    setup.make_certificates(settings, HOSTS, HOSTS, quiet)
    await followed.look()
    assert Pair(context).serial == serial(path)


# ---- The authority's key -----------------------------------------------------------------------------


def exported(settings: Settings, tmp_path: Path, name: str = "ca-export.pem") -> Unlock:
    secret = tmp_path / "passphrase"
    secret.write_bytes(PASSPHRASE + b"\n")
    file = tmp_path / name
    assert restante(settings, "ca", "export", str(file), "--delete", "--passphrase-file", str(secret)) == 0
    return Unlock(file, PASSPHRASE)


def test_an_exported_key_is_encrypted_and_off_the_machine(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = succession.keys(files(settings).authorities)[0]
    unlock = exported(settings, tmp_path)
    content = unlock.file.read_bytes()
    assert stat.S_IMODE(unlock.file.stat().st_mode) == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content
    again = serialization.load_pem_private_key(content, PASSPHRASE)
    assert again.private_numbers() == key.private_numbers()  # type: ignore[union-attr]  # both are of P-256
    assert not files(settings).authority_key.exists()
    assert PASSPHRASE.decode() not in capsys.readouterr().err

    before = contents(settings)
    setup.make_certificates(settings, HOSTS, HOSTS[:1], quiet)  # as at each start: there is nothing to do
    assert restante(settings, "renew") == 0
    assert contents(settings) == before
    assert restante(settings, "renew", "--force") == 1
    assert "--ca-key FILE" in capsys.readouterr().err
    secret = tmp_path / "passphrase"
    given = ("--ca-key", str(unlock.file), "--passphrase-file", str(secret))
    assert restante(settings, "renew", "--force", *given) == 0
    assert serial(files(settings).certificate) != authority_serial(before, settings)
    assert not files(settings).authority_key.exists(), "it is used, and not kept"


def authority_serial(before: dict[str, bytes], settings: Settings) -> int:
    return x509.load_pem_x509_certificate(before[str(files(settings).certificate)]).serial_number


def test_a_start_without_the_key_goes_on_while_the_certificate_is_good(settings: Settings, tmp_path: Path) -> None:
    reissue(settings, timedelta(days=70), timedelta(days=90))
    exported(settings, tmp_path)
    said: list[str] = []
    setup.make_certificates(settings, HOSTS, HOSTS, said.append)
    assert "is not renewed" in said[0]
    with pytest.raises(AuthorityError, match="--ca-key"):
        setup.make_certificates(settings, [*HOSTS, "other.example.org"], HOSTS, quiet)


@pytest.mark.parametrize(
    ("passphrase", "there", "said"),
    [("short", False, "8 characters"), ("long enough", True, "can't be written")],
)
def test_an_export_that_fails_deletes_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], passphrase: str, there: bool, said: str
) -> None:
    secret, file = tmp_path / "passphrase", tmp_path / "export"
    secret.write_text(passphrase)
    if there:
        file.write_text("something else")
    assert restante(settings, "ca", "export", str(file), "--delete", "--passphrase-file", str(secret)) == 1
    assert said in capsys.readouterr().err
    assert files(settings).authority_key.exists()
    assert not there or file.read_text() == "something else"


def test_a_wrong_passphrase_or_key_is_refused(settings: Settings, tmp_path: Path) -> None:
    unlock = exported(settings, tmp_path)
    for given, said in (
        (replace(unlock, passphrase=b"another one"), "can't be decrypted"),
        (replace(unlock, file=tmp_path / "none"), "can't be read"),
    ):
        with pytest.raises(AuthorityError, match=said):
            certs.renew(settings, 0, quiet, force=True, unlock=given)
    other = Settings(state_dir=tmp_path / "other")
    succession.prepare(files(other).authorities, HOSTS, quiet)
    setup.make_certificates(other, HOSTS, HOSTS, quiet)
    with pytest.raises(AuthorityError, match="is not in"):
        certs.renew(other, 0, quiet, force=True, unlock=unlock)


# ---- Succession --------------------------------------------------------------------------------------


def shown(settings: Settings) -> list[str]:
    return [str(each["state"]) for each in certs.listing(settings) if "authority" in each]


def test_rotate_then_switch(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    first = succession.serving(files(settings).authorities)
    before = serial(files(settings).certificate)
    assert restante(settings, "ca", "rotate", "--host", "new.example.org") == 0
    assert shown(settings) == ["serving", "next"]
    assert (serial(files(settings).certificate), succession.serving(files(settings).authorities)) == (before, first)
    callers = x509.load_pem_x509_certificates(files(settings).authority.read_bytes())
    assert callers[0] == first
    assert len(callers) == 2
    assert authority.hosts_of(callers[1]) == [*HOSTS, "new.example.org"]
    assert restante(settings, "ca", "rotate") == 1
    assert "waits already" in capsys.readouterr().err

    assert restante(settings, "ca", "switch", "--retire-after", "600") == 0
    assert shown(settings) == ["retired", "serving"]
    second = succession.serving(files(settings).authorities)
    assert second == callers[1]
    for path in (files(settings).certificate, files(settings).broker_certificate):
        authority.load_certificate(path).verify_directly_issued_by(second)
    assert [key.public_key() for key in succession.keys(files(settings).authorities)] == [second.public_key()]
    assert x509.load_pem_x509_certificates(files(settings).authority.read_bytes())[0] == second
    assert restante(settings, "ca", "switch") == 1
    assert "no successor waits" in capsys.readouterr().err


def test_a_succession_with_the_keys_off_the_machine(settings: Settings, tmp_path: Path) -> None:
    first = exported(settings, tmp_path, "first")
    known = files(settings).authorities
    with pytest.raises(AuthorityError, match="--ca-key"):
        succession.rotate(known, [], None, quiet)
    succession.rotate(known, [], first, quiet)
    second = exported(settings, tmp_path, "second")
    with pytest.raises(AuthorityError, match="is not in"):
        certs.switch(settings, None, first, quiet)
    certs.switch(settings, None, second, quiet)
    authority.load_certificate(files(settings).certificate).verify_directly_issued_by(succession.serving(known))
    assert not known.keys.exists()


def test_a_switch_that_was_interrupted_is_ended_by_the_next_start(settings: Settings) -> None:
    known = files(settings).authorities
    succession.rotate(known, [], None, quiet)
    callers = known.certificates.read_bytes()
    succession.switch(known, 600, None, quiet)
    known.certificates.write_bytes(callers)  # as if it had ended before it came to that
    succession.prepare(known, HOSTS, quiet)
    setup.make_certificates(settings, HOSTS, HOSTS, quiet)
    serving = succession.serving(known)
    assert x509.load_pem_x509_certificates(known.certificates.read_bytes())[0] == serving
    authority.load_certificate(files(settings).certificate).verify_directly_issued_by(serving)


@pytest.mark.parametrize("seconds", [599, 367 * 86_400])
def test_an_overlap_out_of_bounds_is_refused(settings: Settings, seconds: int) -> None:
    certs.rotate(settings, [], None, quiet)
    with pytest.raises(Invalid):
        certs.switch(settings, seconds, None, quiet)
    assert shown(settings) == ["serving", "next"]


def test_without_a_successor_nothing_is_switched(settings: Settings) -> None:
    before = contents(settings)
    with pytest.raises(Conflict):
        certs.switch(settings, None, None, quiet)
    assert contents(settings) == before


# ---- Brought along -----------------------------------------------------------------------------------


class Elsewhere:
    """An authority of somebody else, and what it issued."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory = directory
        directory.mkdir()
        self.signer = authority.make_authority("theirs", [*HOSTS, "other.example.org"], now=datetime.now(UTC))
        self.authority = directory / "ca.pem"
        self.authority.write_bytes(self.signer.certificate_pem)
        self.issue(*names)

    def issue(self, *names: str, by: Credential | None = None, age: int = 0) -> None:
        begun = datetime.now(UTC) - timedelta(days=age)
        issued = authority.issue(by or self.signer, names, now=begun, validity=timedelta(days=30))
        authority.save(issued, self.directory / "server.pem", self.directory / "server.key")

    def settings(self, state: Path) -> Settings:
        return Settings(
            state_dir=state,
            authority_certificate=str(self.authority),
            tls_certificate=str(self.directory / "server.pem"),
            tls_key=str(self.directory / "server.key"),
        )


def install(given: Settings, names: list[str]) -> None:
    succession.adopt(files(given).authorities, Path(given.authority_certificate))
    setup.make_certificates(given, names, names, quiet)


def test_certificates_can_be_brought_along(tmp_path: Path) -> None:
    theirs = Elsewhere(tmp_path / "theirs", *HOSTS)
    given = theirs.settings(tmp_path / "state")
    install(given, HOSTS)
    assert succession.serving(files(given).authorities) == theirs.signer.certificate
    assert not files(given).authority_key.exists()
    before = serial(files(given).certificate)
    assert serial(files(given).broker_certificate) == before
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files(given).certificate)
    theirs.issue(*HOSTS)  # by whatever renews it there
    certs.renew(given, 0, quiet, force=False, unlock=None)
    assert serial(files(given).certificate) != before
    with pytest.raises(AuthorityError, match="not ours"):
        certs.rotate(given, [], None, quiet)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("another name", "for api.example.org: Hostname mismatch"),
        ("another issuer", "has to be issued by 'authority_certificate'"),
        ("expired", "certificate has expired"),
        ("another key", "not a certificate and its unencrypted private key"),
        ("no file", "No such file"),
    ],
)
def test_what_devices_would_refuse_is_refused_at_setup(tmp_path: Path, what: str, said: str) -> None:
    theirs = Elsewhere(tmp_path / "theirs", *HOSTS)
    match what:
        case "another name":
            theirs.issue("localhost")
        case "another issuer":
            theirs.issue(*HOSTS, by=authority.make_authority("stranger", HOSTS, now=datetime.now(UTC)))
        case "expired":
            theirs.issue(*HOSTS, age=31)
        case "another key":
            (theirs.directory / "server.key").write_bytes(theirs.signer.key_pem)
        case _:
            (theirs.directory / "server.pem").unlink()
    given = theirs.settings(tmp_path / "state")
    with pytest.raises(AuthorityError, match=said):
        install(given, HOSTS)
    assert not files(given).certificate.exists()


def test_settings_of_half_a_kind_are_refused(tmp_path: Path) -> None:
    theirs = Elsewhere(tmp_path / "theirs", *HOSTS)
    with pytest.raises(AuthorityError, match="'tls_certificate' does not say"):
        install(replace(theirs.settings(tmp_path / "state"), tls_certificate=""), HOSTS)
    with pytest.raises(AuthorityError, match="not the certificate of an authority"):
        succession.adopt(files(Settings(state_dir=tmp_path / "x")).authorities, theirs.directory / "server.pem")


def test_another_authority_does_not_quietly_take_the_place_of_what_devices_trust(
    settings: Settings, tmp_path: Path
) -> None:
    theirs = Elsewhere(tmp_path / "theirs", *HOSTS)
    before = contents(settings)
    with pytest.raises(AuthorityError, match="enroll all devices again"):
        install(theirs.settings(settings.state_dir), HOSTS)
    assert contents(settings) == before
