"""Files of the state directory: private, complete or absent, durable once written."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agent import errors


def private_directory(path: Path) -> None:
    """Make the directory (0700) if need be, and check that nobody else can write to it.

    Raises:
        errors.StateRefused: it can't be made, is not a directory of ours, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise errors.StateRefused(f"the state directory {path} can't be used: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise errors.StateRefused(f"the state directory {path} belongs to another user; run the agent as its owner")
    if status.st_mode & 0o022:
        raise errors.StateRefused(f"the state directory {path} is writable by others; run: chmod 700 {path}")


def write_private(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write the file (0600) at once and durably; with `new` it must not exist yet.

    Raises:
        FileExistsError: `new`, and it exists.
        OSError
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(temporary, path)  # unlike a rename, refuses to replace
            temporary.unlink()
        else:
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """For reading a file and writing it anew: whoever else does so in this directory waits. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path) -> bytes:
    """The content of a secret file.

    Raises:
        FileNotFoundError
        errors.StateRefused: it is not a plain file of ours, or others may read or write it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise errors.StateRefused(f"{path} can't be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise errors.StateRefused(f"{path} is not a plain file that belongs to this user")
        if status.st_mode & 0o077:
            raise errors.StateRefused(f"{path} is open to other users; run: chmod 600 {path}")
        return file.read()
