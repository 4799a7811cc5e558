"""Formats: competitions' own downloads, read with flags only, in the forms of 40 real ones.

FORMS says which files a download has, which flags 00 needs, and what it must print; competitions.py draws the files.
"""

import csv
import json
import shlex
from collections import Counter
from typing import NamedTuple

from common import read_table

import numpy as np
import pytest
from competitions import draw
from conftest import TINY, done, write_csv

from kit.score.tasks import task_from_json
from kit.submit.submission import per_id, read_tests, write_submission


class Form(NamedTuple):
    files: str  # of the download that the kit reads
    flags: str  # of 00
    summary: str  # its first line


FORMS = {
    "cassava-leaf-disease-classification": Form(
        "train_images/ test_images/ train.csv sample_submission.csv",
        "",
        "3 classes in column 'label'; submission: `image_id,label`, label; metric accuracy",
    ),
    "dog-breed-identification": Form(
        "train.zip test.zip labels.csv sample_submission.csv",
        "--metric logloss",
        "3 classes in column 'breed'; submission: `id,affenpinscher,boston_bull,yorkshire_terrier`, probability of "
        "each class; metric log loss",
    ),
    "plant-pathology-2020-fgvc7": Form(
        "images/ train.csv sample_submission.csv",
        "--metric auc",
        "4 classes in 4 columns, a 1 in one of them; submission: `image_id,healthy,multiple_diseases,rust,scab`, "
        "probability of each class; metric AUC",
    ),
    "ranzcr-clip-catheter-line-classification": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--groups PatientID",
        "11 labels in 11 columns, any number of them per image; submission: "
        "`StudyInstanceUID,ETT - Abnormal,ETT - Borderline,ETT - Norma…`, probability of each label; "
        "metric mean column AUC",
    ),
    "imet-2020-fgvc7": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric f2",
        "3 labels in column 'attribute_ids', any number of them per image; submission: `id,attribute_ids`, set; metric "
        "F2 of images",
    ),
    "human-protein-atlas-image-classification": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric f1-labels --channels _red _green _blue",
        "3 labels in column 'Target', any number of them per image; submission: `Id,Predicted`, set; metric macro F1 "
        "of labels",
    ),
    "siim-isic-melanoma-classification": Form(
        "jpeg/ train.csv sample_submission.csv",
        "--train-images jpeg/train --test-images jpeg/test --groups patient_id",
        "2 classes in column 'target'; submission: `image_name,target`, probability of '1'; metric AUC",
    ),
    "petfinder-pawpularity-score": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric rmse",
        "a number in Pawpularity; submission: `Id,Pawpularity`, number; metric RMSE",
    ),
    "state-farm-distracted-driver-detection": Form(
        "imgs/ driver_imgs_list.csv sample_submission.csv",
        "--train-csv driver_imgs_list.csv --train-images imgs/train --test-images imgs/test --label-column classname "
        "--groups subject --metric logloss",
        "10 classes in column 'classname'; submission: `img,c0,c1,c2,c3,c4,c5,c6,c7,c8,c9`, probability of each class; "
        "metric log loss",
    ),
    "dogs-vs-cats-redux-kernels-edition": Form(
        "train.zip test.zip sample_submission.csv",
        "--label-pattern (cat|dog) --positive dog --metric logloss",
        "2 classes in 32 paths that fit the pattern; submission: `id,label`, probability of 'dog'; metric log loss",
    ),
    "plant-seedlings-classification": Form(
        "train/ test/ sample_submission.csv",
        "--metric f1-micro",
        "3 classes in the folders' names; submission: `file,species`, label; metric micro F1",
    ),
    "the-nature-conservancy-fisheries-monitoring": Form(
        "train.zip test_stg1.zip sample_submission.csv",
        "--test-images test_stg1.zip --metric logloss",
        "8 classes in the folders' names; submission: `image,ALB,BET,DOL,LAG,NoF,OTHER,SHARK,YFT`, probability of each "
        "class; metric log loss",
    ),
    "zindi-cgiar-wheat-rust": Form(
        "train.zip test.zip sample_submission.csv",
        "--metric logloss",
        "3 classes in the folders' names; submission: `ID,leaf_rust,stem_rust,healthy_wheat`, probability of each "
        "class; metric log loss",
    ),
    "cassava-disease": Form(
        "train/ test/ sample_submission.csv",
        "",
        "5 classes in the folders' names; submission: `Category,Id`, label; metric accuracy",
    ),
    "humpback-whale-identification": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric map5",
        "7 classes in column 'Id'; submission: `Image,Id`, top; metric MAP@5",
    ),
    "zindi-turtle-recall": Form(
        "images.tar train.csv SampleSubmission.csv",
        "--train-images images.tar --test-images images.tar --label-column turtle_id --metric map5",
        "6 classes in column 'turtle_id'; submission: `image_id,prediction1,prediction2,prediction3,prediction4,pre…`, "
        "top; metric MAP@5",
    ),
    "csiro-biomass": Form(
        "train/ test/ train.csv test.csv sample_submission.csv",
        "--train-images . --test-images . --image-column image_path --target-column target_name --label-column target "
        "--test-csv test.csv --metric r2",
        "3 numbers in Dry_Clover_g, Dry_Dead_g, GDM_g; submission: `sample_id,target`, number; metric R²",
    ),
    "rsna-intracranial-hemorrhage-detection": Form(
        "stage_2_train/ stage_2_test/ stage_2_train.csv stage_2_sample_submission.csv",
        "--train-csv stage_2_train.csv --sample-submit stage_2_sample_submission.csv --train-images stage_2_train "
        "--test-images stage_2_test --image-column ID --target-column END --label-column Label --metric binary-logloss",
        "6 labels in 6 columns, any number of them per image; submission: `ID,Label`, probability of each label; "
        "metric mean column log loss",
    ),
    "signate-404-expressions": Form(
        "train.zip test.zip train_master.tsv sample_submit.csv",
        "--label-column expression --groups user",
        "4 classes in column 'expression'; submission: no header, label; metric accuracy",
    ),
    "signate-printed-circuit-boards": Form(
        "train.zip test.zip train_master.tsv sample_submit.tsv",
        "--metric accuracy",
        "2 classes in column 'flag'; submission: no header, label; metric accuracy",
    ),
    "jsai-cup-2018": Form(
        "train.zip test.zip train_master.tsv sample_submit.tsv",
        "",
        "3 classes in column 'category_id'; submission: no header, label; metric accuracy",
    ),
    "cookpad-recipe-images": Form(
        "clf_train_images_labeled_1/ clf_train_images_labeled_2/ clf_test_images_1/ clf_test_images_2/ "
        "clf_train_master.tsv sample_submit.csv",
        "--train-csv clf_train_master.tsv --train-images clf_train_images_labeled_1 clf_train_images_labeled_2 "
        "--test-images clf_test_images_1 clf_test_images_2",
        "3 classes in column 'label_id'; submission: no header, label; metric accuracy",
    ),
    "signate-431-lemons": Form(
        "train_images.zip test_images.zip train_images.csv sample_submit.csv",
        "--train-csv train_images.csv --metric qwk",
        "4 classes in column 'class_num'; submission: no header, label; metric QWK",
    ),
    "mayo-clinic-strip-ai": Form(
        "train/ test/ train.csv test.csv sample_submission.csv",
        "--test-csv test.csv --groups patient_id --metric weighted-logloss",
        "2 classes in column 'label'; submission: `patient_id,CE,LAA`, probability of each class; metric balanced log "
        "loss",
    ),
    "atmacup-11": Form(
        "photos.zip train.csv test.csv sample_submission.csv",
        "--train-images photos.zip --test-images photos.zip --test-csv test.csv --groups art_series_id --metric rmse",
        "a number in target; submission: `target`, number; metric RMSE",
    ),
    "herbarium-2021-fgvc8": Form(
        "train/ test/ sample_submission.csv",
        "--train-csv train/metadata.json --metric f1",
        "4 classes in column 'category_id'; submission: `Id,Predicted`, label; metric macro F1",
    ),
    "inaturalist-2019-fgvc6": Form(
        "train_val2019.tar.gz test2019.tar.gz train2019.json test2019.json kaggle_sample_submission.csv",
        "--train-csv train2019.json --test-csv test2019.json --train-images train_val2019.tar.gz "
        "--test-images test2019.tar.gz --sample-submit kaggle_sample_submission.csv",
        "3 classes in column 'category_id'; submission: `id,predicted`, label; metric accuracy",
    ),
    "conser-vision": Form(
        "train_features/ test_features/ train_features.csv train_labels.csv submission_format.csv",
        "--train-csv train_labels.csv --join train_features.csv --train-images train_features "
        "--test-images test_features --groups site --metric logloss",
        "8 classes in 8 columns, a 1 in one of them; submission: "
        "`id,antelope_duiker,bird,blank,civet_genet,hog,leopard,monkey…`, probability of each class; metric log loss",
    ),
    "landmark-recognition-2021": Form(
        "train/ test/ train.csv sample_submission.csv",
        "",
        "3 classes in column 'landmark_id'; submission: `id,landmarks`, scored; metric accuracy",
    ),
    "solafune-mining-sites": Form(
        "train/ evaluation_images/ answer.csv uploadsample.csv",
        "--train-csv answer.csv --test-images evaluation_images --sample-submit uploadsample.csv --bands 4 3 2 "
        "--metric f1",
        "2 classes in column '2'; submission: no header, label; metric macro F1",
    ),
    "classify-leaves": Form(
        "images/ train.csv sample_submission.csv",
        "--train-images . --test-images .",
        "3 classes in column 'label'; submission: `image,label`, label; metric accuracy",
    ),
    "sorghum-id-fgvc-9": Form(
        "train_images/ test/ train_cultivar_mapping.csv sample_submission.csv",
        "--train-csv train_cultivar_mapping.csv --drop-unlabelled",
        "3 classes in column 'cultivar'; submission: `filename,cultivar`, label; metric accuracy",
    ),
    "invasive-species-monitoring": Form(
        "train.7z test.7z train_labels.csv.zip sample_submission.csv.zip",
        "--train-images train.7z --test-images test.7z",
        "2 classes in column 'invasive'; submission: `name,invasive`, probability of '1'; metric AUC",
    ),
    "planttraits2024": Form(
        "train_images/ test_images/ train.csv sample_submission.csv",
        "--label-column X4_mean X11_mean X18_mean X26_mean X50_mean X3112_mean --metric r2",
        "6 numbers in X4_mean, X11_mean, X18_mean and 3 more; submission: `id,X4,X11,X18,X26,X50,X3112`, number; "
        "metric R²",
    ),
    "fathomnet-2023": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--label-form list --submit-value top",
        "4 labels in column 'categories', any number of them per image; submission: `id,categories,osd`, top; metric "
        "mean column AUC",
    ),
    "digit-recognizer": Form(
        "train.csv test.csv sample_submission.csv",
        "",
        "4 classes in column 'label'; submission: `ImageId,Label`, label; metric accuracy",
    ),
    "fer2013": Form(
        "train.csv test.csv sample_submission.csv",
        "--label-column emotion",
        "3 classes in column 'emotion'; submission: `id,emotion`, label; metric accuracy",
    ),
    "diabetic-retinopathy-detection": Form(
        "train.zip test.zip trainLabels.csv sampleSubmission.csv",
        "--metric qwk --group-pattern ^[0-9]+",
        "5 classes in column 'level'; submission: `image,level`, label; metric QWK",
    ),
    "aicrowd-car-rotation": Form(
        "train.zip val.zip test.zip train.csv val.csv sample_submission.csv",
        "--train-csv train.csv val.csv --train-images train.zip val.zip --metric f1",
        "4 classes in column 'label'; submission: `ImageID,label`, label; metric macro F1",
    ),
    "alaska2-image-steganalysis": Form(
        "Cover/ JMiPOD/ JUNIWARD/ UERD/ Test/ sample_submission.csv",
        "--train-images . --test-images Test --label-pattern ^([CJU][A-Za-z]+)/ --positive JMiPOD JUNIWARD UERD "
        "--submit-value probability --metric auc --group-pattern [^/]+$",
        "4 classes in 48 paths that fit the pattern; submission: `Id,Label`, probability of "
        "['JMiPOD', 'JUNIWARD', 'UERD']; metric AUC",
    ),
}
QUICK = "--groups none --size 32 --folds 2".split()  # the form's own flags follow, and --groups may be one of them
TRAINING = [*TINY, *"--epochs 10 --batch-size 8 --lr 1e-2 --loss ce --augment none --tta none".split()]
TRAINED = {  # each task in each kind of submission
    "dogs-vs-cats-redux-kernels-edition",
    "plant-seedlings-classification",
    "humpback-whale-identification",
    "mayo-clinic-strip-ai",
    "ranzcr-clip-catheter-line-classification",
    "imet-2020-fgvc7",
    "atmacup-11",
    "csiro-biomass",
}


def targets_of(task, cells):
    """Targets as Drawn has them → as kit/score/tasks.py has them."""
    if task.key == "classes":
        return task.parse(cells)
    if task.key == "labels":
        return np.array([[label in cell for label in task.names] for cell in cells], np.float32)
    return np.array(cells, np.float32)


def text_of(rows, separator):
    return "".join(separator.join(row) + "\n" for row in rows)


def prepare_and_submit(drawn, flags, form, folder):
    """Runs 00 and checks labels, groups and test images, then submits perfect predictions. → (prepared.json, the
    submission's text). Files that the form doesn't list are moved away."""
    for path in [*(folder / "input").iterdir()]:
        if path.name not in form.files.replace("/", "").split():
            path.rename(folder / path.name)
    assert {path.name for path in (folder / "input").iterdir()} == {*form.files.replace("/", "").split()}
    output = done("00_prepare.py", *flags, *QUICK, *shlex.split(form.flags)).splitlines()
    output = [line for line in output if not line.startswith("unpacking ")]
    assert form.summary in output[:2], output[:2]  # a line on repeated rows or other columns may come first
    prepared = json.loads((folder / "output" / "prepared" / "prepared.json").read_text())
    folds = read_table(folder / "output" / "prepared" / "folds.csv", "", dtype=str)
    assert Counter(folds.image_name) == Counter([*drawn.train])
    task = task_from_json(prepared)
    expected = targets_of(task, [drawn.train[image] for image in folds.image_name])
    assert np.array_equal(task.read_targets(folds.target), expected, equal_nan=task.key == "numbers")
    assert ("--group" in form.flags) == (folds.group.nunique() < len(folds)), "a group of two images or more"
    table, layout = read_tests(folder / "output" / "prepared", "")
    assert Counter(table.image_name) == Counter([*drawn.tests]), "every test image is predicted once"
    targets = targets_of(task, [drawn.tests[image] for image in table.image_name])
    perfect = np.eye(len(task))[targets] if task.key == "classes" else targets
    predictions = per_id(perfect, table.submission_id, "mean")
    path, form = folder / "perfect.csv", prepared["submission"]
    write_submission(path, layout, predictions, task, prepared["metric"], form)
    return prepared, path.read_text()


@pytest.mark.parametrize("name", FORMS)
def test_labels_are_read_and_perfect_predictions_give_the_right_submission(name, tmp_path):
    drawn, flags = draw(name, tmp_path)
    prepared, written = prepare_and_submit(drawn, flags, FORMS[name], tmp_path)
    assert written == text_of(drawn.rows, drawn.separator)
    if name in TRAINED:
        check_trained(drawn, flags, prepared, tmp_path / "output" / "base")


@pytest.mark.parametrize(
    ("name", "shown"),
    {
        "dog-breed-identification": "id,affenpinscher,boston_bull,yorkshire_terrier",
        "petfinder-pawpularity-score": "Id,Pawpularity",
        "cassava-leaf-disease-classification": "image_id,label",
    }.items(),
)
def test_further_columns_of_the_sample_stay_as_they_are(name, shown, tmp_path):
    drawn, flags = draw(name, tmp_path)
    path = tmp_path / "input" / "sample_submission.csv"
    with open(path, newline="") as file:
        sample = [*csv.reader(file)]
    for rows in (sample, drawn.rows):
        for number, row in enumerate(rows):
            row[-1] = row[-1] if number else f" {row[-1]}"  # as in Id, Pawpularity
            row[1:1] = [f"n {number}" if number else "Note"]
            row.append(f"{number % 2}" if number else " Usage")
    write_csv(path, sample)
    form = FORMS[name]
    header = ",".join(drawn.rows[0])
    summary = form.summary.replace(f"`{shown}`", f"`{header if len(header) <= 60 else header[:60] + '…'}`")
    assert prepare_and_submit(drawn, flags, form._replace(summary=summary), tmp_path)[1] == text_of(drawn.rows, ",")


def check_trained(drawn, flags, prepared, folder):
    """Trains a tiny model on the plain images: its submission is close to that of perfect predictions."""
    done("01_train_fold.py", *flags, *TRAINING, "--fold", "all")
    done("02_oof.py", *flags, "--draws", 100)
    done("03_infer.py", *flags)
    (path,) = folder.glob("submission_*.csv")
    with open(path, newline="") as file:
        rows = [*csv.reader(file, delimiter=drawn.separator)]
    headed = prepared["submission"]["header"] is not None
    values = prepared["submission"].get("values") or range(1, len(drawn.rows[0]))
    assert [len(row) for row in rows] == [len(row) for row in drawn.rows]
    pairs = []
    for number, (row, expected) in enumerate(zip(rows, drawn.rows, strict=True)):
        for column, cells in enumerate(zip(row, expected, strict=True)):
            if column in values and (number or not headed):
                pairs.append(cells)
            else:
                assert cells[0] == cells[1], "all but the predictions stay as in the sample"
    value = prepared["submission"]["value"]
    if value in ("probability", "number"):
        written, expected = np.array(pairs, float).T
        if value == "number":
            assert np.abs(written - expected).max() < 0.35 * np.ptp(expected), pairs
        else:
            assert written[expected == 0].max() < written[expected == 1].min(), pairs
            assert np.abs(written - 0.5).max() <= 0.5, pairs
    elif value == "top":
        assert all(len({*labels.split()}) == 5 for labels, _ in pairs), pairs
        assert [labels.split()[0] for labels, _ in pairs] == [expected.split()[0] for _, expected in pairs]
    else:
        assert [written for written, _ in pairs] == [expected for _, expected in pairs]
