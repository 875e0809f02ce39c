"""Enrolled devices by the thousand: their keys, where these are kept, and how they are registered.

On a stack of this machine the first is enrolled as any device is; the others are written to the registry and the
broker in bulk, with what an enrollment would leave there. Everywhere else each of them is enrolled over HTTP, as fast
as the gateway lets one address enroll.
"""

import base64
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_agent import files, identity, pins
from device_agent.identity import DeviceKey, Identity
from fabric.signing import signing_key
from topology import enrollment, names

PEERING, KEYS = "peering.json", "devices.jsonl"
HTTP_TIMEOUT = 30.0  # seconds
TAKEN = (
    "devices of these names exist, or did, and their keys are not here: choose another --name-prefix, or the"
    " --state-dir that they were made with"
)
ENROLL_TRIES = 200  # of one device whose turn has not come; each waits as long as it is told

Document = dict[str, Any]
Say = Callable[[str], None]


class Unusable(RuntimeError):
    """Devices can't be made or used; the text says why."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a device has for itself: `secret` is its key in DER (PKCS 8), base64."""

    id: names.DeviceId
    generation: int
    secret: str

    @property
    def private(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_der_private_key(base64.b64decode(self.secret), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def document(self) -> Document:
        return {"id": self.id, "generation": self.generation, "secret": self.secret}


@dataclass(frozen=True, slots=True)
class Enrolled:
    """`answer` is what one of them was told at its enrollment; all but the id and the generation is everybody's."""

    answer: Mapping[str, Any]
    devices: tuple[Own, ...]

    def identities(self) -> Iterator[Identity]:
        """Raises `device_agent.errors.BadAnswer`."""
        peering = identity.parse_peering(self.answer)
        pinned = replace(pins.one(self.answer["authority"]), version=int(self.answer.get("authorities_version", 0)))
        for own in self.devices:
            key = signing_key(own.private)
            mine = replace(peering, device=own.id, generation=own.generation)
            yield Identity(DeviceKey(key.private, dict(key.public), key.kid), mine, pinned)

    def document(self) -> Document:
        return {"answer": dict(self.answer), "devices": [own.document() for own in self.devices]}

    def first(self, count: int) -> "Enrolled":
        return Enrolled(self.answer, self.devices[:count])

    def split(self, parts: int) -> list["Enrolled"]:
        return [Enrolled(self.answer, self.devices[part::parts]) for part in range(parts)]


def parse(document: Document) -> Enrolled:
    """What `Enrolled.document` gave."""
    return Enrolled(document["answer"], tuple(_own(each) for each in document["devices"]))


def device_ids(prefix: str, count: int) -> list[names.DeviceId]:
    """Raises `topology.names.NameRefused`."""
    return [names.device(f"{prefix}-{number}") for number in range(count)]


def new_own(id: names.DeviceId, generation: int = 1) -> Own:
    private = ec.generate_private_key(ec.SECP256R1())
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Own(id, generation, base64.b64encode(der).decode())


class Kept:
    """Devices in a directory of their own (0700), so that a later run has them again."""

    def __init__(self, directory: Path) -> None:
        """Raises `device_agent.errors.StateRefused`."""
        files.private_directory(directory)
        self._peering, self._keys = directory / PEERING, directory / KEYS

    def load(self) -> Enrolled | None:
        """None: there are none yet. Raises `Unusable` or `device_agent.errors.StateRefused`."""
        try:
            answer = json.loads(files.read_private(self._peering))
            lines = files.read_private(self._keys).decode().splitlines()
            return Enrolled(answer, tuple(_own(json.loads(line)) for line in lines))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise Unusable(f"{self._keys.parent} holds no devices that can be read: {error}") from None

    def add(self, enrolled: Enrolled) -> None:
        """Durable when it returns."""
        files.write_private(self._peering, json.dumps(dict(enrolled.answer), indent=1).encode())
        with os.fdopen(os.open(self._keys, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write("".join(f"{json.dumps(own.document())}\n" for own in enrolled.devices).encode())
            file.flush()
            os.fsync(file.fileno())


class Registrar:
    """Enrolls devices over HTTP with an operator's token, as `restante-agent enroll` does."""

    def __init__(self, api_url: str, authority: Path | None, token: str) -> None:
        """`authority` None: the system's. Raises `OSError`."""
        self._http = httpx.Client(
            base_url=api_url,
            verify=ssl.create_default_context(cafile=authority),
            headers={"Authorization": f"Bearer {token}"},
            timeout=HTTP_TIMEOUT,
        )

    def enroll(self, id: names.DeviceId) -> tuple[Document, Own]:
        """A device made and enrolled, and the answer. Raises `Unusable`."""
        made = self._post("/v1/devices", {"id": id}, f"{id} can't be made")
        own = new_own(id)
        code = made["enrollment"]["code"]
        key = signing_key(own.private)
        hashed = enrollment.code_hash(enrollment.decode_code(code))
        headers = {"typ": enrollment.PROOF_TYPE}
        proof = jwt.encode({"code_hash": hashed, "iat": int(time.time())}, key.private, "ES256", headers=headers)
        asked = {"code": code, "public_key": dict(key.public), "proof": proof}
        answer = self._post("/v1/enroll", asked, f"{id} can't be enrolled")
        return answer, replace(own, generation=answer["generation"])

    def enroll_all(self, ids: Sequence[names.DeviceId], say: Say) -> Iterator[tuple[Document, Own]]:
        """One after the other. Raises `Unusable`."""
        told = time.monotonic()
        for number, id in enumerate(ids):
            if time.monotonic() - told > 5:
                told = time.monotonic()
                say(f"enrolled {number} of {len(ids)} devices; the gateway bounds how many one address may")
            yield self.enroll(id)

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, body: Document, what: str) -> Document:
        for _ in range(ENROLL_TRIES):
            try:
                answer = self._http.post(path, json=body)
            except httpx.HTTPError as error:
                raise Unusable(f"{what}: {self._http.base_url} can't be reached: {error}") from None
            if answer.status_code not in (429, 503):
                break
            time.sleep(min(float(answer.headers.get("Retry-After", 1)), 60))
        if answer.status_code == 409:
            raise Unusable(f"{what}: {TAKEN}")
        if not answer.is_success:
            problem = (
                answer.json() if "json" in answer.headers.get("Content-Type", "") else {"title": answer.text[:200]}
            )
            raise Unusable(f"{what}: {problem.get('title')}: {problem.get('detail', '')}")
        document: Document = answer.json()
        return document


def _own(kept: Document) -> Own:
    return Own(names.DeviceId(kept["id"]), int(kept["generation"]), kept["secret"])
