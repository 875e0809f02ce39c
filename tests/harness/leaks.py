"""What must never be in a log: searched for in everything that the programs of a stack wrote, when it ends."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_ALNUM = rb"[A-Za-z0-9]"
_SECRETS = {
    "a token": re.compile(rb"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a key's private member": re.compile(rb"""\\?["']d\\?["']\s*:\s*\\?["'][A-Za-z0-9_-]{43}\\?["']"""),
    "credentials": re.compile(rb"(?i)\bBasic [A-Za-z0-9+/]{12,}={0,2}"),
    "a code or ticket": re.compile(rb"(?<!%s)(?:[A-Z2-7]{26}|[A-Z2-7]{77})(?!%s)" % (_ALNUM, _ALNUM)),
}
_KEPT = re.compile(rb"[A-Za-z0-9+/=_-]{20,}")  # a password, or a line of a key
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_AROUND = 60  # bytes shown before a find


def found_in(content: bytes, known: Mapping[str, bytes]) -> list[str]:
    """What kinds of secret this holds, each with what stands before it; never the secret."""
    finds = [(what, each.start()) for what, pattern in _SECRETS.items() for each in pattern.finditer(content)]
    finds += [(what, content.index(secret)) for what, secret in known.items() if secret in content]
    return [f"{what} after {content[max(0, at - _AROUND) : at]!r}" for what, at in finds]


def kept_in(state: Path) -> dict[str, bytes]:
    """The secrets that a stack keeps in files: its service accounts' passwords, the broker's cookie, its keys."""
    found = {
        path
        for pattern in ("secrets/**/*", "**/*.key", "certificates/*", "**/.erlang.cookie")
        for path in state.glob(pattern)
    }
    return {
        f"what is kept in {path.relative_to(state)}": max(lines, key=len)
        for path in found
        if path.is_file() and (lines := _KEPT.findall(_CERTIFICATE.sub(b"", path.read_bytes())))
    }


def logs_in(directory: Path) -> list[Path]:
    """Everything that programs wrote there: gateway and worker, the broker's own logs, agents."""
    found = [path for path in directory.rglob("*") if path.suffix == ".log" or path.parent.name == "log"]
    return [path for path in found if path.is_file()]


def check(logs: Iterable[Path], known: Mapping[str, bytes]) -> None:
    """Raises AssertionError that names each log with a secret in it."""
    found = {str(path): finds[:5] for path in logs if path.exists() and (finds := found_in(path.read_bytes(), known))}
    assert not found, f"secrets in logs: {found}"
