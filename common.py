"""Shared by all scripts and parts: flags, one-line errors, files replaced atomically, tables, progress."""

import argparse
import ast
import contextlib
import gc
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path


def _one_line_for_ctrl_c(kind, error, trace, default=sys.excepthook):
    """Print one line for Ctrl-C, no traceback. The process still dies of SIGINT, which ends a shell loop too."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C: run it again to resume", file=sys.stderr)
    else:
        default(kind, error, trace)


sys.excepthook = _one_line_for_ctrl_c  # before the imports that take a second

import numpy as np
import pandas as pd
from scipy import special
from tqdm import tqdm

__version__ = "0.1.0"
# Python looks for garbage among the million objects of new modules: a fifth of a start. So this module raises the
# threshold until `run`; the section order in pyproject.toml has it imported before what takes long.
GARBAGE = gc.get_threshold()
gc.set_threshold(10**6)
ROOT = Path(__file__).resolve().parent  # of the kit
STARTED = time.monotonic()  # --stop-after counts from here
# Set by torchrun; a process that it didn't start is the only one
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
RANK, LOCAL_RANK, WORLD, LOCAL_WORLD = (
    (int(os.environ[name]) for name in TORCHRUN) if {*TORCHRUN, "MASTER_ADDR"} <= os.environ.keys() else (0, 0, 1, 1)
)
joined = False  # whether the process group is there; until then each process finds the same mistakes
PREPARE = "run python 00_prepare.py"  # a remedy
AGAIN = f"{PREPARE} again, with the same flags and"
OWN_FOLDERS = ("prepared", "unpacked", "tensorboard", "wandb")  # in --output, not of experiments
WIDTH = 120  # characters of the widest line that is printed
BOLD, RED, YELLOW = 1, 31, 33  # a terminal's codes
MANY = 100  # classes; above it logits have a file of their own, and probabilities are float32
LINE_SECONDS = 30  # between the lines of progress in a log
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


class UserError(Exception):
    """A user's mistake. The message names the file, the row or the flag, and the remedy."""


def run(main, parser=None):
    """Parse the flags and call `main(args)`, or `main(words)` without a parser. A UserError becomes one line on stderr
    and exit code 2; any other error keeps its traceback. The process ends with it."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        args = parser.parse_args() if parser else sys.argv[1:]
        gc.freeze()  # or each look for garbage would take in the new modules, for which run.sh pays a second
        gc.set_threshold(*GARBAGE)
        main(args)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the work is done: Ctrl-C while Python exits ends it silently
    except UserError as error:
        sys.exit(fail(error))
    except BrokenPipeError:  # the reader of our output, `| head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        gc.unfreeze()  # or libraries report at the exit what they call leaks
        gc.disable()  # a last look for garbage would take half a second


def _stop(number, frame):
    """Leave by an exception at SIGTERM, by which Slurm and torchrun end a process, so that no temporary file stays."""
    print(f"{Path(sys.argv[0]).name}: stopped by SIGTERM: run it again to resume", file=sys.stderr)
    sys.exit(128 + number)


def fail(message):
    """Print the one line of a user's mistake. → the exit code, 2. Names come from strangers' files, so a line break or
    a terminal's control code in them is escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    if LOCAL_RANK > 0 and not joined:
        # The machine's first process finds the same mistake and prints it; torchrun then ends this one silently.
        # If this one ended first, torchrun would stop the first one before it has printed anything.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
    print(f"{styled(f'{Path(sys.argv[0]).name}: error:', RED, sys.stderr)} {shown}", file=sys.stderr)
    return 2


def warn(*words):
    """Print a warning on stderr, flushed; under torchrun, in the first process alone."""
    if RANK == 0:
        print(styled(f"{Path(sys.argv[0]).name}: warning:", YELLOW, sys.stderr), *words, file=sys.stderr, flush=True)


def styled(text, code, stream):
    """Return the text in a colour or in bold; unchanged off a terminal, or with NO_COLOR or TERM=dumb."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\033[{code}m{text}\033[0m"


def listing(items, most=10):
    """Return 'a, b, c and 4 more': the first `most` items, the others counted."""
    items = [str(item) for item in items]
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, @FILE arguments, no abbreviations, and one line of help a flag."""

    def __init__(self, doc, *more):
        super().__init__(
            usage=argparse.SUPPRESS, description=doc, add_help=False, formatter_class=_HelpFormatter,
            allow_abbrev=False, fromfile_prefix_chars="@",
            epilog="\n".join([*more, "@FILE stands for the flags in FILE, with # comments; it may name another one."]),
        )  # fmt: skip

    def group(self, title):
        """Return the add_argument of a new group of flags, with short metavars."""
        group = self.add_argument_group(title)

        def add(*names, **options):
            if "action" not in options:
                kind = getattr(options.get("type"), "__name__", "")
                options.setdefault("metavar", {"whole number": "N", "number": "X", "Path": "PATH"}.get(kind, "NAME"))
            group.add_argument(*names, **options)

        return add

    def shared(self, add):
        """Add the flags that every script has."""
        add("--input", type=Path, default=Path("input"), metavar="DIR", help="the competition's files, only read")
        add("--output", type=Path, default=Path("output"), metavar="DIR", help="everything that the kit writes")
        add("-h", "--help", action="help", help="show this text and exit")
        add("--version", action="version", version=f"foldkit {__version__}", help="show the kit's version and exit")

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"the line {line!r} of an @FILE can't be read ({error}): fix its quotes")

    def error(self, message):
        sys.exit(fail(f"{message} (--help lists the flags)"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring unchanged, one line a flag at 120 columns, and each default that isn't empty or a switch."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH))

    def _format_args(self, action, default_metavar):
        return f"{action.metavar} …" if action.nargs in ("+", "*") else super()._format_args(action, default_metavar)

    def _get_help_string(self, action):
        default = action.default
        if default is None or isinstance(default, bool) or default in ([], "", " ", argparse.SUPPRESS):
            return action.help
        words = " ".join(map(str, default if isinstance(default, list) else [default])).replace("%", "%%")
        return f"{action.help} (default: {words})"


def number(kind, minimum=-math.inf, above=-math.inf):
    """Return an argparse type: a finite int or float with a lower bound, so that a NaN rate is an error."""

    def parse(text):
        value = kind(text)
        if not (value >= minimum and above < value < math.inf):
            bound = f"above {above}" if above > minimum else f"at least {minimum}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound} and finite")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid whole number value: 'x'"
    return parse


def duration(text):
    """Parse a duration, as an argparse type: '8.5h' → 30600.0 seconds."""
    number, unit = text[:-1], dict(s=1, m=60, h=3600).get(text[-1:])
    seconds = float(number) * unit if unit and number.replace(".", "", 1).isdecimal() else 0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a time such as 8.5h, 90m or 300s")
    return seconds


def key_value(text):
    """Parse a setting, as an argparse type: 'drop_path_rate=0.1' → ('drop_path_rate', 0.1)"""
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def prepared_folder(output):
    return output / "prepared"


def experiment_folder(output, name):
    """Return OUTPUT/EXP. Raises UserError unless the name is a plain folder name, and none of the kit's own folders."""
    if not name or name != Path(name).name or name in (".", "..", *OWN_FOLDERS):
        own = f"the kit has a folder {name}" if name in OWN_FOLDERS else "it must be a plain folder's name"
        raise UserError(f"{name!r} can't be an experiment's name, since {own}: give another")
    if (output / name).is_file():
        raise UserError(f"--exp {name}: {output / name} is a file: give another name")
    return output / name


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends without an error.

    The data is synced before the rename: a reader, a crash or a power cut sees the old file or the new one. Raises
    UserError where the disk is full or can't be written."""
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
        raise UserError(f"{path} can't be written ({cause.strerror or cause}): fix that or see --output") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path, table):
    """Write a pandas table without its index; floats with the 9 digits that restore a float32 exactly."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def read_json(path, remedy):
    """Read a JSON file of the kit's own. Raises UserError with the `remedy` where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {remedy}") from None


def read_table(path, remedy, **options):
    """Read a CSV of the kit's own, as `read_json`. Names and labels stay strings (`0001` isn't 1, `NA` isn't a gap)."""
    options = dict(dtype={"image_name": str, "label": str}, keep_default_na=False) | options
    try:
        return pd.read_csv(path, encoding="utf-8", **options)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then {remedy}") from None


def file_hash(path):
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def softmax(logits, block=1024):
    """Return probabilities from logits [N, K]; each row sums to 1. float64, or float32 above MANY classes (400 MB for
    100,000 images of 1,000 classes); computed in float64, a block of rows at a time."""
    probabilities = np.empty(np.shape(logits), np.float64 if np.shape(logits)[1] <= MANY else np.float32)
    for rows in (slice(start, start + block) for start in range(0, len(probabilities), block)):
        probabilities[rows] = special.softmax(np.asarray(logits[rows], np.float64), axis=1)
    return probabilities


def cpu_count():
    """Return how many cores this process may use: in a container or under Slurm fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Lines(tqdm):
    """A tqdm for logs: a line every half minute in place of a bar."""

    def display(self, msg=None, pos=None):
        if msg is None and self.n > 0:
            print(self, flush=True)


def progress(total, description, unit="img"):
    """Return a tqdm bar with a rate and the time left; off a terminal, one that prints a line every 30 s. It is silent
    without a description, and in all processes but the first."""
    terminal = sys.stdout.isatty()
    pace = {} if terminal else dict(mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, miniters=1, bar_format=LINE)
    silent = description is None or RANK > 0
    kind = tqdm if terminal else _Lines
    return kind(total=total, desc=description, unit=unit, disable=silent, leave=False, dynamic_ncols=terminal, **pace)


def wrapped(title, text):
    """Return the text behind its title, in lines of at most WIDTH characters."""
    return textwrap.fill(text, WIDTH, initial_indent=title, subsequent_indent=" " * len(title),
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def say(*words):
    """Print, flushed also into a pipe or a log file; under torchrun, in the first process alone."""
    if RANK == 0:
        print(*words, flush=True)


def conclude(text):
    """Print a script's last line, in bold."""
    say(styled(text, BOLD, sys.stdout))
