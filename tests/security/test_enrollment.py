"""Enrollment: one ticket, one key, proven; and an agent that says nothing before it knows to whom."""

import json
import socket
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api.operator import authority
from tests.harness.device import (
    Device,
    b64,
    enroll_request,
    es256,
    forge,
    hs256,
    new_key,
    own_source,
    proof,
    public_jwk,
    public_pem,
    unsigned,
)
from tests.harness.stack import AgentProcess, Document, RunningStack
from topology import enrollment

P = 2**256 - 2**224 + 2**192 + 2**96 - 1  # the field of P-256


@pytest.fixture
def http(stack: RunningStack) -> Iterator[httpx.Client]:
    with own_source(stack) as client:
        yield client


def code_of(ticket: str) -> bytes:
    return enrollment.decode_ticket(ticket).code


def keys(stack: RunningStack, device: str) -> list[str]:
    return [key["kid"] for key in stack.ok(stack.http.get(f"/v1/devices/{device}/keys"))["items"]]


def kid(key: ec.EllipticCurvePrivateKey) -> str:
    return enrollment.thumbprint(public_jwk(key))


def at_once(stack: RunningStack, requests: list[Document]) -> list[httpx.Response]:
    barrier = threading.Barrier(len(requests))

    def post(request: Document) -> httpx.Response:
        with own_source(stack) as client:
            client.get("/v1/time")  # connected
            barrier.wait(10)
            return client.post("/v1/enroll", json=request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(post, requests))


def events(stack: RunningStack, device: str) -> list[str]:
    path = stack.stack.files.state_dir / "ledger.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        return [kind for (kind,) in ledger.execute("SELECT kind FROM events WHERE device = ? ORDER BY id", (device,))]


# ---- The ticket --------------------------------------------------------------------------------------


def test_a_ticket_used_twice_at_once_enrolls_one_key(stack: RunningStack) -> None:
    device, ticket = stack.create_device("raced")
    rivals = [new_key() for _ in range(8)]
    answers = at_once(stack, [enroll_request(code_of(ticket), key) for key in rivals])
    assert sorted(answer.status_code for answer in answers) == [200] + [410] * 7
    winner = next(key for key, answer in zip(rivals, answers, strict=True) if answer.status_code == 200)
    assert keys(stack, device) == [kid(winner)]
    assert events(stack, device).count("enrollment.contested") == 7
    assert events(stack, device).count("device.enrolled") == 1


def test_the_same_key_gets_the_same_answer(stack: RunningStack) -> None:
    device, ticket = stack.create_device("repeated")
    key = new_key()
    answers = at_once(stack, [enroll_request(code_of(ticket), key) for _ in range(6)])
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert keys(stack, device) == [kid(key)]
    assert events(stack, device).count("device.enrolled") == 1


def test_a_used_code_says_no_more_than_an_unknown_one(stack: RunningStack, http: httpx.Client) -> None:
    device, ticket = stack.create_device("used")
    first = new_key()
    stack.ok(http.post("/v1/enroll", json=enroll_request(code_of(ticket), first)))
    used = http.post("/v1/enroll", json=enroll_request(code_of(ticket), new_key()))
    unknown = http.post("/v1/enroll", json=enroll_request(b"\0" * 16, new_key()))
    assert (used.status_code, unknown.status_code) == (410, 410)
    assert {**used.json(), "instance": ""} == {**unknown.json(), "instance": ""}
    assert device not in used.text
    assert keys(stack, device) == [kid(first)]


@pytest.mark.parametrize("what", ["suspend", "new ticket", "delete"])
def test_tickets_are_voided(stack: RunningStack, http: httpx.Client, what: str) -> None:
    device, ticket = stack.create_device("voided")
    match what:
        case "suspend":
            patch = {"Content-Type": "application/merge-patch+json"}
            for enabled in ("false", "true"):
                body = f'{{"enabled": {enabled}}}'
                stack.ok(stack.http.patch(f"/v1/devices/{device}", content=body, headers=patch))
        case "new ticket":
            stack.ok(stack.http.post(f"/v1/devices/{device}/enrollment"))
        case _:
            assert stack.http.delete(f"/v1/devices/{device}").status_code == 204
            stack.ok(stack.http.post("/v1/devices", json={"id": device}))
    assert http.post("/v1/enroll", json=enroll_request(code_of(ticket), new_key())).status_code == 410
    assert keys(stack, device) == []


def test_guessing_is_limited_by_source(stack: RunningStack) -> None:
    with own_source(stack) as guesser, own_source(stack) as other:
        guesses = [
            guesser.post("/v1/enroll", json=enroll_request(bytes(15) + bytes([n]), new_key())) for n in range(40)
        ]
        refused = [answer for answer in guesses if answer.status_code == 429]
        assert refused
        assert guesses[-1].status_code == 429
        assert int(refused[0].headers["Retry-After"]) >= 1
        claimed = {"X-Forwarded-For": "10.1.2.3", "Forwarded": "for=10.1.2.3"}
        again = guesser.post("/v1/enroll", json=enroll_request(bytes(16), new_key()), headers=claimed)
        assert again.status_code == 429, "the source is what it says of itself"
        assert other.post("/v1/enroll", json=enroll_request(bytes(16), new_key())).status_code == 410


def test_the_ticket_pins_the_authority_that_is_served(stack: RunningStack, http: httpx.Client) -> None:
    _, ticket = stack.create_device("pinned")
    served = http.get("/v1/authority")
    assert sha256(ssl.PEM_cert_to_DER_cert(served.text)).digest() == enrollment.decode_ticket(ticket).authority_digest


# ---- The key -----------------------------------------------------------------------------------------


def _foreign(code: bytes, own: ec.EllipticCurvePrivateKey, foreign: ec.EllipticCurvePrivateKey) -> dict[str, Document]:
    """Requests with somebody else's public key, or without a proof that holds."""
    right = enroll_request(code, own)
    public = public_jwk(foreign)
    payload = {"code_hash": enrollment.code_hash(code), "iat": 0}
    head = {"alg": "ES256", "typ": enrollment.PROOF_TYPE}
    return {
        "proof by another key": right | {"public_key": public},
        "proof by another key, with its jwk": right
        | {"public_key": public, "proof": forge({**head, "jwk": public_jwk(own)}, payload, es256(own))},
        "no proof": {name: value for name, value in right.items() if name != "proof"},
        "empty proof": right | {"proof": ""},
        "null proof": right | {"proof": None},
        "proof for another code": right | {"proof": proof(b"\1" * 16, own)},
        "proof of another type": right | {"proof": proof(code, own, typ=enrollment.DEVICE_TOKEN_TYPE)},
        "proof without a type": right | {"proof": forge({"alg": "ES256"}, payload, es256(own))},
        "proof of long ago": right | {"proof": proof(code, own, iat=1)},
        "proof of tomorrow": right | {"proof": proof(code, own, iat=2**33)},
        "proof with iat NaN": right
        | {"proof": forge(head, f'{{"code_hash": "{enrollment.code_hash(code)}", "iat": NaN}}', es256(own))},
        "proof with iat Infinity": right
        | {"proof": forge(head, f'{{"code_hash": "{enrollment.code_hash(code)}", "iat": Infinity}}', es256(own))},
        "alg none": right | {"proof": forge({**head, "alg": "none"}, payload, unsigned)},
        "HS256 with the public key": right
        | {"proof": forge({**head, "alg": "HS256"}, payload, hs256(public_pem(own)))},
        "no public key": {name: value for name, value in right.items() if name != "public_key"},
        "code in lower case": right | {"code": right["code"].lower()},
        "code with a byte less": right | {"code": enrollment.encode_code(code)[:-3]},
        "the ticket for the code": right | {"code": enrollment.encode_ticket(enrollment.Ticket(code, bytes(32)))},
        "more members": right | {"device_id": "victim"},
    }


def test_a_key_is_registered_with_its_proof_only(stack: RunningStack, victim: Device, http: httpx.Client) -> None:
    device, ticket = stack.create_device("proven")
    own, code = new_key(), code_of(ticket)
    for what, request in _foreign(code, own, victim.key).items():
        answer = http.post("/v1/enroll", json=request)
        assert answer.status_code == 422, (what, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
    assert keys(stack, device) == []
    # None of it has used the ticket up.
    assert http.post("/v1/enroll", json=enroll_request(code, own)).status_code == 200
    assert keys(stack, device) == [kid(own)]


def _bad_keys(key: ec.EllipticCurvePrivateKey) -> dict[str, Document]:
    right: Document = public_jwk(key)
    numbers = key.public_key().public_numbers()

    def point(x: int, y: int) -> Document:
        return right | {"x": b64(x.to_bytes(32, "big")), "y": b64(y.to_bytes(32, "big"))}

    p384 = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
    return {
        "off the curve": point(numbers.x, numbers.y ^ 1),
        "zero": point(0, 0),
        "x of the field's size": point(P, numbers.y),
        "y past the field": point(numbers.x, 2**256 - 1),
        "another point's y": point(numbers.x, new_key().public_key().public_numbers().y),
        "with d": right | {"d": b64(key.private_numbers().private_value.to_bytes(32, "big"))},
        "with an empty d": right | {"d": ""},
        "P-384": right | {"crv": "P-384", "x": b64(p384.x.to_bytes(48, "big")), "y": b64(p384.y.to_bytes(48, "big"))},
        "P-384 as P-256": right | {"x": b64(p384.x.to_bytes(48, "big")), "y": b64(p384.y.to_bytes(48, "big"))},
        "secp256k1 by name": right | {"crv": "secp256k1"},
        "RSA": {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        "oct": {"kty": "oct", "k": "c2VjcmV0"},
        "OKP": {"kty": "OKP", "crv": "Ed25519", "x": right["x"]},
        "a leading zero": right | {"x": b64(b"\0" + numbers.x.to_bytes(32, "big"))},
        "short x": right | {"x": right["x"][:-2]},
        "padded x": right | {"x": right["x"] + "="},
        "x as a number": right | {"x": 1},
        "no y": {name: value for name, value in right.items() if name != "y"},
        "jku beside it": right | {"jku": "https://127.0.0.1:9/"},
        "x5c beside it": right | {"x5c": []},
        "nothing": {},
    }


def test_a_key_must_be_a_public_point_of_the_curve(stack: RunningStack, http: httpx.Client) -> None:
    device, ticket = stack.create_device("on-curve")
    key, code = new_key(), code_of(ticket)
    for what, jwk in _bad_keys(key).items():
        answer = http.post("/v1/enroll", json=enroll_request(code, key) | {"public_key": jwk})
        assert answer.status_code == 422, (what, answer.text)
        assert jwk.get("d", "-") not in answer.text or not jwk.get("d")
    assert keys(stack, device) == []


def test_one_key_is_one_devices(stack: RunningStack, victim: Device, http: httpx.Client) -> None:
    """Also when its coordinates are spelled otherwise: the last character of each has two bits to spare."""
    device, ticket = stack.create_device("twin")
    code = code_of(ticket)
    same = enroll_request(code, victim.key)
    assert http.post("/v1/enroll", json=same).status_code == 409
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    x = same["public_key"]["x"]
    spelled = {x[:-1] + alphabet[alphabet.index(x[-1]) + more] for more in (1, 2, 3)}
    spelled.add(
        x.replace("-", "+").replace("_", "/") if set(x) & {"-", "_"} else x[:-1] + alphabet[alphabet.index(x[-1]) + 1]
    )
    for other in spelled:
        answer = http.post("/v1/enroll", json=same | {"public_key": {**same["public_key"], "x": other}})
        assert answer.status_code == 422, answer.text
    assert keys(stack, device) == []
    assert keys(stack, victim.id) == [victim.kid]


# ---- The agent, and a server that listens ------------------------------------------------------------


class Sniffer:
    """A TLS server that keeps every byte it can read, and answers as it is told."""

    def __init__(self, certificate: Path, key: Path, answers: Callable[[str], bytes | None]) -> None:
        self.heard: list[bytes] = []
        self.handshakes: list[bool] = []
        self._answers = answers
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                plain, _ = self._listener.accept()
                plain.settimeout(10)
                try:
                    with self._context.wrap_socket(plain, server_side=True) as client:
                        self._talk(client)
                    self.handshakes.append(True)
                except OSError:
                    self.handshakes.append(False)

    def _talk(self, client: ssl.SSLSocket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            more = client.recv(65_536)
            if not more:
                return
            request += more
            self.heard.append(more)
        head, _, body = request.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += client.recv(65_536)
        self.heard.append(body)
        method, path, _ = head.decode().split(" ", 2)
        answer = self._answers(f"{method} {path}")
        if answer is not None:
            kind = b"application/json" if answer.startswith(b"{") else b"application/x-pem-file"
            client.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                % (kind, len(answer), answer)
            )

    def __enter__(self) -> "Sniffer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(15)


class Impostor:
    """An authority of the attacker's own, with a certificate for this host."""

    def __init__(self, directory: Path, name: str) -> None:
        now = datetime.now(UTC)
        ours = authority.make_authority(name, ["localhost", "127.0.0.1"], now=now)
        self.pem, self.ca_key = directory / f"{name}-ca.pem", directory / f"{name}-ca.key"
        self.certificate, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        authority.save(ours, self.pem, self.ca_key)
        authority.save(authority.issue(ours, ["localhost", "127.0.0.1"], now=now), self.certificate, self.key)

    @property
    def digest(self) -> bytes:
        return authority.fingerprint(authority.load_certificate(self.pem))


def enroll(stack: RunningStack, home: Path, port: int, ticket: str) -> tuple[int, str, AgentProcess]:
    agent = AgentProcess(stack, home, "nobody")
    done = agent.cli("enroll", "--api-url", f"https://localhost:{port}", stdin=ticket.encode())
    return done.returncode, (done.stdout + done.stderr).decode(), agent


def secrets_of(ticket: str) -> list[bytes]:
    code = code_of(ticket)
    return [
        code,
        code.hex().encode(),
        enrollment.encode_code(code).encode(),
        ticket.encode(),
        enrollment.code_hash(code).encode(),
        b64(code).encode(),
    ]


@pytest.mark.parametrize("shown", ["its own authority", "the true authority"])
def test_the_code_is_not_sent_to_an_impostor(stack: RunningStack, tmp_path: Path, shown: str) -> None:
    """It serves either authority: the ticket tells it from the true one, and TLS from who holds the true one's key."""
    impostor = Impostor(tmp_path, "impostor")
    _, ticket = stack.create_device("sniffed")
    pem = (impostor.pem if shown == "its own authority" else stack.stack.files.authority).read_bytes()
    with Sniffer(impostor.certificate, impostor.key, lambda asked: pem) as sniffer:
        status, said, agent = enroll(stack, tmp_path / "device", sniffer.port, ticket)
    assert status != 0
    assert "authority" in said
    heard = b"".join(sniffer.heard)
    assert heard.startswith(b"GET /v1/authority "), "the control: it does hear what is said to it"
    assert b"POST" not in heard
    assert not any(secret in heard for secret in secrets_of(ticket))
    if shown == "the true authority":
        assert sniffer.handshakes == [True, False], "the second connection was verified, and given up"
    else:
        # The second one asks what became of the ticket's authority.
        assert sniffer.handshakes == [True, True]
        assert heard.count(b" HTTP/1.1") == heard.count(b"GET /v1/authority") == 2
    assert ticket not in said
    assert not (agent.state / "peering.json").exists()


def test_the_code_is_sent_to_the_one_the_ticket_names(stack: RunningStack, tmp_path: Path) -> None:
    """The control: where the impostor's own authority is in the ticket, the sniffer hears it all. An authority in
    the answer other than the pinned one is refused all the same, and nothing is kept."""
    ours, other = Impostor(tmp_path, "ours"), Impostor(tmp_path, "other")
    ticket = enrollment.encode_ticket(enrollment.Ticket(b"\5" * 16, ours.digest))

    def answers(served: Path) -> Callable[[str], bytes]:
        answer = {
            "device_id": "swapped",
            "generation": 1,
            "amqps_url": "amqps://localhost:1/devices",
            "api_url": "https://localhost:1",
            "audience": {"mq": "restante/mq/local", "api": "restante/api"},
            "authority": served.read_text(),
            "signing_keys": {"keys": [{**public_jwk(new_key()), "kid": "k" * 43, "alg": "ES256", "use": "sig"}]},
        }
        return lambda asked: ours.pem.read_bytes() if asked.startswith("GET") else json.dumps(answer).encode()

    with Sniffer(ours.certificate, ours.key, answers(other.pem)) as sniffer:
        status, said, agent = enroll(stack, tmp_path / "swapped", sniffer.port, ticket)
    assert enrollment.encode_code(b"\5" * 16).encode() in b"".join(sniffer.heard)
    assert status != 0
    assert "authority" in said
    assert not (agent.state / "peering.json").exists()
    with Sniffer(ours.certificate, ours.key, answers(ours.pem)) as sniffer:
        status, said, agent = enroll(stack, tmp_path / "right", sniffer.port, ticket)
    assert status == 0, said
    assert (agent.state / "peering.json").exists()


def test_the_private_key_never_leaves_the_device(stack: RunningStack, tmp_path: Path) -> None:
    ours = Impostor(tmp_path, "ours")
    ticket = enrollment.encode_ticket(enrollment.Ticket(b"\6" * 16, ours.digest))
    answers = lambda asked: ours.pem.read_bytes() if asked.startswith("GET") else b"{}"  # noqa: E731
    with Sniffer(ours.certificate, ours.key, answers) as sniffer:
        status, _, agent = enroll(stack, tmp_path / "device", sniffer.port, ticket)
    assert status != 0
    key = serialization.load_pem_private_key((agent.state / "device.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    raw = key.private_numbers().private_value.to_bytes(32, "big")
    heard = b"".join(sniffer.heard)
    assert public_jwk(key)["x"].encode() in heard
    for spelled in (raw, raw.hex().encode(), b64(raw).encode(), b'"d"', b"PRIVATE"):
        assert spelled not in heard
    assert (agent.state / "device.key").stat().st_mode & 0o777 == 0o600
