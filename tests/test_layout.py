"""Layout: the order in which the kit's folders import one another, the sizes of its files, the field's words in their
names and first lines (docs/architecture.md)."""

import ast

import pytest
from conftest import ROOT

# A part imports only what stands to its left; within a folder there is no circle.
ORDER = [
    {"common"}, {"kit.locks"}, {"kit.score"}, {"kit.data"}, {"kit.experiment"}, {"kit.folds"}, {"kit.train"},
    {"kit.report", "kit.pipeline"}, {"kit.submit"}, {"kit.competition"},
    {"00_prepare", "01_train_fold", "02_oof", "03_infer"},
]  # fmt: skip
WORDS = (
    "dataset|dataloader|augmentation|sampler|loss|optimizer|scheduler|ema|checkpoint|resume|config|amp|ddp|model|head|"
    "tta|inference|metric|threshold|bootstrap|blend|folds|duplicates|adversarial validation|leaderboard|submission|"
    "report|gradcam|label errors|probe"
).split("|")
PARTS = sorted((ROOT / "kit").rglob("*.py"))
PRODUCT = [*sorted(ROOT.glob("*.py")), *PARTS]


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room(name):
    """Return the folder of a module of kit, or the module itself where it is in none."""
    return ".".join(name.split(".")[:2])


def imported(path):
    """Return the kit's modules that a file imports, anywhere in it."""
    found, known = set(), {module(other) for other in PRODUCT}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        found |= known & {*names}
    return found


def step(name):
    return next(k for k, rooms in enumerate(ORDER) if room(name) in rooms)


@pytest.mark.parametrize("path", PRODUCT, ids=module)
def test_a_part_imports_only_what_stands_to_its_left(path):
    for other in imported(path):
        same = room(module(path)) == room(other) and room(other).count(".")
        assert same or step(other) < step(module(path)), f"{module(path)} imports {other}"


def test_no_circle_of_imports():
    left, done = {module(path): imported(path) for path in PRODUCT}, set()
    while ready := {name for name, needs in left.items() if needs <= done}:
        done |= ready
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left, "these import one another in a circle"


def test_sizes_of_files_and_folders():
    lines = {module(path): len(path.read_text().splitlines()) for path in PRODUCT}
    assert len(PARTS) <= 49
    assert len([path for path in PARTS if path.parent == ROOT / "kit"]) <= 4
    for folder in {path.parent for path in PARTS}:
        assert len([path for path in PARTS if path.parent == folder]) <= 16, folder
    assert {name: count for name, count in lines.items() if not 60 <= count <= 400} == {}
    assert sum(lines.values()) <= 10660
    assert {path.name for path in ROOT.glob("*.py")} == {
        "common.py", "00_prepare.py", "01_train_fold.py", "02_oof.py", "03_infer.py",
    }  # fmt: skip


def test_files_open_with_what_they_hold():
    """At least 24 of thirty words of the field are in a file's name or first line; no first line is a question."""
    first = {path: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in PRODUCT}
    assert [module(path) for path, line in first.items() if not line or "?" in line] == []
    text = " ".join(f"{path.stem.replace('_', ' ')} {line}" for path, line in first.items()).lower()
    missing = [word for word in WORDS if word not in text]
    assert len(WORDS) - len(missing) >= 24, f"not found: {missing}"


def test_only_main_and_make_parser_know_args():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                assert "args" not in [arg.arg for arg in node.args.args], f"{module(path)}: {node.name}"


def test_only_tasks_asks_which_task_it_is():
    """Elsewhere the task's name stands only in registries whose entries say which tasks they suit."""
    for path in PARTS:
        if module(path) in ("kit.score.tasks", "kit.score.metrics"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            keys = {name.value for name in names if isinstance(name, ast.Constant)}
            assert not keys & {"classes", "labels", "numbers"}, f"{module(path)}:{node.lineno}"
