"""Finding a broker that is new enough; where the machine has none, a Debian userland that has it.

Nothing here starts a node: the version is read from the broker's own files.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from api.operator.processes import MissingToolError, tool
from api.operator.secrets import private_directory

Log = Callable[[str], None]
Version = tuple[int, int, int]

# Older ones can't hold a device in its place: before 4.0.3 it can publish under another device's key, and before 4.2.6
# it can ask whether any mailbox exists.
MINIMUM: Version = (4, 2, 6)
SUITE = "forky"
PACKAGES = ("rabbitmq-server", "postgresql")
_RECIPE = 1  # change it when the way a userland is made changes: a new one is made then
_PROGRESS_EVERY = 5.0  # seconds
_REMEDY = "install RabbitMQ 4.2.6 or newer, or run as root on Linux so that a Debian userland can be prepared"


class UserlandError(Exception):
    """There is no broker to run; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """A broker that can be run. All paths are as seen inside `root`.

    Attributes:
        version: the broker's version.
        server: the script `rabbitmq-server` itself, not a distribution's wrapper (which drops the environment).
        epmd: Erlang's port mapper.
        root: the userland they are in; None: this machine's own.
    """

    version: Version
    server: Path
    epmd: Path
    root: Path | None = None


def find_binaries(configured: Path | None = None, *, log: Log) -> Binaries:
    """Return the broker to use: the configured one, else the one in PATH, else the one in the cached userland.

    The userland is prepared if it isn't there (once per machine and user, about a minute, 650 MB).

    Args:
        configured: a `rabbitmq-server` or the directory it is in; then nothing else is tried.
        log: gets a line for what was found, and every few seconds while the userland is prepared.

    Raises:
        UserlandError: no broker of version 4.2.6 or newer can be had.
    """
    if configured is not None:
        return _configured(configured)
    in_path = shutil.which("rabbitmq-server") or shutil.which("rabbitmq-server", path="/usr/sbin:/usr/local/sbin")
    if in_path is not None:
        found = inspect(Path(in_path))
        if found is not None and found.version >= MINIMUM:
            log(f"RabbitMQ {_text(found.version)} found at {found.server}")
            return found
        what = f"RabbitMQ {_text(found.version)}" if found else "a RabbitMQ of unknown version"
        log(f"{in_path} is {what}, {_text(MINIMUM)} or newer is needed: using a userland of our own instead")
    root = prepare_userland(log=log)
    found = inspect(Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), root=root)
    if found is None or found.version < MINIMUM:
        raise UserlandError(f"The userland {root} has no usable RabbitMQ; remove that directory and start again.")
    log(f"RabbitMQ {_text(found.version)} in {root}")
    return found


def inspect(server: Path, *, root: Path | None = None) -> Binaries | None:
    """Describe the broker whose script or directory of scripts this is; None if there isn't one there.

    Distributions put a wrapper in PATH, with the scripts in `lib/rabbitmq/bin` under the same prefix.
    """
    base = root or Path("/")
    given = base / server.relative_to("/") if root else server.absolute()
    if given.is_dir():
        given = given / "rabbitmq-server"
    candidates = [given, given.parent.parent / "lib/rabbitmq/bin/rabbitmq-server"]
    for candidate in candidates:
        script = _resolve(candidate, base)
        version = _version(script.parent.parent / "plugins") if script.is_file() else None
        epmd = _epmd(base)
        if version is not None and epmd is not None:
            return Binaries(version, _inside(script, root), _inside(epmd, root), root)
    return None


def prepare_userland(*, log: Log, cache: Path | None = None, suite: str = SUITE) -> Path:
    """Return the cached Debian userland with RabbitMQ and PostgreSQL, made first if it isn't there.

    It appears under its name only when it is complete, and two runs at once make it once.

    Raises:
        UserlandError: it can't be made.
    """
    directory = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "restante"
    recipe = hashlib.sha256("\n".join((suite, *PACKAGES, str(_RECIPE))).encode()).hexdigest()[:8]
    userland = directory.absolute() / f"userland-{suite}-{recipe}"
    if os.geteuid() != 0:  # running something in it takes root as well
        raise UserlandError(f"RabbitMQ {_text(MINIMUM)} or newer was not found and this is not root: {_REMEDY}.")
    if userland.is_dir():
        return userland
    private_directory(directory)
    with _locked(userland.with_suffix(".lock"), log):
        if not userland.is_dir():
            _make(userland, suite, log)
    return userland


def _configured(path: Path) -> Binaries:
    found = inspect(path)
    if found is None:
        raise UserlandError(f"There is no RabbitMQ at the configured path {path}; name its rabbitmq-server or sbin.")
    if found.version < MINIMUM:
        raise UserlandError(
            f"RabbitMQ {_text(found.version)} at the configured path {path} is too old, {_text(MINIMUM)} or newer is"
            " needed: name a newer one, or leave the path out to have one prepared."
        )
    return found


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _inside(path: Path, root: Path | None) -> Path:
    return path if root is None else Path("/") / path.relative_to(root)


def _resolve(path: Path, base: Path) -> Path:
    """Follow symbolic links as a process with `base` as its root would."""
    for _ in range(40):
        if not path.is_symlink():
            break
        target = path.readlink()
        path = base / target.relative_to("/") if target.is_absolute() else path.parent / target
    return Path(os.path.normpath(path)) if base != Path("/") else path.resolve()


def _version(plugins: Path) -> Version | None:
    """The version in `rabbit.app`, which every release carries among its plugins."""
    for description in sorted(plugins.glob("rabbit-*/ebin/rabbit.app")):
        found = re.search(r"\{\s*vsn\s*,\s*\"(\d+)\.(\d+)(?:\.(\d+))?", description.read_text("utf-8", "replace"))
        if found:
            return int(found[1]), int(found[2]), int(found[3] or 0)
    for archive in sorted(plugins.glob("rabbit-*.ez")):
        if found := re.match(r"rabbit-(\d+)\.(\d+)\.(\d+)", archive.name):
            return int(found[1]), int(found[2]), int(found[3])
    return None


def _epmd(base: Path) -> Path | None:
    if base != Path("/"):
        places: Sequence[Path] = (base / "usr/bin/epmd",)
    else:
        beside = [Path(erl).resolve().parent / "epmd" for erl in (shutil.which("erl"),) if erl]
        places = [*(Path(found) for found in (shutil.which("epmd"),) if found), *beside]
    return next((place for place in places if place.exists()), None)


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another run is preparing the userland: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(userland: Path, suite: str, log: Log) -> None:
    for abandoned in userland.parent.glob(f"{userland.name}.part-*"):  # we hold the lock: nobody works on it
        shutil.rmtree(abandoned, ignore_errors=True)
    part = userland.with_name(f"{userland.name}.part-{os.getpid()}")
    log(f"preparing a Debian userland with RabbitMQ in {userland} (once; about a minute, 650 MB)")
    try:
        # debootstrap mounts /proc, /sys and perhaps /dev in there: not for this machine to see, and above all not for
        # the removal of a half-made tree to walk into.
        private = [tool("unshare", "util-linux"), "--mount", "--propagation=private"]
    except MissingToolError as error:
        raise UserlandError(str(error)) from error
    command = [
        *private,
        _debootstrap(log),
        "--variant=minbase",
        "--force-check-gpg",  # without the keyring it would only warn and go on
        f"--include={','.join(PACKAGES)}",
        suite,
        str(part),
        "",  # debootstrap's own default mirror
        "/usr/share/debootstrap/scripts/sid",  # an older debootstrap does not know the suite by name
    ]
    try:
        _run("debootstrap", command, log)
        part.rename(userland)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log("the userland is ready")


def _debootstrap(log: Log) -> str:
    with contextlib.suppress(MissingToolError):
        return tool("debootstrap", "debootstrap")
    try:
        apt = tool("apt-get", "apt")
    except MissingToolError as error:
        raise UserlandError(
            f"RabbitMQ {_text(MINIMUM)} or newer was not found and neither was debootstrap: {_REMEDY}."
        ) from error
    log("installing debootstrap")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run("apt-get update", [apt, "update", "-qq"], log, environment)
    _run(
        "apt-get install debootstrap",
        [apt, "install", "-y", "-qq", "--no-install-recommends", "debootstrap", "debian-archive-keyring"],
        log,
        environment,
    )
    try:
        return tool("debootstrap", "debootstrap")
    except MissingToolError as error:
        raise UserlandError(str(error)) from error


def _run(what: str, command: Sequence[str], log: Log, environment: dict[str, str] | None = None) -> None:
    """Run it, with its latest line of output logged every few seconds; UserlandError with the last one if it fails."""
    process = subprocess.Popen(  # noqa: S603 - a fixed command, no shell reads it
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # ended as a group
    )
    latest = "started"
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(_PROGRESS_EVERY):
            log(f"  {latest}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        for line in process.stdout or ():
            latest = line.strip()[:200] or latest
        status = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        ended.set()
        reporter.join()
    if status != 0:
        raise UserlandError(f"{what} failed with status {status}: {latest}")
