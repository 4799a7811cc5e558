"""--help with one line a flag; colours on a terminal; imports that flags needn't wait for."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, done, load, prepare, refused

from kit.submit import handover

SCRIPTS = ["00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py"]
ENTRY = re.compile(r"  (?:-h, )?(--[\w-]+|EXP)(?: \S+)*?(?:  +(\S.*))?")


def parser_of(script):
    return handover.make_parser() if script == "kit.submit.handover" else load(script).make_parser()


@pytest.mark.parametrize("script", [*SCRIPTS, "kit.submit.handover"])
def test_help_has_a_line_for_each_flag(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    parser = parser_of(script)
    text = parser.format_help()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 75, "a screen and a half"
    assert not re.search(r"None|False|True|\[\]", text)
    assert "listing" not in text
    shown = [match for line in lines if (match := ENTRY.fullmatch(line)) and not line.startswith("    ")]
    flags = [action.option_strings[-1] if action.option_strings else "EXP" for action in parser._actions]
    assert [match[1] for match in shown] == flags, "each has one line"
    starts = {match.start(2) for match in shown}
    assert len(starts) == 1, "aligned, and no text has a line of its own"
    assert min(starts) > 0
    indented = [line for line in lines if re.match(" {12}", line) and "--metric" not in line]
    assert all(re.fullmatch(r"[\w\s,-]+", line) for line in indented), "no text goes on in the next line"
    for match, action in zip(shown, parser._actions, strict=True):
        assert match[2].count("default") <= 1, match[0]
        assert not re.search(r"thesis \d", match[2]), match[0]
        default = action.default[0] if isinstance(action.default, list) and action.default else action.default
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert match[2].endswith(f"(default: {default})")


def test_input_and_output_are_among_the_first_flags():
    for script in SCRIPTS:
        flags = [action.dest for action in parser_of(script)._actions]
        assert flags.index("output") <= 8, script


def test_the_help_of_a_narrow_terminal_is_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    flags = parser_of("01_train_fold.py").format_help().split("what to run")[1]
    assert max(map(len, flags.splitlines()[:-1])) <= 80


# ---------------------------------------------------------------- colours


def on_terminal(*command, **environment):
    """Run a script on a pseudo-terminal. → (exit code, all that it printed)."""
    main, other = pty.openpty()
    environ = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdin=other, stdout=other, stderr=other,
        env=environ | {"TERM": "xterm"} | environment,
    )  # fmt: skip
    os.close(other)
    printed = b""
    try:
        while part := os.read(main, 4096):
            printed += part
    except OSError:  # Linux raises it where the other end is closed
        pass
    os.close(main)
    return process.wait(), printed.decode().replace("\r\n", "\n")


def test_on_a_terminal_the_last_line_is_bold_and_an_error_red(toy):
    flags = ["00_prepare.py", *toy(), "--size", 32, "--groups", "none"]
    code, printed = on_terminal(*flags)
    assert code == 0
    assert re.fullmatch(r"\033\[1mprepared 32 px → .+: look at samples.png\033\[0m", printed.splitlines()[-1])
    assert len(re.findall(r"\033\[1m", printed)) == 1, "nothing else is"
    code, printed = on_terminal("02_oof.py", *flags[1:5])
    assert code == 2
    assert re.fullmatch(r"\033\[31m02_oof.py: error:\033\[0m .+ has no finished fold: .+\n", printed)


@pytest.mark.parametrize("environment", [dict(NO_COLOR="1"), dict(TERM="dumb")])
def test_no_color_and_a_dumb_terminal_have_no_colours(toy, environment):
    flags = toy()
    prepare(flags)
    code, printed = on_terminal("00_prepare.py", *flags, "--size", 32, "--groups", "none", **environment)
    assert code == 0
    assert "Nothing to do" in printed
    assert "\033[1m" not in printed
    assert "\033" not in on_terminal("02_oof.py", *flags, **environment)[1]


def test_a_warning_is_yellow(toy):
    flags = toy()
    prepare(flags)
    code = "import common; common.warn('careful'); common.conclude('done')"
    assert on_terminal("-c", code)[1] == "\033[33m-c: warning:\033[0m careful\n\033[1mdone\033[0m\n"
    assert on_terminal("-c", code, NO_COLOR="")[1] == "-c: warning: careful\ndone\n"


@pytest.mark.slow
def test_a_pipe_gets_no_escape_codes(toy):
    flags = toy()
    assert "\033" not in prepare(flags)
    assert "\033" not in refused("02_oof.py", *flags)
    command = [sys.executable, "01_train_fold.py", *map(str, flags), *TINY, "--fold", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\033" not in result.stdout + result.stderr
    assert re.match(r"fold 0 of base: kept epoch \d, valid AUC \d\.\d{4} → ", result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_scripts_import_no_scikit_learn_before_they_need_it():
    """scikit-learn and scipy.stats take a quarter of the imports of 01 and 03."""
    code = "import runpy, sys; [runpy.run_path(name) for name in sys.argv[1:]]; print(*sys.modules)"
    command = [sys.executable, "-c", code, "01_train_fold.py", "03_infer.py"]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {"timm", "albumentations"} <= {*modules}
    assert not {"sklearn", "scipy.stats", "matplotlib.pyplot", "kit.report.page"} & {*modules}


def test_garbage_is_collected_as_usual_while_a_script_works(tmp_path):
    usual = "print(gc.isenabled(), gc.get_threshold() == common.GARBAGE < (10**5,))"
    (tmp_path / "own.py").write_text(f"import common\nimport gc\n\ncommon.run(lambda words: {usual})\n")
    assert done(tmp_path / "own.py") == "True True\n"
