"""Servers to compare with, from Debian's packages: unpacked into a cache, never installed.

A package's own scripts would make users and start services. So the files alone are taken: the package manager fetches
a server, and what it needs and this machine lacks; the libraries are found there by the loader's search path.
"""

import fcntl
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from api.operator.processes import MissingToolError, tool
from api.operator.secrets import private_directory
from bench.run import say

_FETCHING = 180.0  # seconds


class NotHereError(Exception):
    """A peer can't be run on this machine; the message says why, as a note of the result."""


@dataclass(frozen=True, slots=True)
class Program:
    """A server's program, and the environment it runs in."""

    path: Path
    environment: dict[str, str]


def program(name: str, package: str) -> Program:
    """The program of this machine, else the one in the cache, which is filled first.

    Raises:
        NotHereError: it can't be had.
    """
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
    if here := shutil.which(name, path=f"{environment['PATH']}:/usr/sbin:/usr/local/sbin"):
        return Program(Path(here), environment)
    root = _unpacked(package)
    found = next((place for place in root.glob(f"usr/*bin/{name}") if place.is_file()), None)
    if found is None:
        raise NotHereError(f"not run: the package {package} has no program {name}")
    libraries = ":".join(map(str, [*root.glob("usr/lib/*-linux-gnu*"), *root.glob("lib/*-linux-gnu*")]))
    return Program(found, {**environment, "LD_LIBRARY_PATH": libraries})


def _unpacked(package: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restante"
    root = cache / "peers" / package
    if root.is_dir():
        return root
    if os.geteuid() != 0:
        raise NotHereError(f"not run: {package} is not installed, and fetching it takes root on Debian")
    private_directory(cache)
    private_directory(cache / "peers")
    with (cache / "peers" / f"{package}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            _fetch(package, root)
    return root


def _fetch(package: str, root: Path) -> None:
    try:
        apt, dpkg = tool("apt-get", "apt"), tool("dpkg", "dpkg")
    except MissingToolError:
        raise NotHereError(f"not run: {package} is not installed, and this is no Debian to fetch it from") from None
    say(f"fetching {package} from Debian into {root} (once; nothing is installed)")
    archives, part = root.with_suffix(".archives"), root.with_suffix(".part")
    for left in (archives, part):
        shutil.rmtree(left, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    install = [apt, "install", "-y", "-qq", "--download-only", "--no-install-recommends"]
    try:
        _call([*install, f"-oDir::Cache::archives={archives}", package], apt, package)
        part.mkdir()
        for archive in sorted(archives.glob("*.deb")):
            _call([dpkg, "-x", str(archive), str(part)], apt, package)
        part.rename(root)
    finally:
        shutil.rmtree(archives, ignore_errors=True)


def _call(argv: list[str], apt: str, package: str) -> None:
    """Run it; a list of packages that is missing or too old is brought up to date once."""
    for attempt in (1, 2):
        done = subprocess.run(  # noqa: S603 - a fixed command
            argv, capture_output=True, text=True, timeout=_FETCHING, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode == 0:
            return
        if attempt == 1 and argv[0] == apt:
            subprocess.run([apt, "update", "-qq"], capture_output=True, timeout=_FETCHING, check=False)  # noqa: S603
    lines = done.stderr.strip().splitlines() or ["no word why"]
    raise NotHereError(f"not run: {package} can't be fetched: {lines[-1]}")
