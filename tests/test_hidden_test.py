"""03_infer.py --test-images: hidden test sets, predicted from the folds' files alone."""

import contextlib
import json
import os
import re
import shutil
import time
import weakref
import zipfile
from types import SimpleNamespace

from common import UserError, softmax

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, done, kit, png, refused, write_csv, write_zip
from test_tasks import METRIC, PREPARE, TRAIN, draw, flags_of, noisy, submitted

from kit.submit import hidden_test, test_set
from kit.train import checkpoint, device, inference

INFER = "03_infer.py"
FLIPS = [*TINY, *"--epochs 2 --lr 1e-2 --augment flip".split()]  # two views
OTHER = [*FLIPS, "--seed", "5", "--tta", "none"]
TESTS = 8


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave an experiment's pictures out, which take longer than its training here."""
    monkeypatch.setattr("kit.report.pictures.draw_classes", lambda *_: None)


def patients(folder):
    """Give the test images of a competition three ids, the last one with one image, in a table of test images."""
    names = [f"t{i}.png" for i in range(TESTS)]
    ids = ["p2"] * 3 + ["p0"] * 4 + ["p1"]
    write_csv(folder / "test.csv", [("image_name", "patient"), *zip(names, ids, strict=True)])
    write_csv(folder / "sample_submit.csv", [("patient", "label"), *((name, 0.5) for name in ("p1", "p0", "p2"))])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Return a function: kind → a competition with two trained experiments, `base` and `other`, and their submissions,
    for reading only. "patients" has several test images for one id."""
    made = {}

    def world(kind):
        if kind not in made:
            folder, drawn = tmp_path_factory.mktemp(kind), "binary" if kind == "patients" else kind
            draw(folder / "input", drawn, test=TESTS)
            flags, more = flags_of(folder), []
            if kind == "patients":
                patients(folder / "input")
                more = ["--test-csv", "test.csv", "--per-id", "max"]
            done("00_prepare.py", *flags, *PREPARE, "--metric", METRIC[drawn], *more)
            done(TRAIN, *flags, *FLIPS, "--fold", "all")
            done(INFER, *flags)
            if kind in ("binary", "sets"):
                done(TRAIN, *flags, *OTHER, "--fold", "all", "--exp", "other")
            made[kind] = SimpleNamespace(input=folder / "input", output=folder / "output", flags=flags)
        return made[kind]

    return world


@pytest.fixture
def bare(worlds, tmp_path):
    """Return a function: kind → an output folder with copies of the folds' files alone, and the flags of hidden test
    images. more: endings of other files that are copied."""

    def copy(kind, more=(), exps=("base",)):
        world, output = worlds(kind), tmp_path / "bare"
        for exp in exps:
            (output / exp).mkdir(parents=True)
            for path in sorted((world.output / exp).glob("fold?.*")):
                if path.suffix in (".pt", *more):
                    shutil.copy(path, output / exp / path.name)
        flags = ["--test-images", world.input / "test.zip", "--sample-submit", world.input / "sample_submit.csv"]
        if kind == "patients":
            flags += ["--test-csv", world.input / "test.csv"]
        flags += ["--input", tmp_path / "nothing", "--output", output]
        return SimpleNamespace(world=world, output=output, flags=flags)

    return copy


def rows_of(path, header=0):
    return pd.read_csv(path, dtype=str, keep_default_na=False, header=header).to_numpy()


def assert_same_rows(path, expected):
    """Assert that a submission has the rows of another one, up to the rounding of another batch."""
    assert path.read_text().splitlines()[0] == expected.read_text().splitlines()[0]
    rows, expected_rows = rows_of(path), rows_of(expected)
    assert rows[:, 0].tolist() == expected_rows[:, 0].tolist()
    try:
        assert rows[:, 1:].astype(float) == pytest.approx(expected_rows[:, 1:].astype(float), abs=1e-5)
    except ValueError:
        assert rows.tolist() == expected_rows.tolist()


def views_of(world, tta, folds=(0, 1), exp="base"):
    """Return probabilities [N, K] of the prepared test images, in the sample's order, the mean over the folds."""
    images = np.load(world.output / "prepared" / "test_32.npy")
    each = []
    for fold in folds:
        _, classifier = checkpoint.load_fold(world.output / exp / f"fold{fold}.pt", torch.device("cpu"))
        network = inference.TTAS[tta](classifier)
        each.append(softmax(inference.predict(network, images, np.arange(len(images)), 8, torch.device("cpu"))))
    return np.mean(each, axis=0)


def second(path):
    return rows_of(path)[:, 1].astype(float)


# ---------------------------------------------------------------- the same cells


@pytest.mark.parametrize("kind", ["binary", "classes", "numbers", "labels", "sets", "patients"])
def test_the_fold_files_alone_remake_the_submission(kind, bare):
    case = bare(kind, [".csv"] if kind == "sets" else [])
    out = done(INFER, *case.flags)
    (path,) = case.output.glob("*.csv")
    assert path.name == "submission_base.csv"
    assert out.splitlines()[-1] == f"{len(rows_of(path))} rows, checked → {path}"
    assert_same_rows(path, submitted(case.world.output / "base")[0])
    assert "within" not in out
    assert not (case.output / "prepared").exists()


@pytest.mark.parametrize(("more", "expected"), [([".json"], "bf16"), ([], "none")])
def test_the_precision_is_that_of_training_where_that_is_known(more, expected, bare, monkeypatch):
    case, seen, plain = bare("binary", more), set(), device.autocast
    for path in (case.output / "base").glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | dict(run=content["run"] | dict(amp="bf16"))))
    monkeypatch.setattr(inference, "autocast", lambda device, amp: seen.add(amp) or plain(device, amp))
    done(INFER, *case.flags)
    assert seen == {expected}


def test_sets_need_the_held_out_predictions_for_their_thresholds(bare, monkeypatch):
    case = bare("sets")
    monkeypatch.setattr(hidden_test, "read_image", lambda *_: pytest.fail("an image was read first"))
    line = refused(INFER, *case.flags)
    assert "fold0.csv is missing: copy it there beside foldK.pt" in line
    assert not [*case.output.glob("*.csv")]


def test_thresholds_are_fitted_on_the_blend_of_the_same_images(bare):
    case = bare("sets", [".csv"], ("base", "other"))
    done(INFER, *case.world.flags, "base", "other")
    expected, _ = submitted(case.world.output)
    done(INFER, *case.flags, "base", "other")
    assert_same_rows(case.output / "submission_base+other.csv", expected)
    other = case.output / "other" / "fold0.csv"
    table = pd.read_csv(other, dtype=str, keep_default_na=False)
    table.iloc[::-1].to_csv(other, index=False)
    assert "other/fold0.csv holds other images than base's: leave one" in refused(INFER, *case.flags, "base", "other")
    for name in ("base/fold0.pt", "other/fold1.pt"):
        (case.output / name).unlink()
    assert "no fold is present in all experiments" in refused(INFER, *case.flags, "base", "other")


def test_a_folder_holds_what_the_archive_holds(bare, tmp_path):
    case = bare("classes")
    with zipfile.ZipFile(case.world.input / "test.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    done(INFER, *case.flags)
    case.flags[1] = tmp_path / "unpacked" / "test"
    done(INFER, *case.flags, "--name", tmp_path / "of_folder.csv")
    assert (tmp_path / "of_folder.csv").read_bytes() == (case.output / "submission_base.csv").read_bytes()


def test_more_images_than_were_prepared_in_other_order(bare, tmp_path):
    """As in a code competition, whose hidden test set is larger."""
    case, rng = bare("binary"), np.random.default_rng(2)
    with zipfile.ZipFile(case.world.input / "test.zip") as archive:
        earlier = {name: archive.read(name) for name in archive.namelist()}
    more = {f"test/new{i}.png": png(noisy(rng, rng.random(3))) for i in range(5)}
    write_zip(tmp_path / "hidden.zip", earlier | more)
    names = [name.removeprefix("test/") for name in sorted(earlier | more)]
    write_csv(tmp_path / "hidden.csv", [("image_name", "label"), *((name, 0.5) for name in names)])
    case.flags[1:4:2] = tmp_path / "hidden.zip", tmp_path / "hidden.csv"
    done(INFER, *case.flags)
    rows = rows_of(case.output / "submission_base.csv")
    assert rows[:, 0].tolist() == names
    ordinary = dict(rows_of(submitted(case.world.output / "base")[0]).tolist())
    assert len(ordinary) == TESTS
    for name, cell in rows:
        assert name.startswith("new") or float(cell) == pytest.approx(float(ordinary[name]), abs=1e-5)


# ---------------------------------------------------------------- images that can't be had


def test_unreadable_and_missing_images_become_grey_with_a_warning(bare, tmp_path):
    case = bare("binary")
    with zipfile.ZipFile(case.world.input / "test.zip") as archive:
        archive.extractall(tmp_path / "test")
    folder = tmp_path / "test" / "test"
    (folder / "t2.png").write_bytes(b"no image")
    (folder / "t5.png").unlink()
    case.flags[1] = folder
    result = kit(INFER, *case.flags)
    assert result.code == 0, result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("03_infer.py: warning: ")]
    assert len(warnings) == 2
    assert re.search(r"1 images of \S+ are missing: t5.png; they are predicted as grey", warnings[0])
    assert re.search(r"1 images can't be read: t2.png \(.+\); what they lack is predicted as grey", warnings[1])
    cells = dict(rows_of(case.output / "submission_base.csv").tolist())
    ordinary = dict(rows_of(submitted(case.world.output / "base")[0]).tolist())
    assert cells.keys() == ordinary.keys()
    assert cells["t2.png"] == cells["t5.png"], "both are grey"
    grey = np.full((1, 32, 32, 3), 128, np.uint8)
    each = [checkpoint.load_fold(case.output / "base" / f"fold{k}.pt", torch.device("cpu"))[1] for k in range(2)]
    each = [inference.predict(inference.TTAS["flip"](one), grey, np.arange(1), 1, torch.device("cpu")) for one in each]
    assert float(cells["t2.png"]) == pytest.approx(np.mean([softmax(one) for one in each], axis=0)[0, 1], abs=1e-5)
    for name in cells.keys() - {"t2.png", "t5.png"}:
        assert float(cells[name]) == pytest.approx(float(ordinary[name]), abs=1e-5)


# ---------------------------------------------------------------- blends


def test_two_experiments_are_blended_with_weights(bare):
    case = bare("binary", exps=("base", "other"))
    for weights in ([], ["--weights", 0.8, 0.2], ["--blend", "rank"]):
        done(INFER, *case.world.flags, "base", "other", *weights)
        expected, _ = submitted(case.world.output)
        name = re.sub(r"_CV.*", ".csv", expected.name)
        done(INFER, *case.flags, "base", "other", *weights)
        assert_same_rows(case.output / name, expected)
        expected.unlink()
    cells = [second(case.output / f"submission_base+other{more}.csv") for more in ("", "_0.8_0.2", "_rank")]
    assert np.abs(cells[0] - cells[1]).max() > 1e-4
    assert np.abs(cells[0] - cells[2]).max() > 1e-4
    for weights in ([1], [0, 0], [case.output / "blend.json"]):
        line = refused(INFER, *case.flags, "base", "other", "--weights", *weights)
        assert "--weights needs a number for each of base, other, not all of them 0, and no file" in line


# ---------------------------------------------------------------- --within


@pytest.fixture
def clock(worlds, monkeypatch):
    """Put in a clock that only predictions move, by a second for each image, fold and view; two images are a chunk.
    start_up: what a model's first prediction takes besides; slow: for how many times as long the first chunk's take,
    after those that aren't timed."""
    worlds("binary")  # by the usual clock
    state, plain, calls = SimpleNamespace(now=0.0, start_up=0.0, slow=1), inference.predict, []

    def predict(model, images, *more, **options):
        seconds = len(images) * len(getattr(model, "transforms", None) or [0])
        state.now += seconds * (state.slow if 2 <= len(calls) < 4 else 1) + state.start_up * (len(calls) < 2)
        calls.append(model)
        return plain(model, images, *more, **options)

    monkeypatch.setattr(test_set, "predict", predict)
    monkeypatch.setattr(hidden_test, "time", SimpleNamespace(monotonic=lambda: state.now))
    monkeypatch.setattr(hidden_test, "STARTED", 0.0)
    monkeypatch.setattr(hidden_test, "CHUNK", 2)
    monkeypatch.setattr(hidden_test, "TIMED", 2)
    return state


VIEWS_AND_FOLDS = {"one view and one fold": ("none", 1), "one view and all folds": ("none", 2)}


@pytest.mark.parametrize(
    ("within", "start_up", "slow", "left_out", "given_back", "seconds"),
    [  # 8 images in 2 folds of 2 views are 32 s, and two of them 8 s, which are predicted twice, the first time untimed
        ("43s", 0, 1, "", "", 40),  # 24 s of the 27 that are left, of which 0.9 may be taken
        ("34s", 0, 1, "one view and all folds", "", 32),  # 16 s, for all eight, of 16.2
        ("33s", 0, 1, "one view and one fold", "", 24),  # 16 s don't fit into 15.3, 8 do
        ("25s", 0, 1, "one view and one fold", "", 24),  # 8 s of 8.1
        ("1s", 0, 1, "one view and one fold", "", 24),  # too short in any case: at least one view of one fold
        ("63s", 10, 1, "", "", 60),  # a start of 10 s for each model isn't taken for the pace
        # the first chunk took 40 s of 8, and one view of one fold seems to take 40; after 2 s for a quarter it doesn't
        ("100s", 0, 5, "one view and one fold", "all views and all folds", 82),  # 32 s of 45
        ("85s", 0, 5, "one view and one fold", "one view and all folds", 66),  # 16 s of 31.5
        ("60s", 0, 5, "one view and one fold", "", 56),  # 16 s don't fit into 9
    ],
)
def test_all_images_get_the_views_and_folds_that_there_is_time_for(
    within, start_up, slow, left_out, given_back, seconds, bare, clock
):
    case, clock.start_up, clock.slow = bare("binary"), start_up, slow
    out = done(INFER, *case.flags, "--within", within, "--batch-size", 2)
    assert re.findall(r"--within is too short for all: (.*)", out) == [left_out] * bool(left_out)
    assert re.findall(r"--within leaves time for (.*)", out) == [given_back] * bool(given_back)
    assert clock.now == seconds
    views, folds = VIEWS_AND_FOLDS.get(given_back or left_out, ("flip", 2))
    expected = views_of(case.world, views, range(folds))[:, 1]
    assert second(case.output / "submission_base.csv") == pytest.approx(expected, abs=1e-5)
    assert np.abs(views_of(case.world, "flip") - views_of(case.world, "none")).max() > 1e-4, "views of one image differ"


def test_without_within_nothing_is_predicted_twice(bare, clock):
    case = bare("binary")
    done(INFER, *case.flags, "--batch-size", 2)
    assert clock.now == 32


def test_a_plan_counts_all_experiments_and_what_decoding_takes(capsys, monkeypatch):
    def ensemble(folds, tta):
        rest = dict.fromkeys(["exp", "folder", "folds", "amp", "task", "metric", "form", "per_id", "reading"])
        return hidden_test.Ensemble(models=[None] * folds, config=dict(tta=tta), **rest)

    monkeypatch.setattr(hidden_test, "TTAS", dict(d4=lambda _: SimpleNamespace(transforms=range(8)), none=lambda m: m))
    first, other = ensembles = [ensemble(5, "d4"), ensemble(2, "none")]
    assert [first.plan(None, level) for level in range(6)] == [
        ("d4", 5), ("none", 5), ("none", 4), ("none", 3), ("none", 2), ("none", 1)]  # fmt: skip
    assert [other.plan(None, level)[1] for level in range(6)] == [2, 2, 1, 1, 1, 1]
    assert first.plan("none", 0) == ("none", 5)
    assert [sum(e.passes(None, level) for e in ensembles) for level in range(6)] == [42, 7, 5, 4, 3, 2]

    def choose(level, most, left):
        return hidden_test.choose_level(ensembles, None, level, most, (110, 10), (2.0, 0.1), left)

    for level, passes in enumerate((42, 7, 5, 4, 3, 2)):  # 2 s to decode an image, 0.1 s a pass
        needed = (100 if level == 0 else 110) * (2 + 0.1 * passes)
        assert choose(0, 5, needed / 0.9 + 0.01) == level
        assert choose(0, 5, needed / 0.9 - 0.01) == min(level + 1, 5)
        given_back = (110 if level < 3 else 100) * (2 + 0.1 * passes)
        if level < 3:
            assert choose(3, 3, given_back / 0.9 + 0.01) == level
    assert choose(3, 3, 1) == 3, "the second look leaves nothing out"
    printed = capsys.readouterr().out
    assert "--within is too short for all: one view and 3 folds\n" in printed
    assert "--within leaves time for one view and 4 folds\n" in printed


# ---------------------------------------------------------------- memory, threads


def test_images_are_decoded_a_chunk_at_a_time(bare, monkeypatch):
    case = bare("binary", exps=("base", "other"))
    decode, predict_chunk, read_image = hidden_test.decode_or_grey, hidden_test.predict_chunk, hidden_test.read_image
    chunks, alive, most = [], [0], [0]
    state = dict(reading=False)

    def count_image(*given):
        if not state["reading"]:
            chunks.append(0)
        state["reading"] = True
        chunks[-1] += 1
        return read_image(*given)

    def check_chunk(ensembles, images, *given):
        state["reading"] = False
        assert len(images[32]) == chunks[-1]
        return predict_chunk(ensembles, images, *given)

    def count_alive(*given):
        image, reason = decode(*given)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(image, lambda: alive.__setitem__(0, alive[0] - 1))
        return image, reason

    monkeypatch.setattr(hidden_test, "read_image", count_image)
    monkeypatch.setattr(hidden_test, "predict_chunk", check_chunk)
    monkeypatch.setattr(hidden_test, "decode_or_grey", count_alive)
    one_thread = SimpleNamespace(map=map, shutdown=lambda **_: None)
    monkeypatch.setattr(hidden_test, "ThreadPoolExecutor", lambda _: one_thread)
    monkeypatch.setattr(hidden_test, "CHUNK", 3)
    monkeypatch.setattr(hidden_test, "TIMED", 2)
    done(INFER, *case.flags, "base", "other", "--batch-size", 2)
    assert chunks == [2, 3, 3], "each image once, for both experiments"
    assert most[0] <= 2, "whole images don't wait for the others of their chunk"
    whole = (views_of(case.world, "flip") + views_of(case.world, "none", exp="other"))[:, 1] / 2
    assert second(case.output / "submission_base+other.csv") == pytest.approx(whole, abs=1e-5)


@pytest.fixture
def reading(monkeypatch):
    """Count the images that are read; chunks are of two images. → the names."""
    names, plain = [], hidden_test.read_image
    monkeypatch.setattr(hidden_test, "read_image", lambda s, name, sizes: names.append(name) or plain(s, name, sizes))
    monkeypatch.setattr(hidden_test, "CHUNK", 2)
    monkeypatch.setattr(hidden_test, "TIMED", 2)
    return names


def test_the_next_chunk_is_decoded_while_a_chunk_is_predicted(bare, reading, monkeypatch):
    case, plain, seen = bare("binary"), hidden_test.predict_chunk, []

    def predict_chunk(*given):
        wanted, deadline = min(TESTS, 2 * len(seen) + 4), time.monotonic() + 10
        while len(reading) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(len(reading))
        return plain(*given)

    monkeypatch.setattr(hidden_test, "predict_chunk", predict_chunk)
    done(INFER, *case.flags, "--batch-size", 2)
    assert seen == [4, 6, 8, 8], "the next chunk, and no more"


def test_ctrl_c_leaves_the_next_chunk_undecoded(bare, reading, monkeypatch):
    case, read_image = bare("binary"), hidden_test.read_image

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hidden_test, "CHUNK", 100)
    monkeypatch.setattr(hidden_test, "cpu_count", lambda: 1)
    monkeypatch.setattr(hidden_test, "read_image", lambda *given: time.sleep(0.05) or read_image(*given))
    monkeypatch.setattr(hidden_test, "predict_chunk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kit(INFER, *case.flags, "--batch-size", 2)
    assert len(reading) <= 4, "two of the first chunk, and what was at work"


def test_an_error_while_the_next_chunk_is_decoded_is_one_line(bare, reading, monkeypatch):
    case, read_image = bare("binary"), hidden_test.read_image

    def fails(source, name, sizes):
        if len(reading) >= 2:
            raise UserError("the disk is gone")
        return read_image(source, name, sizes)

    monkeypatch.setattr(hidden_test, "read_image", fails)
    assert "the disk is gone" in refused(INFER, *case.flags, "--batch-size", 2)
    assert not [*case.output.glob("*.csv")]


def test_only_the_model_that_computes_is_on_the_device(bare, monkeypatch):
    """Before and after, its weights are those in memory: nothing is copied back. A type stands for a GPU here."""
    case, moved = bare("binary"), []
    model = torch.nn.Linear(3, 2)
    before = [(weights.data_ptr(), weights.clone()) for weights in model.parameters()]
    with hidden_test.on_device(model, torch.float64):
        assert {weights.dtype for weights in model.parameters()} == {torch.float64}
    for weights, (place, values) in zip(model.parameters(), before, strict=True):
        assert weights.data_ptr() == place
        assert torch.equal(weights, values)

    @contextlib.contextmanager
    def on_device(model, device):
        moved.append(f"+{device}")
        yield
        moved.append("-")

    plain = test_set.predict
    monkeypatch.setattr(hidden_test, "on_device", on_device)
    monkeypatch.setattr(test_set, "predict", lambda *a: moved.append("predict") or plain(*a))
    done(INFER, *case.flags)
    assert moved == ["+cpu", "predict", "-"] * 2


# ---------------------------------------------------------------- what is written, what is refused


def test_the_submission_gets_its_name_when_it_is_complete(bare, tmp_path, monkeypatch):
    case, path = bare("binary"), tmp_path / "made" / "submission.csv"
    done(INFER, *case.flags, "--name", path)
    assert_same_rows(path, submitted(case.world.output / "base")[0])
    assert not [*case.output.glob("*.csv")]
    before = path.read_bytes()
    path.write_bytes(b"an earlier one")

    def fails(*_):
        assert path.read_bytes() == b"an earlier one"
        raise AssertionError("a fault of the kit")

    with monkeypatch.context() as patch:
        patch.setattr("kit.submit.submission.check_submission", fails)
        with pytest.raises(AssertionError, match="a fault of the kit"):
            kit(INFER, *case.flags, "--name", path)
    assert path.read_bytes() == b"an earlier one"
    assert os.listdir(path.parent) == [path.name]
    done(INFER, *case.flags, "--name", path)
    assert path.read_bytes() == before


def test_flags_that_need_each_other(bare):
    case = bare("binary")
    images, sample, rest = case.flags[:2], case.flags[2:4], case.flags[4:]
    assert "--test-images needs the --sample-submit that lists them" in refused(INFER, *images, *rest)
    assert "--sample-submit belongs to --test-images" in refused(INFER, *sample, *rest)
    assert "--test-csv belongs to --test-images" in refused(INFER, "--test-csv", "test.csv", *rest)
    assert "--within belongs to --test-images" in refused(INFER, "--within", "8h", *rest)


@pytest.mark.parametrize(("kind", "old", "new"), [
    ("binary", "image_name,label", "image_name,score"),
    ("numbers", "image_name,a,b,c", "image_name,a,c,b"),
    ("classes", "image_name,label\n", ""),
])  # fmt: skip
def test_another_header_is_refused(kind, old, new, bare, tmp_path):
    case = bare(kind)
    text = case.flags[3].read_text()
    assert old in text
    case.flags[3] = tmp_path / "sample.csv"
    case.flags[3].write_text(text.replace(old, new))
    assert f"{case.flags[3]} has another header or other columns than the sample" in refused(INFER, *case.flags)


def test_folds_that_are_missing_or_differ_are_refused(bare, worlds):
    case = bare("binary", exps=("base", "other"))
    assert "lost has no foldK.pt: copy the folds' files there" in refused(INFER, *case.flags, "lost")
    shutil.copy(case.output / "other" / "fold1.pt", case.output / "base" / "fold1.pt")
    line = refused(INFER, *case.flags)
    assert "base/fold1.pt has other settings or classes than fold 0: remove one" in line
    (case.output / "base" / "fold1.pt").write_bytes(b"damaged")
    assert "base/fold1.pt is damaged or not the kit's" in refused(INFER, *case.flags)
    (case.output / "base" / "fold1.pt").unlink()
    done(INFER, *case.flags)
    assert second(case.output / "submission_base.csv") == pytest.approx(
        views_of(case.world, "flip", [0])[:, 1], abs=1e-5
    )
    shutil.copy(worlds("numbers").output / "base" / "fold0.pt", case.output / "base" / "fold0.pt")
    line = refused(INFER, *case.flags, "other", "base")
    assert "base was prepared otherwise than other: they can't be blended" in line


def test_a_sample_of_other_images_is_refused(bare, tmp_path):
    case = bare("binary")
    case.flags[3] = tmp_path / "sample.csv"
    write_csv(case.flags[3], [("image_name", "label"), ("a.png", 0.5), ("b.png", 0.5)])
    assert f"{case.flags[3]} names no image of {case.flags[1]}" in refused(INFER, *case.flags)
