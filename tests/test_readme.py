"""README.md, README.ja.md and docs/*.md: short, equal in both languages, and true of the files, flags and recipes."""

import math
import re
from functools import cache
from itertools import chain

import pytest
import torch
from conftest import ROOT, load
from torch.utils.flop_counter import FlopCounterMode

from kit.score.metrics import METRICS
from kit.train.linear_probe import Views
from kit.train.model import build_model
from kit.train.optim import choose_trained
from kit.train.settings import settings

SCRIPTS = "00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py"
READMES = ROOT / "README.md", ROOT / "README.ja.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROSE = [*READMES, *(ROOT / "docs" / f"{name}.md" for name in "flags files trust thesis anywhere".split())]
LONGEST, LARGEST = 160, 300_000  # lines of README.md; bytes of its picture
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
# flags of other programs: run.sh's own, SIGNATE's command line, torchrun
FOREIGN = set("--parallel --task_key --file_key --path --standalone --nproc-per-node --nnodes --rdzv-backend "
    "--rdzv-endpoint --gpus --partition --time".split())  # fmt: skip

# the thesis' competition: training and test images, five folds
TRAIN, TEST, FOLDS = 2176, 2180, 5
STATES = {"ranger21": 4, "adamw": 2}  # tensors of a weight's size that the optimiser keeps


@cache
def parser(script):
    return load(script).make_parser()


def flags_of(*scripts):
    return {flag for script in scripts for flag in parser(script)._option_string_actions}


def blocks(text):
    """→ the code blocks, each a list of lines without comments."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return [[re.sub(r"\s+#.*", "", line) for line in block.splitlines()] for block in found]


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text):
    """→ what stands between backticks, outside of blocks."""
    return re.findall(r"`([^`]+)`", without_blocks(text))


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def tables(text):
    """→ the tables, each a list of rows, each a list of cells."""
    found = re.findall(r"(?:^\|.*\n?)+", without_blocks(text), re.M)
    rows = [[line for line in table.splitlines() if not re.fullmatch(r"[|\- ]+", line)] for table in found]
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table] for table in rows]


def table(path, column):
    """→ the rows below the header of the one table whose header names `column`."""
    (found,) = [rows[1:] for rows in tables(path.read_text()) if column in [cell.strip() for cell in rows[0]]]
    return [[cell.strip() for cell in row] for row in found]


def facts(cell):
    """→ what is the same in each language: code, numbers."""
    return spans(cell), sorted(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`]+`", "", cell)))


def test_readme_is_short():
    assert len(READMES[0].read_text().splitlines()) <= LONGEST
    assert (ROOT / "docs" / "report.png").stat().st_size < LARGEST


def test_both_languages_have_the_same_commands():
    english, japanese = (blocks(path.read_text()) for path in READMES)
    assert len(english) > 2
    assert english == japanese
    english, japanese = (sorted(spans(path.read_text())) for path in READMES)
    assert english == japanese


def test_both_languages_have_the_same_tables():
    english, japanese = (tables(path.read_text()) for path in READMES)
    assert [[len(row) for row in rows] for rows in english] == [[len(row) for row in rows] for rows in japanese]
    for row, other in zip(chain(*english), chain(*japanese), strict=True):
        assert [facts(cell) for cell in row] == [facts(cell) for cell in other]


def test_both_languages_have_the_same_sections_and_links():
    english, japanese = (without_blocks(path.read_text()) for path in READMES)
    assert re.findall("^#+ ", english, re.M) == re.findall("^#+ ", japanese, re.M)
    assert {*links(english)} - {"README.ja.md"} == {*links(japanese)} - {"README.md"}


@pytest.mark.parametrize("path", [*READMES, *DOCS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in links(path.read_text()):
        if not re.match(r"https?:", link):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", [*READMES, *DOCS], ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    text = path.read_text()
    for name in re.findall(r"(?<![\w/.])(?:kit|tests|recipes|notebooks|slurm|docs)/[\w/.-]+\.[a-z0-9]+", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?<![\w/-])0\d_\w+\.py", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"(?<![\w/-])[\w-]+\.args", text):
        assert (ROOT / "recipes" / name).exists(), name


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_flags_that_are_named_exist(path):
    named = set(FLAG.findall(path.read_text()))
    assert named <= flags_of(*SCRIPTS) | FOREIGN


def test_flags_by_purpose_are_of_the_script_that_is_named():
    for row in chain(*tables((ROOT / "docs" / "flags.md").read_text())):
        script = SCRIPTS[1]  # where no other is named
        for number, code in re.findall(r"\b0([0-3]):|`([^`]+)`", row[1]):
            script = SCRIPTS[int(number)] if number else script
            named = re.search("|".join(SCRIPTS), code)
            assert {*FLAG.findall(code)} <= flags_of(named[0] if named else script) | FOREIGN, code


def test_flags_of_competitions_are_understood():
    rows = [row for rows in tables((ROOT / "docs" / "competitions.md").read_text()) for row in rows[1:]]
    unable = sum("**no**" in note for _, _, note in rows)
    assert (len(rows) - unable, len(rows)) == (64, 83), "as its first lines say"
    for _, flags, _ in rows:
        parser(SCRIPTS[0]).parse_args(" ".join(spans(flags)).split())


def test_defaults_are_the_defaults():
    """Each flag in the table has the value that its script gives it; after "00:" it is a flag of 00_prepare.py."""
    rows = table(READMES[0], "default")
    assert len(rows) > 5
    for _, default, _ in rows:
        script = SCRIPTS[0 if default.startswith("00:") else 1]
        given = FLAG.split(code := spans(default)[0])[1:]
        for flag, value in zip(FLAG.findall(code), given, strict=True):
            key = flag.removeprefix("--").replace("-", "_")
            usual = parser(script).get_default(key)
            if usual is None:  # it follows --optimizer
                usual = settings(parser(script).parse_args([]), 777)[key]
            usual = usual[0] if isinstance(usual, list) else usual
            assert type(usual)(value.strip()) == usual, flag


def test_every_metric_is_explained():
    explained = [name for keys, _, _ in table(ROOT / "docs" / "flags.md", "`--metric`") for name in spans(keys)]
    assert sorted(explained) == sorted(METRICS)


def test_entries_are_where_the_table_says():
    rows = table(READMES[0], "edit")
    assert len(rows) > 5
    for _, where, entries in rows:
        files = [name for name in spans(where) if "." in name]
        code = "\n".join((ROOT / name).read_text() for name in files)
        for entry in spans(entries):
            assert re.search(rf"^{entry}(: [^=]+)? = ", code, re.M), entry
        for function in {*spans(where)} - {*files}:
            assert f"\ndef {function}(" in code, function


@cache
def forward_pass(model, size, head):
    """→ floating-point operations of an image's way through a model."""
    with torch.device("meta"):
        config = dict(model=model, model_kwargs={}, head=head, size=size, norm="thesis")
        network = build_model(config, 2, "none").eval()
        with FlopCounterMode(display=False) as counter:
            network.head(network.features(torch.empty(1, 3, size, size)))
    return counter.get_total_flops()


def needs(name):
    """What a recipe needs for the thesis' competition, by arithmetic: millions of parameters; GB of weights, gradients,
    optimiser and average on the GPU; GB of disk: [cache, folds' files, resume file]; operations."""
    args = parser(SCRIPTS[1]).parse_args(["--fold", "0", f"@{ROOT / 'recipes' / name}"])
    config = settings(args, 777)
    with torch.device("meta"):
        network = build_model(config, 2, "none")
    probe, averaged = config["tune"] == "probe", config["ema"] > 0
    choose_trained(network, "head" if probe else config["tune"], config["freeze"])
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    weights, learning = sum(n for n, _ in sizes), 0 if probe else sum(n for n, learns in sizes if learns)
    states = STATES[config["optimizer"]] * learning
    cached = (TRAIN + TEST) * config["size"] ** 2 * 3
    resume = [] if probe else [4 * (weights * (2 + averaged) + states)]  # the weights, those kept, their average

    once, views = forward_pass(config["model"], config["size"], config["head"]), Views(network, config["tta"]).count
    held_out = TRAIN / FOLDS
    step = 1 + 2 * (1 - config["freeze"])  # backward twice the forward pass, through the layers that learn
    work = FOLDS * (config["epochs"] * ((TRAIN - held_out) * step + held_out) + (held_out + TEST) * views)
    features = (TRAIN + TEST) * views
    work = features if probe else work + features * (config["init"] == "probe")
    disk = [cached, FOLDS * 4 * weights, *resume]
    return weights / 1e6, 4 * (weights * (1 + averaged) + learning + states) / 1e9, [n / 1e9 for n in disk], work * once


@pytest.mark.slow
def test_what_a_recipe_needs():
    rows = table(READMES[0], "recipe")
    assert {name for row in rows for name in spans(row[0]) if name.endswith(".args")} == {
        path.name for path in (ROOT / "recipes").glob("*.args")
    }
    *_, thesis = needs("thesis.args")
    for recipes, parameters, memory, disk, minutes, _ in rows:
        for name in [code for code in spans(recipes) if code.endswith(".args")] or ["thesis.args"]:
            found, on_gpu, on_disk, work = needs(name)
            assert parameters == f"{found:.1f}", name
            assert memory.split(";")[0] == (f"{on_gpu:.1f}" if name != "cpu.args" else "none"), name
            assert disk == " + ".join(f"{n:.1f}" for n in on_disk), name
            if minutes.startswith("×"):
                assert math.isclose(float(minutes.removeprefix("× ")), work / thesis, abs_tol=0.0051), name
