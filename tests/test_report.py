"""report.html in Chromium, driven over WebDriver: content, colours, escaping, no console error; the ledger."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, done, png, refused, toy_image, write_csv, write_zip
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score
from test_oof import FORECAST, experiment, last_line, noisy, read_ledger, with_candidates

from kit.report import figures

HOSTILE = "\"><img src=x onerror=document.title='owned'><b>&amp.png"
LABELS = "</script><u>document.title='owned'</u>", "b$_{x}$ & 'c' @@images@@"  # the latter is a placeholder of the page
EXP = "<i>'&amp;\""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


class Browser:
    """Headless Chromium through chromedriver's WebDriver protocol, which is JSON over HTTP."""

    def __init__(self, folder):
        driver = shutil.which("chromedriver")
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stdout if "successfully on port" in line)
        self.root = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.root += "/" + self.call("POST", "", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.call("POST", "/url", url=path.as_uri())

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", script=script, args=arguments)

    def devtools(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def console(self):
        return self.call("POST", "/se/log", type="browser")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def close(self):
        self.call("DELETE", "")
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        assert "CI" not in os.environ, ".ci/run installs chromium and chromium-driver"
        pytest.skip("needs Debian's chromium and chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(trained):
    """Return the report of the trained experiment: its path, what 02 printed."""
    out = done("02_oof.py", *trained.flags)
    return SimpleNamespace(path=trained.base / "report.html", out=out)


def test_report_of_the_demo(trained, report, browser):
    oof = pd.read_csv(trained.base / "oof.csv")
    browser.open(report.path)
    headline = browser.run("return document.querySelector('.headline').textContent")
    assert headline == f"AUC {last_line(report.out)[0]:.4f}"
    body = browser.run("return document.body.textContent")
    wrong = int((oof.label != (oof.probability_1 > 0.5)).sum())
    assert f"{wrong} of {len(oof)} images are predicted wrongly" in body
    assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("return document.querySelectorAll('svg').length") == 4
    assert browser.console() == []


def test_report_on_a_phone_in_dark_mode_and_printed(report, browser, tmp_path):
    browser.open(report.path)
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.devtools("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark")])
    browser.devtools("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    time.sleep(0.3)
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 27)")
    words = "[...document.querySelectorAll('section:not(#confusion) svg text')]"  # its counts are on coloured cells
    colours = browser.run(f"return {words}.map(word => getComputedStyle(word).fill)")
    assert len(colours) > 50
    assert {*colours} == {"rgb(230, 232, 234)"}, "the charts' text has the page's colour"
    assert browser.run("return document.documentElement.scrollWidth") <= 390, "no sideways scrolling on a phone"
    browser.screenshot(tmp_path / "phone.png")
    browser.devtools("Emulation.setEmulatedMedia", features=[])
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    pdf = base64.b64decode(browser.call("POST", "/print"))
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 30_000
    assert browser.console() == []


def test_names_and_labels_are_only_text(tmp_path, browser):
    """Labels and a file name contain markup; two images are the same and have two labels."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "input"
    folder.mkdir()
    names = [HOSTILE, *(f"{i:03}.png" for i in range(23))]
    labels = [LABELS[i % 2] for i in range(24)]
    images = [png(toy_image(rng, i % 2)) for i in range(24)]
    images[1] = images[0]  # one picture under two labels
    write_zip(folder / "train.zip", dict(zip(names, images, strict=True)))
    write_zip(folder / "test.zip", {"t.png": images[2]})
    write_csv(folder / "train.csv", [("image_name", "label"), *zip(names, labels, strict=True)])
    write_csv(folder / "sample_submit.csv", [("t.png", 0.5)])
    flags = ["--input", folder, "--output", tmp_path / "output"]
    groups = tmp_path / "groups.csv"
    write_csv(groups, [("image_name", "group"), *((name, max(1, i)) for i, name in enumerate(names))])
    done("00_prepare.py", *flags, "--size", 32, "--folds", 2, "--groups", groups, "--positive", LABELS[0])
    still = ["--epochs", 1, "--lr", 1e-6, "--min-lr", 1e-6]
    done("01_train_fold.py", *flags, *TINY, *still, "--fold", "all", "--exp", EXP)
    folder = tmp_path / "output" / EXP
    for oof in folder.glob("fold?.csv"):  # the hostile image must be among the mistakes
        table = pd.read_csv(oof)
        table.loc[table.image_name == HOSTILE, ["views_0", "views_1"]] = 9.0, -9.0
        table.to_csv(oof, index=False)
    shutil.copytree(folder, folder.with_name(f"{EXP}$2$"))
    done("02_oof.py", EXP, f"{EXP}$2$", *flags)
    browser.open(folder / "report.html")
    heading = browser.run("return document.querySelector('#experiments h3').textContent")
    assert heading == f"{EXP} against {EXP}$2$"
    assert browser.run("return document.title").startswith(f"{EXP}: AUC")
    assert browser.run("return document.querySelector('tr.marked td').textContent") == EXP
    assert browser.run("return document.querySelectorAll('img[src=x], figcaption b, i, u').length") == 0
    captions = browser.run("return [...document.querySelectorAll('figcaption')].map(x => x.textContent)")
    shown = sum(HOSTILE in caption for caption in captions)
    assert shown == 5, "a mistake, in the browser, a suspect, a conflict and a duplicate"
    buttons = browser.run("return [...document.querySelectorAll('.shot')].map(x => x.getAttribute('aria-label'))")
    assert buttons.count(f"enlarge {HOSTILE}") == 5
    names = browser.run("return [...document.querySelectorAll('#images figure')].map(x => x.dataset.name)")
    assert sorted(names) == sorted([HOSTILE, *(f"{i:03}.png" for i in range(23))])
    kinds = browser.run("return [...document.querySelectorAll('#kind option')].map(x => x.textContent)")
    assert kinds == ["all", *(f"{label} (12 of 12)" for label in reversed(LABELS))]
    assert any(LABELS[0] in caption for caption in captions)
    body = browser.run("return document.body.textContent")
    assert "groups whose images have different labels: a label is wrong, or the group is: 1" in body
    ticks = browser.run("return [...document.querySelectorAll('#confusion svg text')].map(x => x.textContent)")
    assert {label[:20] for label in LABELS} < {*ticks}
    assert browser.console() == []


@pytest.mark.parametrize("classes", [2, 12])
def test_the_confusion_matrix_of_two_and_of_many_classes(tmp_path, browser, classes):
    """Of twelve classes, two have no image in the finished folds."""
    targets = np.arange(240) % min(classes, 10)
    logits = noisy(targets, classes, 1)
    done("02_oof.py", *experiment(tmp_path, "base", targets, logits, metric="accuracy", tta="d4"))
    predicted = logits.argmax(axis=1)
    browser.open(tmp_path / "base" / "report.html")
    words = browser.run("return [...document.querySelectorAll('#confusion svg text')].map(x => x.textContent)")
    counts = confusion_matrix(targets, predicted, labels=range(classes)).ravel()
    assert words[-len(counts) - 1 : -1] == [*map(str, counts)], "row by row, then the title"
    assert words[:classes] == [f"class {k}" for k in range(classes)]
    headline = browser.run("return document.querySelector('.headline').textContent")
    assert headline == f"accuracy {(predicted == targets).mean():.4f}"
    assert browser.run("return document.querySelectorAll('svg').length") == 4
    assert browser.console() == []


def test_more_classes_than_a_chart_has_room_for_have_no_confusion_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MOST_SQUARE", 4)
    targets = np.arange(60) % 5
    done("02_oof.py", *experiment(tmp_path, "base", targets, noisy(targets, 5, 1), metric="accuracy"))
    assert "<h2>Confusion matrix</h2>" not in (tmp_path / "base" / "report.html").read_text()
    assert not (tmp_path / "base" / "confusion.png").exists()


def test_calibration_bins():
    rng = np.random.default_rng(0)
    score = rng.uniform(size=20_000)
    honest = (rng.uniform(size=20_000) < score).astype(int)
    mean, observed, count, error = figures.calibration(honest, np.stack([1 - score, score], axis=1))
    assert len(mean) == 10
    assert count.sum() == 20_000
    assert observed == pytest.approx(mean, abs=0.05)
    assert error < 0.02
    boastful = np.where(score > 0.5, 0.99, 0.01)
    assert figures.calibration(honest, np.stack([1 - boastful, boastful], axis=1))[3] == pytest.approx(0.24, abs=0.02)


# ---------------------------------------------------------------- the test set, and duplicates


def section(page, heading):
    """Return the HTML of the section with this heading."""
    return page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]


def test_the_report_shows_chosen_and_plain_folds_and_matched_png(tmp_path):
    targets = np.arange(60) % 2
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1))
    with_candidates(tmp_path, 40)
    heading = "Forecast and test set"
    done("02_oof.py", *flags)
    part = section((tmp_path / "base" / "report.html").read_text(), heading)
    assert FORECAST in part
    assert "<img" not in part, "no picture, no table: nothing fails"
    drawn = np.full((90, 160, 3), (200, 30, 60), np.uint8)
    (tmp_path / "prepared" / "matched.png").write_bytes(png(drawn))
    done("02_oof.py", *flags)
    part = section((tmp_path / "base" / "report.html").read_text(), heading)
    (data,) = re.findall(r'<img alt="" src="data:image/jpeg;base64,([^"]+)">', part)
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (shown.format, shown.size) == ("JPEG", (160, 90))
    assert np.asarray(shown).mean(axis=(0, 1)) == pytest.approx([200, 30, 60], abs=4)
    rows = re.findall(r"<tr( class=marked)?><td>(.+?)</td>(.*?)</tr>", part)
    assert [name for _, name, _ in rows] == ["each image alone", "20 clusters"], "the plain folds and the chosen ones"
    assert [bool(marked) for marked, *_ in rows] == [False, True]
    assert [re.findall("<td>(.+?)</td>", cells)[-1] for *_, cells in rows] == ["0.9500", "0.8000"]
    assert "matched folds, 20 clusters (matched.png)" in part
    assert "nearest image seen" in part
    page = (tmp_path / "base" / "report.html").read_text()
    headings = re.findall(r"<h2>(.+?)</h2>", page)
    wanted = ["Scores", "Worst mistakes", "Images", "Possible label errors", "Experiments", "Label conflicts"]
    assert [name for name in headings if name in (heading, *wanted)] == [heading, *wanted], "what matters most is first"
    (tmp_path / "prepared" / "matched.png").write_bytes(b"no picture")
    done("02_oof.py", *flags)
    assert "<img" not in section((tmp_path / "base" / "report.html").read_text(), heading)


def test_conflicts_and_groups_are_of_duplicates_not_of_the_folds_groups(tmp_path):
    """Three pairs of duplicates, one with two labels, are in groups of ten; another duplicate is a test image."""
    targets = np.arange(60) % 2
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1), groups=np.arange(60) // 10)
    done("02_oof.py", *flags)
    page = (tmp_path / "base" / "report.html").read_text()
    assert "or the group is: 6, 6 shown" in section(page, "Label conflicts"), "no search for duplicates"
    groups = {7: ("000000.png", "000002.png"), 12: ("000010.png", "000013.png"), 15: ("000020.png", "000022.png")}
    rows = [(group, 2, "train", name, int(group == 12)) for group, names in groups.items() for name in names]
    rows += [(16, 2, "train", "000030.png", 0), (16, 2, "test", "000031.png", 0)]  # the name of a test image as well
    header = ("group", "size", "part", "image_name", "labels_disagree")
    write_csv(tmp_path / "prepared" / "duplicates.csv", [header, *rows])
    counts = dict(groups=4, largest=2, largest_share=0.03, train_with_duplicate=0.1, test_with_duplicate=0.1)
    with_candidates(tmp_path, 40, duplicates=counts | dict(conflicts=[["000010.png", "000013.png"]]))
    done("02_oof.py", *flags)
    page = (tmp_path / "base" / "report.html").read_text()
    conflicts, several = section(page, "Label conflicts"), section(page, "Groups of duplicates")
    assert "or the group is: 1, 1 shown" in conflicts
    assert re.findall(r"<figcaption><span>(.+?)</span>", conflicts) == ["000010.png", "000013.png"]
    assert re.findall(r"<h3>(.+?)</h3>", several) == [f"group {k}: 2 of 2 training images" for k in groups]
    assert re.findall(r"<figcaption><span>(.+?)</span>", several) == [
        name for names in groups.values() for name in names
    ]


def test_a_report_without_any_duplicates(tmp_path):
    targets = np.arange(60) % 2
    flags = experiment(tmp_path, "base", targets, noisy(targets, 2, 1), groups=np.arange(60) // 10)
    header = ("group", "size", "part", "image_name", "labels_disagree")
    write_csv(tmp_path / "prepared" / "duplicates.csv", [header])
    counts = dict(groups=0, largest=1, largest_share=0.01, train_with_duplicate=0.0, test_with_duplicate=0.0)
    with_candidates(tmp_path, 40, duplicates=counts | dict(conflicts=[]))
    done("02_oof.py", *flags)
    page = (tmp_path / "base" / "report.html").read_text()
    assert "or the group is: 0, 0 shown" in section(page, "Label conflicts")
    assert "groups of two or more of these images: 0, 0 shown" in section(page, "Groups of duplicates")


# ---------------------------------------------------------------- the ledger


def test_the_ledger_contains_the_thesis_tables(trained, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(trained.output, output)
    flags = ["--input", trained.input, "--output", output]
    out = done("02_oof.py", *flags, "--lb-public", 0.888)
    ledger = output / "experiments.csv"
    (row,) = read_ledger(output).reset_index().to_dict("records")
    assert row["experiment"] == "base"
    assert (row["public"], row["private"]) == ("0.888000", "")
    cv, _, interval = last_line(out)
    assert [float(row[key]) for key in ("cv", "cv_low", "cv_high")] == pytest.approx([cv, *interval], abs=6e-5)
    changed = "model=test_resnet size=32 weights=none batch_size=8 lr=0.003 min_lr=0.0003"
    assert row["settings"] == changed, "what differs from the default; --epochs 2 is the default"
    for fold in range(3):
        part, epochs = (pd.read_csv(output / "base" / f"fold{fold}{end}.csv") for end in ("", "_epochs"))
        assert float(row[f"fold{fold}"]) == pytest.approx(
            roc_auc_score(part.target, part.views_1 - part.views_0), abs=1e-6
        )
        for kind in ("train", "valid"):
            shown = [float(value) for value in row[f"fold{fold}_{kind}_auc"].split()]
            assert shown == pytest.approx(epochs[f"{kind}_auc"], abs=1e-4)
    read_ledger(output).assign(remark="=1+1, mine").to_csv(ledger)
    shutil.copytree(output / "base", output / "same")
    done("02_oof.py", "base", "same", *flags, "--lb-private", 0.9)
    rows = read_ledger(output)
    assert list(rows.index) == ["base", "base+same", "same"]
    assert rows.loc["base", ["public", "private", "remark"]].tolist() == ["0.888000", "", "=1+1, mine"]
    assert rows.loc["base+same", "private"] == "0.900000"
    page = (output / "same" / "report.html").read_text()
    assert "AUC: same against base: no evidence either way: Δ = +0.0000, 95 % +0.0000 … +0.0000" in page
    assert "<td>base+same</td>" in page
    ledger.write_text("name\nbase\n")
    assert "experiments.csv needs a column `experiment`" in refused("02_oof.py", *flags)
    assert "--lb-public" in refused("02_oof.py", *flags, "--lb-public", "nan")


def test_a_report_without_images(trained, tmp_path):
    shutil.copytree(trained.output, tmp_path / "output")
    (tmp_path / "output" / "prepared" / "train_32.npy").unlink()
    done("02_oof.py", "--input", trained.input, "--output", tmp_path / "output")
    assert "no cache of the training images" in (tmp_path / "output" / "base" / "report.html").read_text()


def test_report_is_the_same_twice(trained, report):
    first = report.path.read_bytes()
    assert done("02_oof.py", *trained.flags) == report.out
    assert report.path.read_bytes() == first
