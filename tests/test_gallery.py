"""The images of report.html: browser and enlarged view, label errors, experiments compared, Grad-CAM.

Chromium is driven by keys, clicks and touches."""

import base64
import io
import re
import shutil
import sys
import time
from types import SimpleNamespace

from common import UserError, softmax, write_csv

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import done, refused
from PIL import Image
from test_oof import QUICK, experiment, noisy, write_experiment
from test_report import Browser, section

from kit.report import gallery, gradcam
from kit.score import label_errors
from kit.score.tasks import Classes, Labels, Numbers
from kit.train.model import build_model

ENTER, ESCAPE, LEFT, RIGHT = "\ue007", "\ue00c", "\ue012", "\ue014"
TASKS = ("classes", "labels", "numbers")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    browser.devtools("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
    yield browser
    browser.close()


def made_up(output, task, count=60, size=None, seed=0):
    """Write a finished experiment "base" of three folds and three classes, labels or numbers, as 00 and 01 would; with
    `size`, the images too. → the flags of 02, targets, logits."""
    rng, names = np.random.default_rng(seed), ["ant", "bee", "cat"]
    if task == "classes":
        targets, task, metric = np.arange(count) % 3, Classes(names), "accuracy"
        label, target, signal = [names[k] for k in targets], targets, 2.0 * np.eye(3)[targets]
    elif task == "labels":
        targets, task, metric = (rng.random((count, 3)) < 0.4).astype(np.float32), Labels(names), "column-auc"
        label = [" ".join(name for name, has in zip(names, row, strict=True) if has) for row in targets]
        target, signal = task.write_targets(targets), 4 * targets - 2
    else:
        targets, task, metric = rng.random((count, 3)).astype(np.float32), Numbers(names, [[0, 1]] * 3), "mcrmse"
        target = label = task.write_targets(targets)
        signal = 4 * targets - 2
    logits = signal + rng.normal(size=(count, 3))
    images = [f"{i:06}.png" for i in range(count)]
    folds = pd.DataFrame(dict(image_name=images, label=label, target=target, group=range(count)))
    folds = folds.assign(fold=np.arange(count) % 3)
    kinds = dict.fromkeys(("best", "last", "views"), logits)
    write_experiment(output, "base", task, folds, kinds, metric, sizes=[size] if size else [])
    if size:
        np.save(output / "prepared" / f"train_{size}.npy", rng.integers(0, 256, (count, size, size, 3), np.uint8))
    return ["--input", output / "input", "--output", output, *QUICK], targets, logits


# ---------------------------------------------------------------- the browser of images


def press(browser, selector, keys):
    (element,) = browser.call("POST", "/element", using="css selector", value=selector).values()
    browser.call("POST", f"/element/{element}/value", text=keys)


def click(browser, selector):
    (element,) = browser.call("POST", "/element", using="css selector", value=selector).values()
    browser.call("POST", f"/element/{element}/click")


def choose(browser, menu, value):
    browser.run(
        "const menu = document.getElementById(arguments[0]); menu.value = arguments[1];"
        "menu.dispatchEvent(new Event('change'))", menu, value,
    )  # fmt: skip


def names(browser):
    return browser.run("return [...document.querySelectorAll('#images figure')].map(figure => figure.dataset.name)")


def content(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent", name)


def enlarged(browser):
    """Return the name under the enlarged image, or None while there is none."""
    return browser.run(
        "return document.getElementById('viewer').open ? document.querySelector('#legend span').textContent : null"
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return a report of 60 drawn images of three classes, the images by loss, and the labels."""
    output = tmp_path_factory.mktemp("gallery")
    flags, targets, logits = made_up(output, "classes", size=48)
    done("02_oof.py", *flags)
    loss = -np.log(softmax(logits)[np.arange(60), targets])
    order = [f"{i:06}.png" for i in np.argsort(-loss)]
    label = {f"{i:06}.png": "ant bee cat".split()[c] for i, c in enumerate(targets)}
    return SimpleNamespace(path=output / "base" / "report.html", order=order, label=label)


def test_images_are_filtered_sorted_searched_and_paged(report, browser):
    browser.open(report.path)
    assert names(browser) == report.order[:24], "the largest loss first"
    assert content(browser, "range") == "1 to 24 of 60"
    click(browser, "#later")
    click(browser, "#later")
    assert names(browser) == report.order[48:]
    assert content(browser, "range") == "49 to 60 of 60"
    assert browser.run("return document.getElementById('later').disabled")
    choose(browser, "kind", "1")
    bees = [name for name in report.order if report.label[name] == "bee"]
    assert names(browser) == bees
    choose(browser, "order", "best")
    assert names(browser) == bees[::-1]
    choose(browser, "order", "name")
    assert names(browser) == sorted(bees)
    press(browser, "#search", "00003 LABEL")
    assert names(browser) == [name for name in sorted(bees) if "00003" in name]
    press(browser, "#search", "nothing")
    assert names(browser) == []
    assert content(browser, "range") == "none"
    kinds = browser.run("return [...document.querySelectorAll('#kind option')].map(option => option.textContent)")
    assert kinds == ["all", "ant (20 of 20)", "bee (20 of 20)", "cat (20 of 20)"]
    assert browser.console() == []


def test_an_image_is_enlarged_by_key_and_click(report, browser):
    browser.open(report.path)
    press(browser, "#images figure:nth-child(23) .shot", ENTER)
    assert enlarged(browser) == report.order[22]
    assert content(browser, "where") == "23 of 60"
    press(browser, "#close", RIGHT * 3)
    assert enlarged(browser) == report.order[25], "beyond the page of 24"
    press(browser, "#close", LEFT)
    assert enlarged(browser) == report.order[24]
    press(browser, "#close", ESCAPE)
    assert enlarged(browser) is None
    time.sleep(0.3)  # the dialog's close event comes after the key's
    focused = browser.run("return document.activeElement.closest('figure').dataset.name")
    assert focused == report.order[24], "the page with it is shown"
    assert content(browser, "range") == "25 to 48 of 60"
    click(browser, "#mistakes figure:nth-child(2) .shot")
    count = browser.run("return document.querySelectorAll('#mistakes figure').length")
    assert content(browser, "where") == f"2 of {count}"
    click(browser, "#before")
    click(browser, "#before")
    assert content(browser, "where") == f"{count} of {count}", "the last one comes before the first"
    large = browser.run("const r = document.querySelector('#large img').getBoundingClientRect(); return r.width")
    small = browser.run("const r = document.querySelector('.shot img').getBoundingClientRect(); return r.width")
    assert large > 2.5 * small
    click(browser, "#close")
    assert enlarged(browser) is None
    assert browser.console() == []


def test_an_image_is_enlarged_by_touch(report, browser):
    browser.devtools("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.devtools("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.open(report.path)
    middle = (
        "const part = document.querySelector(arguments[0]); part.scrollIntoView({block: 'center'});"
        "const r = part.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]"
    )

    def touch(selector):
        x, y = browser.run(middle, selector)
        browser.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x, y=y)])
        browser.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        time.sleep(0.4)

    touch("#images figure:nth-child(3) .shot")
    assert enlarged(browser) == report.order[2]
    assert browser.run("return document.getElementById('viewer').getBoundingClientRect().right") <= 390
    touch("#after")
    assert enlarged(browser) == report.order[3]
    touch("#close")
    assert enlarged(browser) is None
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.devtools("Emulation.setTouchEmulationEnabled", enabled=False)
    browser.devtools("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
    assert browser.console() == []


@pytest.mark.parametrize("task", TASKS)
def test_the_browser_of_images_of_each_task(task, tmp_path, browser):
    flags, targets, _ = made_up(tmp_path, task, size=32)
    done("02_oof.py", *flags)
    browser.open(tmp_path / "base" / "report.html")
    kinds = browser.run("return [...document.querySelectorAll('#kind option')].map(option => option.textContent)")
    if task == "labels":
        counts = [*targets.sum(axis=0).astype(int), int((targets.sum(axis=1) == 0).sum())]
        wanted = [f"{name} ({n} of {n})" for name, n in zip(["ant", "bee", "cat", "none of them"], counts, strict=True)]
        assert kinds[1:] == wanted
        choose(browser, "kind", "3")
        assert names(browser)
        assert all("labels none" in text for text in captions(browser, "images"))
    if task == "numbers":
        assert kinds[1].startswith("ant from 0.0")
        choose(browser, "kind", "4")
        largest = sorted(targets[:, 0])[-len(names(browser)) :]
        shown = [float(re.search(r"target (\S+)", text)[1]) for text in captions(browser, "images")]
        assert sorted(shown) == pytest.approx(largest, rel=1e-3)
        assert not (tmp_path / "base" / "suspects.csv").exists()
    assert browser.run("return document.getElementById('suspects') === null") == (task == "numbers")
    assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.console() == []


def captions(browser, part):
    script = "return [...document.querySelectorAll(`#${arguments[0]} figcaption`)].map(x => x.innerText)"
    return browser.run(script, part)


def test_the_page_stays_small_and_counts_the_images_it_leaves_out(tmp_path, browser):
    """Noise makes the largest JPEGs: MOST_BYTES is reached before the 320 images are."""
    flags, *_ = made_up(tmp_path, "classes", count=3000, size=192)
    done("02_oof.py", *flags)
    path = tmp_path / "base" / "report.html"
    assert 3_500_000 < path.stat().st_size < 5_000_000
    browser.open(path)
    shown = int(re.search(r"(\d+) of 3000 out-of-fold images are in this page", path.read_text())[1])
    assert 60 < shown < 320
    assert content(browser, "range") == f"1 to 24 of {shown}"
    kinds = browser.run("return [...document.querySelectorAll('#kind option')].map(option => option.textContent)")
    counts = [int(re.search(r"\((\d+) of 1000\)", kind)[1]) for kind in kinds[1:]]
    assert sum(counts) == shown
    assert min(counts) > shown / 5, "some of each class"
    assert browser.console() == []


def test_chosen_images_are_the_worst_and_some_of_each_class():
    loss = np.random.default_rng(0).random(5000)
    members = [np.arange(4990), *(np.array([row]) for row in range(4990, 5000))]
    rows = gallery.choose(loss, members)
    assert len(rows) == len(set(rows)) == 320
    assert {*np.argsort(-loss)[:150]} <= {*rows}
    assert {*range(4990, 5000)} <= {*rows[:24]}, "the rare classes come early"
    assert sorted(gallery.choose(loss[:7], [np.arange(7)])) == list(range(7))


# ---------------------------------------------------------------- label errors


def drawn(count, classes, seed=0):
    """Return (true int [N], probabilities [N, K]); the true classes are drawn from them, so they are honest."""
    rng = np.random.default_rng(seed)
    signal = 3.5 + np.log(classes)
    logits = rng.normal(size=(count, classes)) + signal * np.eye(classes)[rng.integers(classes, size=count)]
    probabilities = softmax(logits)
    true = (rng.random((count, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    return np.minimum(true, classes - 1), probabilities


def flipped(true, classes, share, seed=1):
    """Return labels of which a share is another class, and which those are."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(true)) < share
    return np.where(wrong, (true + rng.integers(1, classes, len(true))) % classes, true), wrong


@pytest.mark.parametrize("classes", [2, 10])
def test_flipped_labels_are_found_and_clean_ones_are_not(classes):
    true, probabilities = drawn(4000, classes)
    accuracy = (probabilities.argmax(axis=1) == true).mean()
    assert 0.92 < accuracy < 0.98
    clean = (label_errors.suggest(true, probabilities) != true).sum()
    assert clean < 0.05 * len(true), "few on clean data"
    by_chance = label_errors.expected_count(true, probabilities)
    assert abs(clean - by_chance) < 4 * by_chance**0.5, "as many as it says"
    labels, wrong = flipped(true, classes, 0.1)
    suggested = label_errors.suggest(labels, probabilities)
    suspected = suggested != labels
    assert suspected[wrong].mean() > 0.9, "recall"
    assert wrong[suspected].mean() > 0.63, "precision: the images that are hard by chance are among them"
    assert (suggested[suspected & wrong] == true[suspected & wrong]).mean() > 0.9


def test_confident_learning_by_hand():
    """Class 0's images have 0.8 on average, class 1's 0.325; class 2 has no image."""
    p = np.array(
        [[0.94, 0.06, 0], [0.66, 0.34, 0], [0.3, 0.6, 0.1], [0.05, 0.6, 0.35], [0.81, 0.1, 0.09], [0.0, 0.0, 1]]
    )
    labels = np.array([0, 0, 1, 1, 1, 1])
    thresholds = [0.8, (0.6 + 0.6 + 0.1 + 0) / 4]
    assert thresholds == pytest.approx([0.8, 0.325])
    assert label_errors.suggest(labels, p).tolist() == [0, 0, 1, 1, 0, 1], (
        "0.34 reaches its threshold, but 0.66 is more; 0.81 reaches 0.8; class 2 has no threshold"
    )


def test_label_errors_are_written_and_shown(tmp_path, browser):
    targets = np.arange(300) % 3
    labels, wrong = flipped(targets, 3, 0.08)
    logits = 8 * np.eye(3)[targets] + np.random.default_rng(0).normal(size=(300, 3)) / 2
    flags = experiment(tmp_path, "base", labels, logits, metric="accuracy")
    done("02_oof.py", *flags)
    table = pd.read_csv(tmp_path / "base" / "suspects.csv", dtype=dict(image_name=str))
    assert [*table] == "image_name label suggested probability_label probability_suggested".split()
    rows = table.image_name.str[:6].astype(int).to_numpy()
    assert wrong[rows].all()
    assert len(rows) > 0.9 * wrong.sum()
    assert table.suggested.tolist() == [f"class {targets[i]}" for i in rows]
    p = softmax(logits)
    assert table.probability_label.to_numpy() == pytest.approx(p[rows, labels[rows]])
    gaps = (table.probability_suggested - table.probability_label).to_numpy()
    assert (np.diff(gaps) <= 1e-9).all(), "the surest first"
    browser.open(tmp_path / "base" / "report.html")
    shown = captions(browser, "suspects")
    assert len(shown) == min(24, len(rows))
    assert shown[0].splitlines()[:3] == [
        table.image_name[0], f"label {table.label[0]}: {table.probability_label[0]:.3f}",
        f"rather {table.suggested[0]}: {table.probability_suggested[0]:.3f}",
    ]  # fmt: skip
    page = (tmp_path / "base" / "report.html").read_text()
    assert f"{len(rows)} times, a label may be wrong" in page
    assert "about 0 would be suspected if all were right" in page


def test_a_label_too_many_and_a_missing_label(tmp_path):
    flags, targets, _ = made_up(tmp_path, "labels")
    folder = tmp_path / "base"
    for k in range(3):
        table, rows = pd.read_csv(folder / f"fold{k}.csv", dtype=dict(target=str), keep_default_na=False), targets[k::3]
        for c in range(3):
            table[[f"{kind}_{c}" for kind in ("best", "last", "views")]] = (8 * rows[:, [c]] - 4) * np.ones(3)
        if k == 0:  # image 0's bee and image 3's cat
            table.loc[0, "views_1"], table.loc[1, "views_2"] = (
                (-6 if targets[0, 1] else 6),
                (-5 if targets[3, 2] else 5),
            )
        write_csv(folder / f"fold{k}.csv", table)
    done("02_oof.py", *flags)
    table = pd.read_csv(folder / "suspects.csv")
    assert table.image_name.tolist() == ["000000.png", "000003.png"]
    signs = ["-" if targets[i, c] else "+" for i, c in ((0, 1), (3, 2))]
    assert table.suggested.tolist() == [f"{signs[0]} bee", f"{signs[1]} cat"]
    assert table.probability_suggested.to_numpy() == pytest.approx([1 / (1 + np.exp(-6)), 1 / (1 + np.exp(-5))])


# ---------------------------------------------------------------- experiments compared


def test_experiments_are_compared_image_by_image(tmp_path, browser):
    targets = np.arange(90) % 2
    logits = dict(one=noisy(targets, 2, 2, 0), two=noisy(targets, 2, 1, 1))
    for exp, values in logits.items():
        flags = experiment(tmp_path, exp, targets, values)
    done("02_oof.py", "one", "two", *flags)
    p = {exp: softmax(values)[np.arange(90), targets] for exp, values in logits.items()}
    page = (tmp_path / "one" / "report.html").read_text()
    part = section(page, "Experiments")
    one, two = p["one"] > 0.5, p["two"] > 0.5
    counts = f"both {(one & two).sum()}, only one {(one & ~two).sum()}, only two {(two & ~one).sum()}"
    assert f"right about an image, of 90: {counts}, neither {(~one & ~two).sum()}" in part
    gain = p["one"] - p["two"]
    shown = re.findall(r"<figcaption><span>(.+?)</span>", part)
    assert shown[:12] == [f"{i:06}.png" for i in np.argsort(-gain)[:12]]
    assert shown[12:] == [f"{i:06}.png" for i in np.argsort(gain)[:12]]
    best = np.argmax(gain)
    assert f"<span>two → class {1 - targets[best]}: {1 - p['two'][best]:.3f}</span>" in part
    rows = re.findall(r"<tr><td>(one|two)</td><td>([\d.]+) \(", part)
    assert [exp for exp, _ in rows] == ["one", "two"]
    done("02_oof.py", "one", *flags)
    alone = section((tmp_path / "one" / "report.html").read_text(), "Experiments")
    assert "right about an image" not in alone
    browser.open(tmp_path / "two" / "report.html")
    assert browser.run("return document.querySelectorAll('#experiments svg').length") == 1
    assert browser.console() == []


def test_unfinished_experiments_are_compared_on_shared_folds(tmp_path):
    targets = np.arange(90) % 2
    for exp, seed in (("one", 0), ("two", 1)):
        flags = experiment(tmp_path, exp, targets, noisy(targets, 2, 2, seed))
    (tmp_path / "two" / "fold1.pt").unlink()
    done("02_oof.py", "one", "two", *flags)
    for exp in ("one", "two"):
        part = section((tmp_path / exp / "report.html").read_text(), "Experiments")
        assert "right about an image, of 60" in part
        shown = [int(name[:6]) for name in re.findall(r"<figcaption><span>(.+?)</span>", part)]
        assert shown
        assert all(i % 3 != 1 for i in shown)


# ---------------------------------------------------------------- Grad-CAM


def network(name, size, **config):
    torch.manual_seed(0)
    config = dict(model=name, model_kwargs={}, head="fresh", size=size, norm="model") | config
    return build_model(config, 3, "none").eval()


def images_of(size, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_grad_cam_of_a_pooled_map_is_its_class_activation_map():
    """Where a linear head follows the mean over the map, Grad-CAM is the head's weights times the map."""
    model, images = network("test_resnet", 160), images_of(160)
    masks = gradcam.heat(model, images, [1, 0], "test_resnet")
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) - model.mean) / model.std
    with torch.no_grad():
        maps = model.backbone.forward_features(pixels)
    for mask, maps_of_one, output in zip(masks, maps, (1, 0), strict=True):
        wanted = torch.einsum("c,chw->hw", model.head.weight[output], maps_of_one).clamp(0)
        assert wanted.std() > 0
        wanted = torch.nn.functional.interpolate(wanted[None, None], (160, 160), mode="bilinear")[0, 0].detach().numpy()
        assert mask.shape == (160, 160)
        assert np.corrcoef(mask.ravel(), wanted.ravel())[0, 1] > 0.99
    assert np.corrcoef(*(mask.ravel() for mask in masks))[0, 1] < 0.9, "another image and class has another map"


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_grad_cam_of_a_vit_weighs_patches_by_their_gradient(name):
    """The expected map is computed here by autograd: the patches times their gradient."""
    size, kwargs = (224, dict(depth=2)) if name.startswith("eva") else (160, {})
    model, images = network(name, size, model_kwargs=kwargs), images_of(size, 1)
    (mask,) = gradcam.heat(model, images, [1], name)
    tokens = {}
    block = model.backbone.blocks[-1].norm1
    hook = block.register_forward_hook(lambda module, _, output: tokens.update(output=output))
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, 1], tokens["output"])
    prefix = model.backbone.num_prefix_tokens
    patches, gradient = tokens["output"][0, prefix:], gradient[0, prefix:]
    assert gradient.abs().sum() > 0
    wanted = (patches * gradient.mean(dim=0)).sum(dim=1).clamp(0)
    side = int(len(wanted) ** 0.5)
    corner = slice(size // side // 2, None, size // side)
    assert np.corrcoef(mask[corner, corner].ravel(), wanted.detach().numpy())[0, 1] > 0.95


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout", "test_vit3"])
def test_grad_cam_finds_a_map(name):
    masks = gradcam.heat(network(name, 160), images_of(160), [0, 1], name)
    assert masks.shape == (2, 160, 160)
    assert masks.max() == pytest.approx(1, abs=1e-3)
    assert masks.min() >= 0


def test_overlays_of_the_worst_mistakes(trained, tmp_path, browser):
    shutil.copytree(trained.output, tmp_path / "output")
    flags = ["--input", trained.input, "--output", tmp_path / "output"]
    (tmp_path / "output" / "base" / "fold0.pt").unlink()  # then row 0 of what is scored is another image's
    done("02_oof.py", *flags, "--overlays")
    path = tmp_path / "output" / "base" / "report.html"
    images = np.load(tmp_path / "output" / "prepared" / "train_32.npy")
    names = pd.read_csv(tmp_path / "output" / "prepared" / "folds.csv").image_name.tolist()
    page = section(path.read_text(), "Worst mistakes")
    figures = re.findall(r'<figure class="pair">.*?</figure>', page)
    assert 0 < len(figures) <= 24
    for figure in figures:
        predicted = re.search(r"<span>predicted (.+?): ", figure)[1]
        assert f"<span>heat for {predicted}</span>" in figure
        plain, hot = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
            for data in re.findall(r"base64,([^\"]+)", figure)
        )
        assert plain.shape == hot.shape == (32, 32, 3)
        assert np.abs(plain - hot).mean() > 5
        image = images[names.index(re.search(r"<figcaption><span>(.+?)</span>", figure)[1])].astype(float)
        edges = [np.diff(pixels.mean(axis=2)).ravel() for pixels in (image, plain, hot)]
        assert np.corrcoef(edges)[0, 1:].min() > 0.6, "both are the image of that name; the heat is smooth"
    browser.open(path)
    click(browser, "#mistakes .shot")
    assert browser.run("return document.querySelectorAll('#large img').length") == 2
    assert browser.console() == []


def test_overlays_that_cannot_be_drawn_are_refused_in_one_line(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.output, tmp_path / "output")
    flags, folder = ["--input", trained.input, "--output", tmp_path / "output", "--overlays"], tmp_path / "output"
    (folder / "base" / "fold1.pt").write_bytes(b"")
    assert "fold1.pt is damaged" in refused("02_oof.py", *flags)
    (folder / "prepared" / "train_32.npy").unlink()
    assert "train_32.npy is missing" in refused("02_oof.py", *flags)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    monkeypatch.delitem(sys.modules, "kit.report.gradcam")
    monkeypatch.delattr("kit.report.gradcam")
    line = refused("02_oof.py", *flags)
    assert "--overlays needs grad-cam (" in line
    assert line.endswith("): pip install grad-cam"), "the cause, then the remedy"


def test_a_network_without_a_map_is_an_error_that_names_it():
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    model.forward = lambda images: model.backbone(images.float())
    with pytest.raises(UserError, match="--overlays: flat has no map"):
        gradcam.last_map(model, torch.zeros(1, 3, 8, 8), "flat")
