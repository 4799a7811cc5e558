"""The kit reads a competition's own download with flags only: tiny competitions in the forms of 40 real ones.

Names, folders and columns are those of the real ones; the images are small and plain. FORMS says which files there are,
which flags of 00 they take, and how 00 must understand them.
"""

import csv
import io
import json
import shlex
import tarfile
import zipfile
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from conftest import TINY, done, load, write_csv, write_zip
from PIL import Image
from test_sources import write_7z, write_tiff

from common import read_table
from kit.score import tasks
from kit.submit.submission import per_unit, read_tests


class Form(NamedTuple):
    files: str  # of the download, as far as the kit reads them
    flags: str  # of 00
    said: str  # its first line


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
        "11 labels in 11 columns, any number of them an image; submission: "
        "`StudyInstanceUID,ETT - Abnormal,ETT - Borderline,ETT - Norma…`, probability of each label; "
        "metric mean column AUC",
    ),
    "imet-2020-fgvc7": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric f2",
        "3 labels in column 'attribute_ids', any number of them an image; submission: `id,attribute_ids`, set; metric "
        "F2 of images",
    ),
    "human-protein-atlas-image-classification": Form(
        "train/ test/ train.csv sample_submission.csv",
        "--metric f1-labels --channels _red _green _blue",
        "3 labels in column 'Target', any number of them an image; submission: `Id,Predicted`, set; metric macro F1 of "
        "labels",
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
        "6 labels in 6 columns, any number of them an image; submission: `ID,Label`, probability of each label; metric "
        "mean column log loss",
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
        "4 labels in column 'categories', any number of them an image; submission: `id,categories,osd`, top; metric "
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
        "train.zip.001 train.zip.002 test.zip trainLabels.csv sampleSubmission.csv",
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


# ---------------------------------------------------------------- the competitions


class Drawn(NamedTuple):
    """What is right: {name: target} of the training and the test images (a label, a tuple of labels or of numbers), and
    the submission's rows if all predictions are perfect."""

    train: dict
    tests: dict
    rows: list
    separator: str = ","


class Room:
    """The folder of a competition, and what is written there. The target decides an image's colour."""

    def __init__(self, folder):
        self.folder, self.rng, self.colours = folder, np.random.default_rng(0), {}
        folder.mkdir()

    def colour(self, target, levels=None):
        """→ the image of a target, uint8 [24, 24, 3]; levels: of red, green and blue, 0 to 1 (default: the next of
        eight colours for a new target)."""
        if levels is None:
            number = self.colours.setdefault(target, len(self.colours)) % 8
            levels = [number + 1 >> bit & 1 for bit in range(3)]
        noise = self.rng.integers(0, 40, (24, 24, 3))
        return (noise + np.multiply(levels, 200)).astype(np.uint8)

    def image(self, ending, target, levels=None):
        file = io.BytesIO()
        kind = {".png": "PNG", ".tif": "TIFF", ".dcm": "PNG"}.get(ending, "JPEG")
        Image.fromarray(self.colour(target, levels)).save(file, kind)
        return file.getvalue()

    def images(self, place, targets, levels=None):
        """Writes an image for each {name: target} to `place`, such as train/{}.jpg. levels: a function of it."""
        for name, target in targets.items():
            path = place.format(name)
            self.file(path, self.image(path[path.rindex(".") :], target, levels and levels(target)))

    def file(self, path, content):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def packed(self, archive, write):
        """Packs the folder that bears the archive's name, as `write` does (path, {name: content}), and removes it."""
        path = self.folder / archive
        top = self.folder / archive.partition(".")[0]
        files = [file for file in sorted(top.rglob("*")) if file.is_file()]
        write(path, {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files})
        for file in files:
            file.unlink()

    def table(self, name, header, rows, **options):
        write_csv(self.folder / name, [header, *rows] if header else rows, **options)

    def tabs(self, name, rows):
        (self.folder / name).write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def dealt(names, targets, count):
    """→ {name: target} of `count` images, the targets in turn; `names` is a pattern, {:03} for one."""
    return {names.format(i): targets[i % len(targets)] for i in range(count)}


def shuffled(tests):
    """→ the test images in the sample's order, which isn't the files'."""
    return dict(sorted(tests.items(), key=lambda item: item[0][::-1]))


def marks(target, classes):
    """→ the cells of a class or a set of labels, a column for each."""
    return [str(int(c == target or (isinstance(target, tuple) and c in target))) for c in classes]


def rows_of(tests, cells):
    return [[name, *cells(target)] for name, target in tests.items()]


def simple(room, train_place, test_place, train, tests, header=None, sample="0", separator=","):
    """The commonest form, after the tables of training: an image and a label a row. → Drawn."""
    room.images(train_place, train)
    room.images(test_place, tests)
    tests = shuffled(tests)
    write = room.tabs if separator == "\t" else lambda name, rows: room.table(name, None, rows)
    name = "sample_submit" if header is None else "sample_submission"
    head = [header] if header else []
    write(f"{name}.{'tsv' if separator == chr(9) else 'csv'}", [*head, *([test, sample] for test in tests)])
    return Drawn(train, tests, [*head, *map(list, tests.items())], separator)


def by_column(room, header, tests, classes, sample, name="sample_submission.csv", more=()):
    """Writes a sample with a column for each class. → the rows if all predictions are perfect."""
    tests = shuffled(tests)
    room.table(name, header, [[test, *[sample] * len(classes), *more] for test in tests])
    return [header, *([test, *marks(target, classes), *more] for test, target in tests.items())]


def cassava_leaf_disease_classification(room):
    train, tests = dealt("{:04}157.jpg", ["0", "3", "4"], 24), dealt("{:03}948.jpg", ["4", "0"], 6)
    room.table("train.csv", ["image_id", "label"], train.items())
    room.file("label_num_to_disease_map.json", b'{"0": "Cassava Bacterial Blight (CBB)"}')
    return simple(room, "train_images/{}", "test_images/{}", train, tests, ["image_id", "label"], "4")


def dog_breed_identification(room):
    breeds = ["affenpinscher", "boston_bull", "yorkshire_terrier"]
    train, tests = dealt("{:03}bec180eb", breeds[::-1], 36), dealt("{:03}621fb3cb", breeds, 7)
    room.table("labels.csv", ["id", "breed"], train.items())
    for part, targets in dict(train=train, test=tests).items():
        room.images(part + "/{}.jpg", targets)
        room.packed(f"{part}.zip", write_zip)
    return Drawn(train, tests, by_column(room, ["id", *breeds], tests, breeds, "0.00833333333333"))


def plant_pathology_2020_fgvc7(room):
    classes = ["healthy", "multiple_diseases", "rust", "scab"]
    train, tests = dealt("Train_{}", classes, 24), dealt("Test_{}", classes, 11)
    room.images("images/{}.jpg", train | tests)
    room.table("train.csv", ["image_id", *classes], rows_of(train, lambda target: marks(target, classes)))
    room.table("test.csv", ["image_id"], [[name] for name in tests])
    return Drawn(train, tests, by_column(room, ["image_id", *classes], tests, classes, "0.25"))


TUBES = (
    "ETT - Abnormal,ETT - Borderline,ETT - Normal,NGT - Abnormal,NGT - Borderline,NGT - Incompletely Imaged,"
    "NGT - Normal,CVC - Abnormal,CVC - Borderline,CVC - Normal,Swan Ganz Catheter Present"
).split(",")
SETS = [(), (0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2)]  # of red, green and blue


def ranzcr_clip_catheter_line_classification(room):
    sets = [tuple(name for k, name in enumerate(TUBES) if k % 3 in chosen) for chosen in SETS]
    train, tests = (
        dealt("1.2.826.0.1.3680043.8.498.{:03}97", sets, 48),
        dealt("1.2.826.0.1.3680043.8.498.{}1", sets, 16),
    )
    levels = lambda target: [name in target for name in TUBES[:3]]  # noqa: E731
    room.images("train/{}.jpg", train, levels)
    room.images("test/{}.jpg", tests, levels)
    header = ["StudyInstanceUID", *TUBES]
    rows = [[*row, f"ec89415d{i // 2}"] for i, row in enumerate(rows_of(train, lambda target: marks(target, TUBES)))]
    room.table("train.csv", [*header, "PatientID"], rows)
    return Drawn(train, tests, by_column(room, header, tests, TUBES, "0"))


def sets_in_cells(room, train, tests, header, place, levels):
    """Sets of labels between blanks, a set out."""
    room.images(f"train/{place}", train, levels)
    room.images(f"test/{place}", tests, levels)
    tests = shuffled(tests)
    room.table("sample_submission.csv", header, [[name, "0 1 2"] for name in tests])
    return Drawn(train, tests, [header, *([name, " ".join(target)] for name, target in tests.items())])


def imet_2020_fgvc7(room):
    names = ["448", "782", "2429"]
    sets = [tuple(names[k] for k in chosen) for chosen in SETS]
    train, tests = dealt("{:04}40d66f", sets[1:], 56), dealt("{:03}11f01965", sets[1:], 14)
    cells = [[name, " ".join(target[::-1])] for name, target in train.items()]  # in any order
    room.table("train.csv", ["id", "attribute_ids"], cells)
    room.table("labels.csv", ["attribute_id", "attribute_name"], [["0", "country::afghanistan"]])
    levels = lambda target: [name in target for name in names]  # noqa: E731
    return sets_in_cells(room, train, tests, ["id", "attribute_ids"], "{}.png", levels)


def human_protein_atlas_image_classification(room):
    names = ["0", "7", "25"]
    sets = [tuple(names[k] for k in chosen) for chosen in SETS[1:]]
    train, tests = dealt("{:04}-bbaf-11e8", sets, 28), dealt("{:03}-bac2-11e8", sets, 7)
    room.table("train.csv", ["Id", "Target"], [[name, " ".join(target)] for name, target in train.items()])
    drawn = sets_in_cells(room, train, tests, ["Id", "Predicted"], "{}_red.png", lambda target: ["0" in target] * 3)
    for part, targets in dict(train=train, test=tests).items():
        for colour, label in dict(green="7", blue="25", yellow="0").items():
            room.images(part + "/{}_" + colour + ".png", targets, lambda target, label=label: [label in target] * 3)
    return drawn


def siim_isic_melanoma_classification(room):
    train, tests = dealt("ISIC_{:07}", ["0", "0", "1"], 36), dealt("ISIC_9{:06}", ["0", "1"], 6)
    meta = ["patient_id", "sex", "age_approx", "anatom_site_general_challenge"]
    rows = [
        [name, f"IP_{i // 2}", "male", "" if i % 3 else "45.0", "head/neck", "unknown", "benign", target]
        for i, (name, target) in enumerate(train.items())
    ]
    room.table("train.csv", ["image_name", *meta, "diagnosis", "benign_malignant", "target"], rows)
    room.table("test.csv", ["image_name", *meta], [[name, "IP_9", "female", "", "torso"] for name in tests])
    place = "jpeg/{}/{{}}.jpg"
    return simple(room, place.format("train"), place.format("test"), train, tests, ["image_name", "target"])


def petfinder_pawpularity_score(room):
    meta = "Subject Focus,Eyes,Face,Near,Action,Accessory,Group,Collage,Human,Occlusion,Info,Blur".split(",")
    train, tests = dealt("{:03}7de18844b", [(1.0,), (38.0,), (63.0,), (100.0,)], 24), dealt("{}8bae22", [(38.0,)], 5)
    room.table(
        "train.csv", ["Id", *meta, "Pawpularity"], [[n, *"010101010101", f"{p:.0f}"] for n, (p,) in train.items()]
    )
    room.images("train/{}.jpg", train)
    room.images("test/{}.jpg", tests)
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["Id", "Pawpularity"], [[name, "43.75"] for name in tests])
    return Drawn(train, tests, [["Id", "Pawpularity"], *([name, "38"] for name in tests)])


def state_farm_distracted_driver_detection(room):
    classes = [f"c{k}" for k in range(10)]
    train, tests = dealt("img_4{:04}.jpg", classes, 40), dealt("img_{}.jpg", classes[::-1], 12)
    for label in classes:
        room.images(f"imgs/train/{label}/{{}}", {name: own for name, own in train.items() if own == label})
    room.images("imgs/test/{}", tests)
    rows = [[f"p{i // 10:03}", target, name] for i, (name, target) in enumerate(train.items())]
    room.table("driver_imgs_list.csv", ["subject", "classname", "img"], rows)
    return Drawn(train, tests, by_column(room, ["img", *classes], tests, classes, "0.1"))


def dogs_vs_cats_redux_kernels_edition(room):
    kinds = {f"{kind}.{i}": kind for i in range(16) for kind in ("cat", "dog")}
    tests = dealt("{}", ["dog", "cat", "dog"], 12)
    for part, targets in dict(train=kinds, test=tests).items():
        room.images(part + "/{}.jpg", targets)
        room.packed(f"{part}.zip", write_zip)
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["id", "label"], [[name, "0.5"] for name in tests])
    rows = [["id", "label"], *([name, str(int(target == "dog"))] for name, target in tests.items())]
    return Drawn({f"train/{name}.jpg": kind for name, kind in kinds.items()}, tests, rows)


def in_folders(room, place, classes, count):
    """Images in the folders of their classes, in turn. → {path below the first folder: class}."""
    names = {f"{label}/{i:04}{place[-4:]}": label for i in range(count) for label in classes}
    room.images(place[:-4], names)
    return {f"{place.partition('/')[2][:-6]}{name}": label for name, label in names.items()}


def plant_seedlings_classification(room):
    species = ["Black-grass", "Common wheat", "Sugar beet"]
    train, tests = in_folders(room, "train/{}.png", species, 12), dealt("{:03}21e90e4.png", species[::-1], 8)
    return simple(room, "unused/{}", "test/{}", {}, tests, ["file", "species"], "Sugar beet")._replace(train=train)


def the_nature_conservancy_fisheries_monitoring(room):
    classes = "ALB BET DOL LAG NoF OTHER SHARK YFT".split()
    train, tests = in_folders(room, "train/{}.jpg", classes, 3), dealt("img_{:05}.jpg", classes, 9)
    room.packed("train.zip", write_zip)
    room.images("test_stg1/{}", tests)
    room.packed("test_stg1.zip", write_zip)
    train = {f"train/{name}": label for name, label in train.items()}
    return Drawn(train, tests, by_column(room, ["image", *classes], tests, classes, "0.125"))


def zindi_cgiar_wheat_rust(room):
    classes = ["leaf_rust", "stem_rust", "healthy_wheat"]
    train, tests = in_folders(room, "train/{}.JPG", classes, 4), dealt("{:03}I1Z6A", classes, 7)
    room.images("test/{}.jpg", tests)
    for part in ("train", "test"):
        room.packed(f"{part}.zip", write_zip)
    train = {f"train/{name}": label for name, label in train.items()}
    return Drawn(train, tests, by_column(room, ["ID", *classes], tests, classes, "0"))


def cassava_disease(room):
    classes = ["cbb", "cbsd", "cgm", "cmd", "healthy"]
    train, tests = in_folders(room, "train/train/{}.jpg", classes, 4), dealt("test-img-{}.jpg", classes, 8)
    room.images("test/test/0/{}", tests)
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["Category", "Id"], [["healthy", name] for name in tests])
    return Drawn(train, tests, [["Category", "Id"], *([target, name] for name, target in tests.items())])


def ranked(target, classes, most):
    """→ the target, then the other classes in order, as far as they are wanted."""
    return [target, *(c for c in sorted(classes) if c != target)][:most]


def humpback_whale_identification(room):
    rare = ["w_1287fbc", "w_4c2af8d", "w_98baff9"]  # one image each
    classes = ["new_whale", "w_f48451c", "w_7554f44", *rare, "w_1eafe46"]
    train = dealt("{:04}e88ab.jpg", ["new_whale", "w_f48451c", "w_7554f44", "w_1eafe46"], 48)
    for target in classes:
        room.colour(target)
    train |= dict(zip(["a.jpg", "b.jpg", "c.jpg"], rare, strict=True))
    tests = dealt("{:03}28a005.jpg", ["w_1eafe46", "new_whale", "w_f48451c"], 9)
    room.table("train.csv", ["Image", "Id"], train.items())
    sample = "new_whale w_1287fbc w_98baff9 w_7554f44 w_1eafe46"
    drawn = simple(room, "train/{}", "test/{}", train, tests, ["Image", "Id"], sample)
    rows = [[name, " ".join(ranked(target, classes, 5))] for name, target in drawn.tests.items()]
    return drawn._replace(rows=[["Image", "Id"], *rows])


def zindi_turtle_recall(room):
    turtles = [f"t_id_{end}" for end in ("4ZfTUmwL", "8b8sfwiw", "9GFmcOd5", "D0Jyjs6j", "VP4NW7aO", "ksTLswDT")]
    train, tests = dealt("ID_M{:02}WYAY4", turtles, 24), dealt("ID_{}6QEUB6", turtles, 7)
    room.images("images/{}.JPG", train | tests)
    room.packed("images.tar", write_tar)
    rows = [[name, "left", target] for name, target in train.items()]
    room.table("train.csv", ["image_id", "image_location", "turtle_id"], rows)
    header = ["image_id", *(f"prediction{k}" for k in range(1, 6))]
    tests = shuffled(tests)
    room.table("SampleSubmission.csv", header, [[name, *turtles[:5]] for name in tests])
    return Drawn(train, tests, [header, *rows_of(tests, lambda target: ranked(target, turtles, 5))])


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def numbers(count, seed):
    """→ `count` triples of numbers of quarters, from 0 to 8."""
    return [tuple(row) for row in np.random.default_rng(seed).integers(0, 33, (count, 3)) / 4]


def levels_of(triple):
    return [0 if np.isnan(value) else value / 8 for value in triple]


def csiro_biomass(room):
    kinds = ["Dry_Clover_g", "Dry_Dead_g", "GDM_g"]
    header = "sample_id image_path Sampling_Date State Species Pre_GSHH_NDVI Height_Ave_cm target_name target".split()
    train = dict(zip((f"ID10{i:02}" for i in range(80)), numbers(80, 0), strict=True))
    train["ID1003"] = (2.5, np.nan, 1.0)  # has no row for Dry_Dead_g
    tests = dict(zip((f"ID9{i}" for i in range(10)), numbers(10, 1), strict=True))
    room.images("train/{}.jpg", train, levels_of)
    room.images("test/{}.jpg", tests, levels_of)
    meta = ["2015/9/4", "Tas", "Ryegrass_Clover", "0.62", "4.6667"]
    rows = [
        [f"{name}__{kind}", f"train/{name}.jpg", *meta, kind, value]
        for name, triple in train.items()
        for kind, value in zip(kinds, triple, strict=True)
        if not np.isnan(value)
    ]
    room.table("train.csv", header, rows)
    asked = [(name, kind) for kind in reversed(kinds) for name in tests]  # not image by image
    room.table("test.csv", ["sample_id", "image_path", "target_name"],
        [[f"{name}__{kind}", f"test/{name}.jpg", kind] for name, kind in sorted(asked)])  # fmt: skip
    room.table("sample_submission.csv", ["sample_id", "target"], [[f"{name}__{kind}", "0.0"] for name, kind in asked])
    rows = [[f"{name}__{kind}", f"{tests[name][kinds.index(kind)]:g}"] for name, kind in asked]
    train, tests = ({f"{part}/{n}.jpg": t for n, t in of.items()} for part, of in (("train", train), ("test", tests)))
    return Drawn(train, tests, [["sample_id", "target"], *rows])


def rsna_intracranial_hemorrhage_detection(room):
    kinds = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]
    sets = [
        (),
        ("epidural", "any"),
        ("intraparenchymal", "subdural", "any"),
        ("intraventricular", "subarachnoid", "any"),
    ]
    train, tests = dealt("ID_{:03}3f7d", sets, 24), dealt("ID_{}fbab7eb", sets, 6)
    room.images("stage_2_train/{}.dcm", train)
    room.images("stage_2_test/{}.dcm", tests)
    rows = [[f"{name}_{kind}", int(kind in target)] for name, target in train.items() for kind in kinds]
    room.table("stage_2_train.csv", ["ID", "Label"], [*rows, *rows[:6]])  # some rows are there twice
    tests = shuffled(tests)
    asked = [(name, kind) for name in tests for kind in kinds]
    room.table("stage_2_sample_submission.csv", ["ID", "Label"], [[f"{name}_{kind}", "0.5"] for name, kind in asked])
    rows = [[f"{name}_{kind}", str(int(kind in tests[name]))] for name, kind in asked]
    return Drawn(train, tests, [["ID", "Label"], *rows])


def signate(room, header, rows, train, tests, sample, ending=".jpg", separator=","):
    """SIGNATE's house form: tabs in, a submission without header."""
    drawn = simple(room, "train/{}", "test/{}", train, tests, None, sample, separator)
    for part in ("train", "test"):
        room.packed(f"{part}.zip", write_zip)
    room.tabs("train_master.tsv", [header, *rows])
    return drawn


def signate_404_expressions(room):
    classes = ["angry", "happy", "neutral", "sad"]
    train, tests = dealt("train_{:04}.jpg", classes, 48), dealt("test_{:04}.jpg", classes[::-1], 9)
    rows = [[name, f"an{i // 4}i", "left", target, "open"] for i, (name, target) in enumerate(train.items())]
    return signate(room, ["file_name", "user", "pose", "expression", "eyes"], rows, train, tests, "neutral")


def signate_printed_circuit_boards(room):
    train, tests = dealt("train_{:04}.jpeg", ["0", "1"], 20), dealt("test_{:04}.jpeg", ["1", "0", "0"], 6)
    return signate(room, ["file_name", "flag"], train.items(), train, tests, "1", separator="\t")


def jsai_cup_2018(room):
    train, tests = dealt("train_{}.jpg", ["0", "10", "9"], 20), dealt("test_{}.jpg", ["10", "9", "0"], 6)
    room.tabs("master.tsv", [["apple", "0"]])
    return signate(room, ["file_name", "category_id"], train.items(), train, tests, "0", separator="\t")


def cookpad_recipe_images(room):
    train, tests = dealt("train_{:05}.jpg", ["0", "24", "5"], 18), dealt("test_{:05}.jpg", ["24", "0"], 6)
    drawn = simple(room, "all/train/{}", "all/test/{}", train, tests, None, "0")
    for part, stem in dict(train="clf_train_images_labeled", test="clf_test_images").items():
        for i, file in enumerate(sorted((room.folder / "all" / part).iterdir())):
            room.file(f"{stem}_{1 + i % 2}/{file.name}", file.read_bytes())
            file.unlink()
    room.tabs("clf_train_master.tsv", [["file_name", "label_id"], *train.items()])
    return drawn


def signate_431_lemons(room):
    train, tests = dealt("train_{:04}.jpg", ["0", "1", "2", "3"], 24), dealt("test_{:04}.jpg", ["3", "0", "2"], 7)
    drawn = simple(room, "train_images/{}", "test_images/{}", train, tests)
    for part in ("train_images", "test_images"):
        room.packed(f"{part}.zip", write_zip)
    room.table("train_images.csv", ["id", "class_num"], train.items())
    room.table("test_images.csv", ["id"], [[name] for name in tests])
    return drawn


def mayo_clinic_strip_ai(room):
    patients = dealt("{:04}388", ["CE", "LAA", "LAA"], 24)
    test_patients = {"01f2b3": "LAA", "00c058": "CE", "0fe7": "CE"}
    images = {f"{name}_{k}": target for name, target in patients.items() for k in range(2)}
    tests = {f"{name}_{k}": target for name, target in test_patients.items() for k in range(1 + (name != "0fe7"))}
    room.images("train/{}.tif", images)
    room.images("test/{}.tif", tests)
    header = ["image_id", "center_id", "patient_id", "image_num"]
    rows = [[name, "11", *name.split("_"), target] for name, target in images.items()]
    room.table("train.csv", [*header, "label"], rows)
    room.table("test.csv", header, [[name, "11", *name.split("_")] for name in sorted(tests)])
    rows = by_column(room, ["patient_id", "CE", "LAA"], test_patients, ["CE", "LAA"], "0.5")
    return Drawn(images, tests, rows)


def atmacup_11(room):
    train = dealt("{:03}b09b09998d0be65", [(0.0,), (1.0,), (2.0,), (3.0,)], 60)
    tests = dealt("{:03}1d6be41612ec9eae3", [(2.0,), (3.0,), (0.0,)], 12)
    room.images("photos/{}.jpg", train | tests, lambda target: [target[0] / 3] * 3)
    room.packed("photos.zip", write_zip)
    rows = [[name, 1600, f"5093{i // 2}", f"{t:.0f}"] for i, (name, (t,)) in enumerate(train.items())]
    room.table("train.csv", ["object_id", "sorting_date", "art_series_id", "target"], rows)
    tests = shuffled(tests)
    room.table("test.csv", ["object_id"], [[name] for name in tests])
    room.table("sample_submission.csv", ["target"], [["1.5"] for _ in tests])
    return Drawn(train, tests, [["target"], *([f"{value:g}"] for (value,) in tests.values())])


def coco(room, path, images, categories=None):
    """Writes a COCO-like JSON: images {id: file name} and, of training images, {id: category}."""
    content = dict(images=[dict(id=i, file_name=name, width=678, license=0) for i, name in images.items()], info={})
    if categories:
        notes = [dict(id=n, image_id=i, category_id=int(c)) for n, (i, c) in enumerate(categories.items())]
        content |= dict(annotations=notes[::-1], categories=[dict(id=1, name="Abarema abbottii", family="Fabaceae")])
    room.file(path, json.dumps(content).encode())


def herbarium_2021_fgvc8(room):
    train = {1104500 + i: ["1", "20", "3"][i % 3] for i in range(18)} | {77: "10"}  # one image of 10
    tests = {8000 + i: ["3", "20"][i % 2] for i in range(6)}
    for part, targets in dict(train=train, test=tests).items():
        files = {i: f"images/{i % 3:03}/{i // 100:02}/{i}.jpg" for i in targets}
        coco(room, f"{part}/metadata.json", files, train if part == "train" else None)
        room.images(part + "/{}", {name: targets[i] for i, name in files.items()})
    tests = shuffled({str(i): target for i, target in tests.items()})
    room.table("sample_submission.csv", ["Id", "Predicted"], [[name, "0"] for name in tests])
    return Drawn({str(i): c for i, c in train.items()}, tests, [["Id", "Predicted"], *map(list, tests.items())])


def inaturalist_2019_fgvc6(room):
    """Ids are not the files' names."""
    train = {i: ["0", "100", "99"][i % 3] for i in range(18)}
    tests = {268243 + i: ["99", "0"][i % 2] for i in range(6)}
    names = {i: f"train_val2019/Plants/{c}/{i:03}d1322d.jpg" for i, c in train.items()}
    names |= {i: f"test2019/{i % 7}e2a1.jpg" for i in tests}
    room.images("{}", {names[i]: target for i, target in (train | tests).items()})
    for part in ("train_val2019", "test2019"):
        room.packed(f"{part}.tar.gz", lambda path, files: write_tar(path, files, "w:gz"))
    coco(room, "train2019.json", {i: names[i] for i in train}, train)
    coco(room, "test2019.json", {i: names[i] for i in tests})
    rows = [[str(i), tests[i]] for i in reversed(tests)]
    room.table("kaggle_sample_submission.csv", ["id", "predicted"], [[name, "0"] for name, _ in rows])
    train, tests = ({names[i]: target for i, target in part.items()} for part in (train, tests))
    return Drawn(train, tests, [["id", "predicted"], *rows])


def conser_vision(room):
    classes = "antelope_duiker bird blank civet_genet hog leopard monkey_prosimian rodent".split()
    train, tests = dealt("ZJ{:06}", classes, 32), dealt("ZJ9{:05}", classes[::-1], 9)
    for part, targets in dict(train=train, test=tests).items():
        room.images(part + "_features/{}.jpg", targets)
        rows = [[name, f"{part}_features/{name}.jpg", f"S{i // 4:04}"] for i, name in enumerate(targets)]
        room.table(f"{part}_features.csv", ["id", "filepath", "site"], rows[::-1])
    room.table("train_labels.csv", ["id", *classes], rows_of(train, lambda target: marks(target, classes)))
    return Drawn(train, tests, by_column(room, ["id", *classes], tests, classes, "0.125", "submission_format.csv"))


def landmark_recognition_2021(room):
    train, tests = dealt("{:03}60ef415d37059", ["1", "137790", "27"], 18), dealt("{:03}84cdf8f600d00", ["27", "1"], 6)
    room.table("train.csv", ["id", "landmark_id"], train.items())
    for part, targets in dict(train=train, test=tests).items():
        paths = {f"{part}/{n[0]}/{n[1]}/{n[2]}/{n}.jpg": target for n, target in targets.items()}
        room.images("{}", paths)
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["id", "landmarks"], [[name, "137790 0.1"] for name in tests])
    return Drawn(train, tests, [["id", "landmarks"], *([name, f"{target} 1"] for name, target in tests.items())])


def solafune_mining_sites(room):
    train, tests = dealt("train_{}.tif", ["0", "1", "0"], 24), dealt("evaluation_{}.tif", ["1", "0"], 6)
    for part, targets in dict(train=train, evaluation_images=tests).items():
        for name, target in targets.items():
            bands = room.rng.integers(0, 300, (32, 32, 12), np.uint16)
            bands[..., 3] += 2000 * int(target)
            room.file(f"{part}/{name}", write_tiff(bands))
    tests = shuffled(tests)
    room.table("answer.csv", None, train.items())
    room.table("uploadsample.csv", None, [[name, "0"] for name in tests])
    return Drawn(train, tests, [*map(list, tests.items())])


def classify_leaves(room):
    """Names with the folder's, which holds the images of both parts."""
    train = dealt("images/{}.jpg", ["abies_concolor", "ilex_opaca", "zelkova_serrata"], 18)
    tests = dealt("images/9{}.jpg", ["ilex_opaca", "abies_concolor"], 6)
    room.table("train.csv", ["image", "label"], train.items())
    return simple(room, "{}", "{}", train, tests, ["image", "label"], "abies_concolor")


def sorghum_id_fgvc_9(room):
    train, tests = dealt("2017-06-{:02}__1.png", ["PI_152651", "PI_19", "PI_8"], 18), dealt("{}.png", ["PI_8"], 5)
    room.table("train_cultivar_mapping.csv", ["image", "cultivar"], [[".DS_Store", ""], *train.items()])
    return simple(room, "train_images/{}", "test/{}", train, tests, ["filename", "cultivar"], "PI_152651")


def invasive_species_monitoring(room):
    train, tests = dealt("{}", ["0", "1", "1"], 18), dealt("{}", ["1", "0"], 6)
    drawn = simple(room, "train/{}.jpg", "test/{}.jpg", train, tests, ["name", "invasive"], "0.5")
    for part in ("train", "test"):
        room.packed(f"{part}.7z", write_7z)
    room.table("train_labels.csv", ["name", "invasive"], train.items())
    for name in ("train_labels.csv", "sample_submission.csv"):
        with zipfile.ZipFile(room.folder / f"{name}.zip", "w") as archive:
            archive.write(room.folder / name, name)
            archive.writestr(f"__MACOSX/._{name}", b"x")
        (room.folder / name).unlink()
    return drawn


def planttraits2024(room):
    traits = ["X4", "X11", "X18", "X26", "X50", "X3112"]
    train = {f"{19200 + i}": (*row, *(10 * np.array(row))) for i, row in enumerate(numbers(30, 0))}
    train["19203"] = (*train["19203"][:4], np.nan, 5.0)  # a blank cell
    tests = {f"{20100 + i}": (*row, *(10 * np.array(row))) for i, row in enumerate(numbers(6, 1))}
    room.images("train_images/{}.jpeg", train, lambda target: levels_of(target[:3]))
    room.images("test_images/{}.jpeg", tests, lambda target: levels_of(target[:3]))
    header = ["id", "WORLDCLIM_BIO1", *(f"{trait}_mean" for trait in traits), *(f"{trait}_sd" for trait in traits)]
    rows = [[n, 12.1, *("" if np.isnan(v) else v for v in row), *["" if i else 0.5] * 6] for i, (n, row) in
        enumerate(train.items())]  # fmt: skip
    room.table("train.csv", header, rows)
    room.table("test.csv", header[:2], [[name, 12.1] for name in tests])
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["id", *traits], [[name, *["1.0"] * 6] for name in tests])
    return Drawn(train, tests, [["id", *traits], *rows_of(tests, lambda row: [f"{value:g}" for value in row])])


def fathomnet_2023(room):
    """The column osd isn't predicted: it stays as in the sample."""
    classes = ["1", "2", "160", "230"]
    sets = [("1", "2"), ("160",), ("2", "230"), ("1", "160", "230")]
    train, tests = dealt("{:04}cd1-4d8e", sets, 16), dealt("{}a7b-41f2", sets, 6)
    room.images("train/{}.png", train)
    room.images("test/{}.png", tests)
    room.table("train.csv", ["id", "categories"], [[n, "[" + ", ".join(target) + "]"] for n, target in train.items()])
    tests = shuffled(tests)
    header = ["id", "categories", "osd"]
    room.table("sample_submission.csv", header, [[name, "1 2 160", f"0.{i}"] for i, name in enumerate(tests)])
    best = {name: [*target, *(c for c in classes if c not in target)][:3] for name, target in tests.items()}
    return Drawn(train, tests, [header, *([n, " ".join(b), f"0.{i}"] for i, (n, b) in enumerate(best.items()))])


def of_pixels(room, targets, header, cells):
    """A table with a row of grey pixels for each image, 8 × 8, and what `cells` says of its target."""
    rows = []
    for target in targets.values():
        grey = room.colour(target)[:8, :8].mean(axis=2).astype(int).ravel().tolist()
        rows.append([*cells(target), *(grey if len(header) > 3 else [" ".join(map(str, grey))])])
    return rows


def digit_recognizer(room):
    train, tests = dealt("{}", ["0", "1", "2", "3"], 24), dealt("{}", ["3", "1", "0"], 6)
    header = [f"pixel{i}" for i in range(64)]
    room.table("train.csv", ["label", *header], of_pixels(room, train, header, lambda target: [target]))
    room.table("test.csv", header, of_pixels(room, tests, header, lambda target: []))
    train, tests = ({str(i + 1): t for i, t in enumerate(part.values())} for part in (train, tests))
    room.table("sample_submission.csv", ["ImageId", "Label"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["ImageId", "Label"], *map(list, tests.items())])


def fer2013(room):
    train, tests = dealt("{}", ["0", "3", "6"], 24), dealt("{}", ["3", "0"], 6)
    room.table("train.csv", ["emotion", "pixels"], of_pixels(room, train, ["pixels"], lambda target: [target]))
    room.table("test.csv", ["pixels"], of_pixels(room, tests, ["pixels"], lambda target: []))
    train, tests = ({str(i + 1): t for i, t in enumerate(part.values())} for part in (train, tests))
    room.table("sample_submission.csv", ["id", "emotion"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["id", "emotion"], *map(list, tests.items())])


def diabetic_retinopathy_detection(room):
    grades = ["0", "1", "2", "3", "4"]
    train = {f"{i}_{side}": grades[i % 5] for i in range(10, 25) for side in ("left", "right")}
    tests = {f"{i}_{side}": grades[i % 3] for i in range(1, 4) for side in ("left", "right")}
    room.images("train/{}.jpeg", train)
    room.images("test/{}.jpeg", tests)
    for part in ("train", "test"):
        room.packed(f"{part}.zip", write_zip)
    whole = (room.folder / "train.zip").read_bytes()
    room.file("train.zip.001", whole[:5000])
    room.file("train.zip.002", whole[5000:])
    (room.folder / "train.zip").unlink()
    room.table("trainLabels.csv", ["image", "level"], train.items())
    tests = shuffled(tests)
    room.table("sampleSubmission.csv", ["image", "level"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["image", "level"], *map(list, tests.items())])


def aicrowd_car_rotation(room):
    sides = ["front", "back", "left", "right"]
    parts = dict(train=dealt("{}", sides, 24), val=dealt("9{:03}", sides, 8), test=dealt("7{:03}", sides, 6))
    for part, targets in parts.items():
        room.images(part + "/{}.jpg", targets)
        room.packed(f"{part}.zip", write_zip)
        if part != "test":
            room.table(f"{part}.csv", ["ImageID", "label"], targets.items())
    tests = shuffled(parts["test"])
    room.table("sample_submission.csv", ["ImageID", "label"], [[name, "front"] for name in tests])
    return Drawn(parts["train"] | parts["val"], tests, [["ImageID", "label"], *map(list, tests.items())])


def alaska2_image_steganalysis(room):
    kinds = ["Cover", "JMiPOD", "JUNIWARD", "UERD"]
    train = {f"{kind}/{i:05}.jpg": kind for i in range(1, 13) for kind in kinds}
    tests = dealt("{:04}.jpg", ["Cover", "UERD", "JMiPOD"], 6)
    room.images("{}", train)
    room.images("Test/{}", tests)
    tests = shuffled(tests)
    room.table("sample_submission.csv", ["Id", "Label"], [[name, "0"] for name in tests])
    rows = [[name, str(int(kind != "Cover"))] for name, kind in tests.items()]
    return Drawn(train, tests, [["Id", "Label"], *rows])


# ---------------------------------------------------------------- the tests


def draw(name, folder):
    """Draws a competition of FORMS. → (what is right, its --input and --output)."""
    room = Room(folder / "input")
    return globals()[name.replace("-", "_")](room), ["--input", room.folder, "--output", folder / "output"]


def targets_of(prepared, cells):
    """Targets as Drawn has them → as kit/score/tasks.py has them."""
    task, classes = prepared["task"], prepared["classes"]
    if task == "classes":
        return np.array([classes.index(cell) for cell in cells])
    if task == "labels":
        return np.array([[label in cell for label in classes] for cell in cells], np.float32)
    return np.array(cells, np.float32)


def text_of(rows, separator):
    return "".join(separator.join(row) + "\n" for row in rows)


def prepared_as(drawn, flags, form, folder):
    """Runs 00 and checks what it understood, then submits perfect predictions. → (prepared.json, the submission).
    Files that the form doesn't list are away."""
    for path in [*(folder / "input").iterdir()]:
        if path.name not in form.files.replace("/", "").split():
            path.rename(folder / path.name)
    assert {path.name for path in (folder / "input").iterdir()} == {*form.files.replace("/", "").split()}
    output = done("00_prepare.py", *flags, *QUICK, *shlex.split(form.flags)).splitlines()
    output = [line for line in output if not line.startswith("unpacking ")]
    assert form.said in output[:2], output[:2]  # a line on rows that are there twice may come first
    prepared = json.loads((folder / "output" / "prepared" / "prepared.json").read_text())
    folds = read_table(folder / "output" / "prepared" / "folds.csv", "", dtype=str)
    assert Counter(folds.image_name) == Counter([*drawn.train])
    expected = targets_of(prepared, [drawn.train[image] for image in folds.image_name])
    assert np.array_equal(tasks.read_targets(prepared, folds.target), expected, equal_nan=prepared["task"] == "numbers")
    assert ("--group" in form.flags) == (folds.group.nunique() < len(folds)), "two images or more are a group"
    table, layout = read_tests(folder / "output" / "prepared", "")
    assert Counter(table.image_name) == Counter([*drawn.tests]), "every test image is predicted once"
    truth = targets_of(prepared, [drawn.tests[image] for image in table.image_name])
    predictions = per_unit(tasks.perfect(prepared, truth), table.unit, "mean")
    load("03_infer.py").write_submission(folder / "perfect.csv", layout, predictions, prepared)
    return prepared, (folder / "perfect.csv").read_text()


@pytest.mark.parametrize("name", FORMS)
def test_it_is_understood_and_perfect_predictions_are_submitted_as_they_should(name, tmp_path):
    drawn, flags = draw(name, tmp_path)
    prepared, written = prepared_as(drawn, flags, FORMS[name], tmp_path)
    assert written == text_of(drawn.rows, drawn.separator)
    if name in TRAINED:
        check_trained(drawn, flags, prepared, tmp_path / "output" / "base")


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "dog-breed-identification": "id,affenpinscher,boston_bull,yorkshire_terrier",
        "petfinder-pawpularity-score": "Id,Pawpularity",
        "cassava-leaf-disease-classification": "image_id,label",
    }.items(),
)
def test_further_columns_of_the_sample_stay_as_they_are(name, said, tmp_path):
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
    said = form.said.replace(f"`{said}`", f"`{header if len(header) <= 60 else header[:60] + '…'}`")
    assert prepared_as(drawn, flags, form._replace(said=said), tmp_path)[1] == text_of(drawn.rows, ",")


def check_trained(drawn, flags, prepared, folder):
    """A tiny model learns the plain images, and its submission says nearly what perfect predictions say."""
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
        for place, cells in enumerate(zip(row, expected, strict=True)):
            if place in values and (number or not headed):
                pairs.append(cells)
            else:
                assert cells[0] == cells[1], "all but the predictions stays as in the sample"
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
