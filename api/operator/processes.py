"""Processes that must not outlive their owner: started with a death signal, marked, found again, ended."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

# Runs a command inside another userland. Everything is mounted in a private namespace, so nothing is left on the host
# when the last process ends. The root is a tmpfs that borrows the userland's /usr and /etc: what is visible besides
# them is /proc, /dev and the directories given, at the paths they have outside.
_ENCLOSE = """
set -eu
userland=$1; shift
new=$userland/mnt
mount -t tmpfs -o mode=755 tmpfs "$new"
mkdir "$new/usr" "$new/etc" "$new/proc" "$new/dev" "$new/run" "$new/var" "$new/tmp"
chmod 1777 "$new/tmp"
for link in bin sbin lib lib64 lib32; do
    if [ -L "$userland/$link" ]; then cp -P "$userland/$link" "$new/$link"; fi
done
mount --bind "$userland/usr" "$new/usr"
mount --bind "$userland/etc" "$new/etc"
mount --rbind /proc "$new/proc"
mount --rbind /dev "$new/dev"
while [ "$1" != -- ]; do
    mkdir -p "$new$1"
    mount --bind "$1" "$new$1"
    shift
done
shift
exec chroot "$new" "$@"
"""


class MissingToolError(Exception):
    """A program of the operating system is not there; the message says which and where it comes from."""


def tool(name: str, package: str) -> str:
    """The path of a system program, or MissingToolError with the package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise MissingToolError(f"The program {name} is missing; install the package {package}.")
    return found


def enclosed(userland: Path, directories: Sequence[Path], argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` with `userland` as its root and only `directories` of the host in sight.

    It replaces itself at each step, so the process started is the one that ends up running `argv`.
    """
    return [
        tool("unshare", "util-linux"),
        "--mount",
        "--propagation=private",
        "/bin/sh",
        "-c",
        _ENCLOSE,
        "enclose",
        str(userland),
        *map(str, directories),
        "--",
        *argv,
    ]


class Child:
    """A process in its own session that gets `death_signal` from the kernel when this process dies, however it dies.

    The kernel sends that signal when the *thread* that started the child ends, so the child is started by a thread of
    its own, which lives as long as the child does.
    """

    def __init__(
        self, argv: Sequence[str], *, environment: Mapping[str, str], output: Path, death_signal: signal.Signals
    ) -> None:
        self._argv = [tool("setpriv", "util-linux"), f"--pdeathsig={death_signal.name[3:]}", *argv]
        self._environment = dict(environment)
        self._output = output
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(target=self._keep, args=(started,), name=f"keeper of {argv[0]}", daemon=True).start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        """The process id; also the id of its process group and session."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self, first: signal.Signals, patience: float) -> None:
        """Send `first`, wait `patience` seconds for the end, then kill the whole group. Does nothing twice."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, first)
            if not self.wait(patience):
                self.kill()

    def kill(self) -> None:
        """SIGKILL the process and its group, and wait for the end. Does nothing once the process has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait(10.0)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; False if it still runs after `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _keep(self, started: "Future[subprocess.Popen[bytes]]") -> None:
        try:
            with self._output.open("ab") as output:
                process = subprocess.Popen(  # noqa: S603 - argv comes from this package, no shell reads it
                    self._argv,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()


def marked(variable: str, value: str) -> list[int]:
    """The processes that were started with `variable=value` in their environment, other than this one.

    A process shows its environment in /proc from its start on, so a recycled process id is never mistaken for ours.
    """
    needle = f"{variable}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_marked(variable: str, value: str, patience: float) -> int:
    """End what `marked` finds: SIGTERM, `patience` seconds, SIGKILL. Returns how many there were."""
    first = pids = marked(variable, value)
    for signal_, allowed in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_)
        until = time.monotonic() + allowed
        while (pids := marked(variable, value)) and time.monotonic() < until:
            time.sleep(0.05)
        if not pids:
            break
    return len(first)
