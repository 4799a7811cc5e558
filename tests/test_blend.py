"""kit/score/blend.py: blends, and weights that are scored on the other folds and written only where they pay."""

import json
import re
import shlex
import shutil

from common import UserError, softmax, write_csv, write_json

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, done, refused
from test_oof import experiment, noisy, printed

from kit.score.blend import STEADY, blend, check_blend, fit_weights
from kit.score.metrics import METRICS
from kit.score.tasks import TASKS, Classes, Labels, Numbers

pytestmark = pytest.mark.filterwarnings("error")  # no warning of numpy or scikit-learn may reach the user
GAIN = re.compile(r"(.+): greedy weights gain (\S+) \((\S+) to (\S+)\) over equal ones: (.+)")
TARGETS = np.arange(600) % 2
FOLDS = np.arange(600) % 3  # as experiment() makes them
TWO, THREE = Classes(["a", "b"]), Classes(["a", "b", "c"])


def experiments(output, signals, metric="auc"):
    """Write an experiment for each {name: signal}, a float or float [N, 1]. → flags, {name: its probabilities}."""
    logits = {exp: noisy(TARGETS, 2, signal, seed) for seed, (exp, signal) in enumerate(signals.items())}
    for exp, values in logits.items():
        flags = experiment(output, exp, TARGETS, values, metric=metric)
    return flags, {exp: softmax(values) for exp, values in logits.items()}


def gain_of(out):
    """Return the line on greedy weights in 02's output: metric, gain, low, high, the rest of the line."""
    (match,) = filter(None, map(GAIN.fullmatch, out.splitlines()))
    return match[1], *map(float, match.groups()[1:4]), match[5]


def by_other_folds(metric, probabilities):
    """Return the blend of each fold with the weights fitted on the other folds."""
    mixed = np.empty((len(TARGETS), 2))
    for k in range(3):
        weights = fit_weights(metric, TARGETS[k != FOLDS], [p[k != FOLDS] for p in probabilities])
        mixed[k == FOLDS] = sum(w * p[k == FOLDS] for w, p in zip(weights, probabilities, strict=True))
    return mixed


def test_blends_are_weighted_means_of_probabilities_or_ranks():
    first, second = (softmax(noisy(TARGETS, 3, 1, seed)) for seed in (0, 1))
    assert blend([first], "mean", None, THREE) == pytest.approx(first)
    assert blend([first, second], "mean", None, THREE) == pytest.approx((first + second) / 2)
    assert blend([first, second], "mean", [0.6, 0.4], THREE) == pytest.approx(0.6 * first + 0.4 * second)
    assert blend([first, second], "mean", [3, 2], THREE) == pytest.approx(0.6 * first + 0.4 * second)
    a, b = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.array([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6]])
    assert blend([a], "rank", None, TWO) == pytest.approx(np.array([[3, 1], [1, 3], [2, 2]]) / 4)
    assert blend([a, b], "rank", None, TWO) == pytest.approx(np.array([[3, 1], [1.5, 2.5], [1.5, 2.5]]) / 4)
    assert blend([a, b], "rank", [1, 0], TWO) == pytest.approx(blend([a], "rank", None, TWO))


def test_blends_of_labels_and_numbers_keep_their_rows():
    a, b = np.array([[0.9, 0.9], [0.1, 0.2]]), np.array([[0.5, 0.7], [0.3, 0.4]])
    labels, numbers = Labels(["a", "b"]), Numbers(["a", "b"], [[0, 1], [0, 1]])
    for task in (labels, numbers):
        assert blend([a, b], "mean", [3, 1], task) == pytest.approx((3 * a + b) / 4)
    assert blend([a, b], "rank", None, labels) == pytest.approx(np.array([[2, 2], [1, 1]]) / 2)


def test_ranks_of_three_classes_keep_the_order_of_each():
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(size=(200, 3)) + rng.normal(size=(200, 1)))
    targets = np.array([rng.choice(3, p=row) for row in p])
    single, twice = blend([p], "rank", None, THREE), blend([p, p**2], "rank", [2, 1], THREE)
    assert np.array_equal(single.argsort(axis=0), p.argsort(axis=0))
    assert METRICS["auc"].score(targets, single) == pytest.approx(METRICS["auc"].score(targets, p), abs=1e-12)
    assert twice == pytest.approx(single)
    assert 0 < single.min() < single.max() < 1


@pytest.mark.parametrize("key", METRICS)
def test_ranks_suit_metrics_of_the_order_alone(key, capsys):
    """A metric takes ranks if it doesn't notice that each column is replaced by a rising function of it."""
    metric, task = METRICS[key], TASKS[METRICS[key].task](["0", "1"], [[0, 1], [0, 1]])
    p = np.random.default_rng(0).random((300, 2)) ** [3, 0.3]
    p = p / p.sum(axis=1, keepdims=True) if task.rows_sum_to_1 else p[:, : 1 if key == "qwk-numbers" else 2]
    targets = TARGETS[:300] if task.rows_sum_to_1 else (p > np.random.default_rng(1).random(p.shape)).astype(np.float32)
    same = metric.score(targets, p) == pytest.approx(metric.score(targets, p ** [1, 3][-p.shape[1] :]), abs=1e-12)
    form = dict(value=task.column_value, columns=None)
    if same:
        check_blend("rank", key, task, form)
        for other in (form | dict(value="label"), form | dict(summed=["1"])):
            with pytest.raises(UserError, match=r"--blend rank: the submission compares classes, .*: leave it out"):
                check_blend("rank", key, task, other)
    else:
        with pytest.raises(
            UserError, match=r"--blend rank: (ranks of numbers|.* scores more than the order).*: leave it out"
        ):
            check_blend("rank", key, task, form)
    check_blend("mean", key, task, form)
    assert same == metric.ranks
    assert not capsys.readouterr().out
    check_blend("rank", "auc", THREE, dict(value="probability"))
    assert "the ranks of an image's 3 classes don't sum to 1" in capsys.readouterr().out


def test_03_refuses_ranks_before_anything_is_predicted_and_02_shows_none(tmp_path):
    flags, p = experiments(tmp_path, dict(a=1.5, b=1.3), "accuracy")
    line = refused("03_infer.py", *p, *flags[:4], "--blend", "rank", "--weights", 2, 1)
    assert line.endswith("--blend rank: accuracy scores more than the order of the images: leave it out")
    out = done("02_oof.py", *p, *flags)
    assert "rank blend" not in out
    assert "mean blend" in out


# ---------------------------------------------------------------- fitted weights


@pytest.mark.parametrize("metric", [key for key, metric in METRICS.items() if metric.task == "classes"])
def test_fitted_weights_score_above_each_model_and_their_mean(metric):
    steady = METRICS[STEADY.get(METRICS[metric].cut, metric)]  # that of a metric with cuts, which fit one blend only
    score, sign = steady.score, 1 if steady.larger_is_better else -1
    probabilities = [softmax(noisy(TARGETS, 2, signal, seed)) for seed, signal in enumerate((0.2, 1.5, 1.2))]
    weights = fit_weights(metric, TARGETS, probabilities)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    mean = [] if metric in ("map3", "map5") else [blend(probabilities, "mean", None, TWO)]
    best = max(sign * score(TARGETS, p) for p in [*probabilities, *mean])
    assert sign * score(TARGETS, blend(probabilities, "mean", weights, TWO)) >= best
    assert np.array_equal(weights, fit_weights(metric, TARGETS, probabilities)), "nothing is drawn"


def test_a_weight_below_one_half_is_found_where_one_half_would_be_worse_than_none():
    strong, weak = softmax(3 * noisy(TARGETS, 2, 1.5)), softmax(noisy(TARGETS, 2, 0.6, seed=1))  # the former too sure
    loss = [METRICS["logloss"].score(TARGETS, w * weak + (1 - w) * strong) for w in np.linspace(0, 1, 51)]
    assert min(loss) < loss[0] < loss[25], "an assumption of this test"
    share = fit_weights("logloss", TARGETS, [weak, strong])[0]
    assert share == pytest.approx(np.argmin(loss) / 50, abs=0.02)


def test_models_with_undefined_scores_get_no_weight():
    good, bad = softmax(noisy(TARGETS, 2, 1)), softmax(noisy(TARGETS, 2, 0.2, seed=1))
    assert fit_weights("accuracy", TARGETS, [np.full_like(good, np.nan), good, good]).tolist() == [0, 1, 0]
    assert fit_weights("auc", np.zeros_like(TARGETS), [good, bad]).tolist() == [0.5, 0.5], "one class only"


# ---------------------------------------------------------------- 02


@pytest.mark.parametrize("metric", ["auc", "logloss"])
def test_noise_gets_little_weight_and_the_file_has_the_honest_score(tmp_path, metric):
    flags, p = experiments(tmp_path, dict(a=1.5, noise=0, b=1.3), metric)
    out = done("02_oof.py", *p, *flags)
    score = METRICS[metric].score
    honest, equal = score(TARGETS, by_other_folds(metric, [*p.values()])), score(TARGETS, sum(p.values()) / 3)
    assert printed(out)["greedy blend"][0] == pytest.approx(honest, abs=6e-5)
    name, gain, low, high, rest = gain_of(out)
    assert name == METRICS[metric].name
    assert gain == pytest.approx(honest - equal if metric == "auc" else equal - honest, abs=6e-5)
    assert 0 < low < gain < high
    path = tmp_path / "blend_a+b+noise.json"
    assert rest.endswith(f" → {path}")
    content = json.loads(path.read_text())
    weights = content["weights"]
    assert [*weights] == [*p]
    assert [*weights.values()] == fit_weights(metric, TARGETS, [*p.values()]).tolist()
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["noise"] < 0.15 < weights["b"]
    fitted = score(TARGETS, sum(weights[exp] * p[exp] for exp in p))
    assert content["cv"] == pytest.approx(honest, abs=1e-8)
    assert abs(fitted - honest) > 1e-5, "the score on the images that the weights were fitted on flatters"
    assert content["cv_low"] < content["cv"] < content["cv_high"]
    assert "greedy weights gain" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize("least", [1.0, 0.7])
def test_a_gain_within_the_noise_leaves_no_file(tmp_path, least):
    """Three models that are equally good, or one a little worse, so that fitted weights score a little better."""
    flags, p = experiments(tmp_path, dict(a=1.0, b=least, c=1.0))
    path = tmp_path / "blend_a+b+c.json"
    path.write_text("an earlier one, of other predictions")
    out = done("02_oof.py", "c", "a", "b", *flags)
    _, gain, low, high, rest = gain_of(out)
    assert low <= 0 <= high
    assert low <= gain <= high
    assert (gain > 0) == (least < 1)
    assert rest == "within the noise: take equal weights"
    assert not path.exists(), "whatever the order of the names"
    assert fit_weights("auc", TARGETS, [*p.values()]).max() > 0.34, "weights that fit better than equal ones there are"
    assert not list(tmp_path.glob("blend*"))
    assert "03_infer" not in out


def test_weights_that_fail_on_the_next_fold_are_a_loss(tmp_path):
    """Each model errs on one fold, so it looks best on the others: the score of fitted weights must see that fold."""
    signals = {f"m{k}": np.where(k == FOLDS, -1.5, 1.5)[:, None] for k in range(3)}
    flags, _ = experiments(tmp_path, signals)
    out = done("02_oof.py", *signals, *flags)
    _, gain, low, high, rest = gain_of(out)
    assert low < gain < high < -0.1
    assert rest == "a loss: take equal weights"
    assert not list(tmp_path.glob("blend*"))


@pytest.mark.slow
def test_one_fold_or_an_undefined_score_gives_no_weights(tmp_path):
    flags, p = experiments(tmp_path / "fold", dict(a=1.5, noise=0))
    done("02_oof.py", *p, *flags)
    assert (tmp_path / "fold" / "blend_a+noise.json").exists()
    for k in (1, 2):
        (tmp_path / "fold" / "a" / f"fold{k}.pt").unlink()
    out = done("02_oof.py", *p, *flags)
    assert "greedy weights can't be judged on one fold" in out
    assert "greedy blend" not in out
    for exp in "ab":
        flags = experiment(tmp_path / "class", exp, np.zeros(60, int), noisy(np.zeros(60, int), 2, 1))
    assert "greedy weights can't be judged: the score is undefined" in done("02_oof.py", "a", "b", *flags)
    assert not list(tmp_path.rglob("blend*"))


# ---------------------------------------------------------------- 03


@pytest.fixture(scope="module")
def weighed(trained, tmp_path_factory):
    """Return flags, output and 02's output of two trained experiments with made-up out-of-fold logits: `other` is
    noise."""
    output = tmp_path_factory.mktemp("weighed") / "output"
    shutil.copytree(trained.output, output)
    flags = ["--input", trained.input, "--output", output]
    done("01_train_fold.py", *flags, *TINY, "--fold", "all", "--exp", "other", "--seed", 1, "--epochs", 1)
    for seed, (exp, signal) in enumerate(dict(base=2.0, other=0.0).items()):
        for k in range(3):
            table = pd.read_csv(output / exp / f"fold{k}.csv", dtype={"image_name": str})
            table[["views_0", "views_1"]] = noisy(table.target.to_numpy(), 2, signal, 3 * seed + k)
            write_csv(output / exp / f"fold{k}.csv", table)
    return flags, output, done("02_oof.py", "base", "other", *flags)


def test_the_printed_command_writes_the_weighted_mean_and_the_honest_score(weighed):
    flags, output, out = weighed
    (command,) = re.findall("to submit that blend: python (.+)", out)
    content = json.loads((output / "blend_base+other.json").read_text())
    weights, tables = content["weights"], {}
    for exp in weights:
        tables[exp] = pd.concat([pd.read_csv(output / exp / f"fold{k}.csv") for k in range(3)])
    fitted = sum(weights[exp] * softmax(table.filter(like="views_")) for exp, table in tables.items())
    flattered = METRICS["auc"].score(tables["base"].target.to_numpy(), fitted)
    assert flattered > content["cv"] + 2e-4, "an assumption of this test"
    last = done(*shlex.split(command)).splitlines()[-1]
    for exp in weights:
        done("03_infer.py", exp, *flags)
    (path,) = output.glob("submission_*")
    assert path.name == f"submission_base+other_weighted_CV{content['cv']:.4f}.csv"
    assert last.startswith(f"CV {content['cv']:.4f} (AUC, of weights fitted on the other folds), ")
    paths = [next((output / exp).glob("submission_*")) for exp in ("base", "other")]
    parts = [np.loadtxt(part, delimiter=",", usecols=1) for part in paths]
    expected = weights["base"] * parts[0] + weights["other"] * parts[1]
    values = np.loadtxt(path, delimiter=",", usecols=1)
    assert values == pytest.approx(expected, abs=1e-6)
    assert not np.allclose(values, np.mean(parts, axis=0), atol=1e-3)
    ledger = pd.read_csv(output / "experiments.csv").set_index("experiment")
    assert ledger.cv["base+other_weighted"] == pytest.approx(content["cv"], abs=1e-6)
    done("03_infer.py", "other", "base", *flags, "--weights", output / "blend_base+other.json")
    (path,) = output.glob("submission_other+base_*")
    assert np.loadtxt(path, delimiter=",", usecols=1) == pytest.approx(values), "names decide, not their order"


@pytest.fixture
def damaged(tmp_path):
    """Return the weights of the first two of the experiments a, noise and b, and a function: more flags → 03's one
    line."""
    flags, _ = experiments(tmp_path, dict(a=1.5, noise=0, b=1.5))
    done("02_oof.py", "a", "noise", *flags)
    path = tmp_path / "blend_a+noise.json"

    def line(*more, exps=("a", "noise"), weights=path):
        message = refused("03_infer.py", *exps, *flags[:4], "--weights", weights, *more)
        assert str(weights) in message
        assert not list(tmp_path.rglob("submission*"))
        return message

    return path, line


def test_weights_for_other_experiments_blends_and_views_are_refused(damaged):
    _, line = damaged
    assert "is for a noise, not for a b: run python 02_oof.py a b" in line(exps=("a", "b"))
    assert "is for a noise, not for a: " in line(exps="a")
    assert "fitted for --blend mean" in line("--blend", "rank")
    assert "fitted on other views: leave --tta out" in line("--tta", "d4")


@pytest.mark.parametrize("change", ["a prediction", "a fold", "the metric"])
def test_weights_fitted_on_earlier_predictions_are_refused(damaged, change):
    path, line = damaged
    if change == "a prediction":
        table = pd.read_csv(path.parent / "noise" / "fold1.csv", dtype={"image_name": str})
        table.loc[3, "views_1"] += 0.001
        write_csv(path.parent / "noise" / "fold1.csv", table)
    elif change == "a fold":
        (path.parent / "a" / "fold2.pt").unlink()
    else:
        prepared = path.parent / "prepared" / "prepared.json"
        write_json(prepared, json.loads(prepared.read_text()) | dict(metric="brier"))
    message = line()
    assert "was fitted on earlier predictions or for another metric: run python 02_oof.py a noise" in message


def test_files_that_hold_no_weights_are_refused(damaged, tmp_path):
    path, line = damaged
    content = json.loads(path.read_text())
    wrong = ["no JSON", [1], {}, *(content | dict(weights=w) for w in ([1, 2], {}, dict(a="x"), dict(a=-1, noise=2)))]
    for text in [*wrong, content | dict(weights=dict(a=float("nan"), noise=1)), content | dict(weights=dict(a=0))]:
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        assert "is missing or isn't a file of weights: run python 02_oof.py a noise" in line()
    for other in (tmp_path, tmp_path / "nowhere.json", tmp_path / "prepared" / "folds.csv"):
        assert "is missing or isn't a file of weights" in line(weights=other)
    flags = ["--output", tmp_path, "--weights"]
    for weights in ([0.6, path], [path, path], [0.5], [0, 0], ["0,6", "0,4"]):
        message = refused("03_infer.py", "a", "noise", *flags, *weights)
        assert "--weights needs a number for each of a, noise, not all of them 0, or one file" in message
