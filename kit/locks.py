"""Who works on it? Lock files, which the system lets go of when their process dies."""

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
    """Yields the open lock file, made if it isn't there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): mend that or see --output") from error
    with file:
        yield file


def lock(file, alone=True, wait=True):
    """Locks an open file, for this process alone or shared. → False where another process stands in the way and `wait`
    is False. Where the file system has no locks, a warning says so."""
    try:
        fcntl.lockf(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # which of the two, the system chooses
        return False
    except OSError as error:
        warn(f"no locks on the file system of {file.name} ({error.strerror}): start nothing twice at the same time")
    return True


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Holds the lock file `path` for the block. `what` is being worked on: a second process waits, or gets an error;
    both name the first."""
    with opened(path) as file:
        if not lock(file, wait=False):
            file.seek(0)
            busy = f"{what} is being worked on by {file.read().strip()}"
            if not wait:
                raise UserError(f"{busy}: wait for it, or stop it")
            say(f"{busy}: waiting for it")
            lock(file)
        note = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # a disk that is full: the lock holds without its note
            file.truncate(0)
            os.write(file.fileno(), note.encode())
        yield


def remove_leftovers(folder, *names):
    """Removes what a killed process left of the files `names`, half written. Only for the holder of their lock."""
    for name in names:
        for path in folder.glob(f".tmp*.{name}"):
            path.unlink(missing_ok=True)
