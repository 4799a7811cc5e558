"""File locks, released when the process exits."""

import contextlib
import os
import platform
import sys
import time

try:
    import fcntl
except ImportError:  # Windows
    sys.exit("foldkit needs Linux or macOS; on Windows, run it in WSL")
from common import UserError, say, warn


@contextlib.contextmanager
def opened(path):
    """Open a lock file, created if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): fix that or see --output") from error
    with file:
        yield file


def lock(file, alone=True, wait=True):
    """Lock an open file, for this process alone or shared. → False where another process holds it and `wait` is False.
    A file system without locks is a warning."""
    try:
        fcntl.lockf(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # which of them depends on the system
        return False
    except OSError as error:
        warn(f"no locks on the file system of {file.name} ({error.strerror}): start nothing twice at the same time")
    return True


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Hold the lock file `path` for the block. A second process waits or raises UserError, with a line that says which
    process works on `what`."""
    with opened(path) as file:
        if not lock(file, wait=False):
            file.seek(0)
            busy = f"{what} is being worked on by {file.read().strip()}"
            if not wait:
                raise UserError(f"{busy}: wait for it, or stop it")
            say(f"{busy}: waiting for it")
            lock(file)
        note = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its note
            file.truncate(0)
            os.write(file.fileno(), note.encode())
        yield


def remove_leftovers(folder, *names):
    """Remove temporary files of `names` that a killed process left; the caller must hold their lock."""
    for name in names:
        for path in folder.glob(f".tmp*.{name}"):
            path.unlink(missing_ok=True)
