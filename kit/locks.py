"""Who works on it? Lock files, which the system lets go of when their process dies."""

import contextlib
import os
import platform
import sys
import time

from common import UserError, warn

try:
    import fcntl
except ImportError:  # Windows
    sys.exit("foldkit needs Linux or macOS; on Windows, run it in WSL")


@contextlib.contextmanager
def locked(path, what, wait=False, note=""):
    """Holds the lock file `path` for the block. `what` is being worked on: a second process waits, or gets an error
    that names the first. The file names its holder, with a `note`. A dead process holds no lock. Where the file system
    has no locks, a warning says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): mend that, or use another --output") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two, the system chooses
            file.seek(0)
            raise UserError(f"{what} is in the hands of {file.read().strip()}: wait for it, or stop it") from None
        except OSError as error:
            warn(f"no locks on the file system of {path} ({error.strerror}): start nothing twice at the same time")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')} {note}\n")
        file.flush()
        yield


def holder(path):
    """→ what the lock file says of the other process that holds it, or None. Never ask for a lock of one's own: closing
    the file would let go of it."""
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            return file.read().strip()
        except OSError:  # no locks here
            return None
    return None


def remove_leftovers(folder, *names):
    """Removes what a killed process left of the files `names`, half written. Only for the holder of their lock."""
    for name in names:
        for path in folder.glob(f".tmp*.{name}"):
            path.unlink(missing_ok=True)
