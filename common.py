"""What the four scripts share and what must answer at once: flags, one-line errors, files written whole.

Imports the standard library only, so that a wrong flag or --help answers before torch is loaded. Reading and scoring
is in data.py, everything that needs torch is in model.py.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

STARTED = time.monotonic()  # --stop-after counts from here
# of a process that torchrun started, beside others on the same job; a process by itself is the first of one
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
RANK, LOCAL_RANK, WORLD, LOCAL_WORLD = (
    (int(os.environ[name]) for name in TORCHRUN) if {*TORCHRUN, "MASTER_ADDR"} <= os.environ.keys() else (0, 0, 1, 1)
)
joined = False  # whether the processes work together by now; before that, a mistake is the same for all

# ---------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake that the user can mend. Its message names the file, the row or the flag, and says what to do."""


def run(main):
    """Calls `main()`. A UserError becomes one line on stderr and exit code 2; any other error keeps its traceback."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the work is done: Ctrl-C while Python tidies up ends it silently
    except UserError as error:
        sys.exit(fail(error))
    except BrokenPipeError:  # the reader of our output, `| head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _stop(number, frame):
    """SIGTERM, by which Slurm ends a job whose time is up, and torchrun one of which a process died: ends as by an
    exception, so that no half-written file stays."""
    print(f"{Path(sys.argv[0]).name}: stopped by SIGTERM; files are whole, run it again to go on", file=sys.stderr)
    sys.exit(128 + number)


def fail(message):
    """Prints the one line of a user's mistake. → the exit code, 2. Names come from strangers' files, so a line break or
    a terminal's control code in them is shown and not obeyed."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    if LOCAL_RANK > 0 and not joined:
        # The machine's first process makes the same mistake and will say so, and torchrun then ends this one silently.
        # Were this one to end before it, torchrun would stop the first one before it has said anything.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
    print(f"{Path(sys.argv[0]).name}: error: {shown}", file=sys.stderr)
    return 2


def listing(items, most=10):
    """'a, b, c and 4 more': the first ten of many culprits, the rest counted."""
    items = [str(item) for item in items]
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def _one_line_for_ctrl_c(kind, error, trace, default=sys.excepthook):
    """Ctrl-C needs no traceback. The process still dies of SIGINT, so that a shell loop around it stops as well."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C; files are whole, run it again to go on", file=sys.stderr)
    else:
        default(kind, error, trace)


sys.excepthook = _one_line_for_ctrl_c

# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, no abbreviated flags, and --input and --output."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
        folders = self.add_argument_group("folders")
        folders.add_argument("--input", type=Path, default=Path("input"), help="the competition's files, only read")
        folders.add_argument("--output", type=Path, default=Path("output"), help="everything that the kit writes")

    def error(self, message):
        sys.exit(fail(f"{message} (--help lists the flags)"))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every default."""


def number(kind, minimum=None, above=None):
    """An argparse type: an int or float with a lower bound, so that 0 epochs or a NaN rate is refused by name."""

    def parse(text):
        value = kind(text)
        if (minimum is not None and not value >= minimum) or (above is not None and not value > above):
            bound = f"at least {minimum}" if minimum is not None else f"above {above}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid whole number value: 'x'"
    return parse


# ---------------------------------------------------------------- files


def prepared_folder(args):
    return args.output / "prepared"


def experiment_folder(args, name):
    """OUTPUT/EXP. A name is one plain folder name, and not that of the prepared data."""
    if not name or name != Path(name).name or name in (".", "..", "prepared"):
        raise UserError(f"--exp {name!r} can't be an experiment's name: use letters, digits, - and _")
    return args.output / name


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, which takes its place when the block ends well.

    The data is on disk before the name is: a reader, a crash or a power cut sees the old file or the new one, never
    half of it. A disk that is full or can't be written is the user's to mend, so it ends as a UserError.
    """
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what the disk said
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path} can't be written ({cause.strerror or cause}): mend that, or use another --output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, what, wait=False):
    """Holds the lock file `path` for the block. `what` is being worked on; a second process waits, or is refused with
    the name of the first. A process that died holds no lock: the system lets go of it."""
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
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def remove_leftovers(folder, name="*"):
    """Removes what a killed process left of the files `name`, half written. Only for the holder of their lock."""
    for path in folder.glob(f".tmp*.{name}"):
        path.unlink(missing_ok=True)


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path, table):
    """Writes a pandas table without its index; floats in the 9 digits that give a float32 back exactly."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def read_json(path, remedy):
    """Reads a file that another script wrote; `remedy` says which command makes it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {remedy}") from None


def file_hash(path):
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cpu_count():
    """The cores that this process may use, which in a container or under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(total, description, unit="img"):
    """A tqdm bar with a rate and the time left; silent where stdout is no terminal, or without a description."""
    from tqdm import tqdm

    silent = description is None or not sys.stdout.isatty() or RANK > 0
    return tqdm(total=total, desc=description, unit=unit, disable=silent, leave=False, dynamic_ncols=True)


def say(*words):
    """Prints at once, also into a pipe or a log file; of several processes on one job, the first alone."""
    if RANK == 0:
        print(*words, flush=True)
