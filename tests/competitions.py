"""Tiny competitions in the forms of 40 real ones: a function for each draws it, for test_formats.py.

Names, folders and columns are those of the real competitions; the images are small and plain.
"""

import io
import json
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np
from conftest import write_csv, write_zip
from PIL import Image
from test_sources import write_7z, write_tiff


class Drawn(NamedTuple):
    """What is right in a drawn competition."""

    train: dict  # name of an image → target: a label, a tuple of labels or of numbers
    tests: dict
    rows: list  # of the submission, if all predictions are perfect
    separator: str = ","


class Download:
    """A competition's download: writes its files into a folder. An image's colour shows its target."""

    def __init__(self, folder):
        self.folder, self.rng, self.colours = folder, np.random.default_rng(0), {}
        folder.mkdir()

    def colour(self, target, levels=None):
        """Returns the image of a target, uint8 [24, 24, 3]. levels: of red, green and blue, 0 to 1; by default, one of
        eight colours in turn."""
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

    def images(self, pattern, targets, levels=None):
        """Writes an image for each {name: target} to `pattern`, such as train/{}.jpg. levels: a function of the
        target."""
        for name, target in targets.items():
            path = pattern.format(name)
            self.file(path, self.image(path[path.rindex(".") :], target, levels and levels(target)))

    def file(self, path, content):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def packed(self, archive, write):
        """Packs the folder of the archive's name by `write`, a function (path, {name: content}), and removes it."""
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


def in_turn(names, targets, count):
    """→ {name: target} of `count` images, the targets in turn; names: a pattern such as {:03}.jpg."""
    return {names.format(i): targets[i % len(targets)] for i in range(count)}


def shuffled(tests):
    """→ the test images in the sample's order, which isn't the files'."""
    return dict(sorted(tests.items(), key=lambda item: item[0][::-1]))


def marks(target, classes):
    """→ the cells of a class or a set of labels, a column for each."""
    return [str(int(c == target or (isinstance(target, tuple) and c in target))) for c in classes]


def rows_of(tests, cells):
    return [[name, *cells(target)] for name, target in tests.items()]


def simple(download, train_pattern, test_pattern, train, tests, header=None, sample="0", separator=","):
    """Writes the images, and the commonest sample: an image and a label in each row. → Drawn."""
    download.images(train_pattern, train)
    download.images(test_pattern, tests)
    tests = shuffled(tests)
    write = download.tabs if separator == "\t" else lambda name, rows: download.table(name, None, rows)
    name = "sample_submit" if header is None else "sample_submission"
    head = [header] if header else []
    write(f"{name}.{'tsv' if separator == chr(9) else 'csv'}", [*head, *([test, sample] for test in tests)])
    return Drawn(train, tests, [*head, *map(list, tests.items())], separator)


def by_column(download, header, tests, classes, sample, name="sample_submission.csv", more=()):
    """Writes a sample with a column for each class. → the rows if all predictions are perfect."""
    tests = shuffled(tests)
    download.table(name, header, [[test, *[sample] * len(classes), *more] for test in tests])
    return [header, *([test, *marks(target, classes), *more] for test, target in tests.items())]


def cassava_leaf_disease_classification(download):
    train, tests = in_turn("{:04}157.jpg", ["0", "3", "4"], 24), in_turn("{:03}948.jpg", ["4", "0"], 6)
    download.table("train.csv", ["image_id", "label"], train.items())
    download.file("label_num_to_disease_map.json", b'{"0": "Cassava Bacterial Blight (CBB)"}')
    return simple(download, "train_images/{}", "test_images/{}", train, tests, ["image_id", "label"], "4")


def dog_breed_identification(download):
    breeds = ["affenpinscher", "boston_bull", "yorkshire_terrier"]
    train, tests = in_turn("{:03}bec180eb", breeds[::-1], 36), in_turn("{:03}621fb3cb", breeds, 7)
    download.table("labels.csv", ["id", "breed"], train.items())
    for part, targets in dict(train=train, test=tests).items():
        download.images(part + "/{}.jpg", targets)
        download.packed(f"{part}.zip", write_zip)
    return Drawn(train, tests, by_column(download, ["id", *breeds], tests, breeds, "0.00833333333333"))


def plant_pathology_2020_fgvc7(download):
    classes = ["healthy", "multiple_diseases", "rust", "scab"]
    train, tests = in_turn("Train_{}", classes, 24), in_turn("Test_{}", classes, 11)
    download.images("images/{}.jpg", train | tests)
    download.table("train.csv", ["image_id", *classes], rows_of(train, lambda target: marks(target, classes)))
    download.table("test.csv", ["image_id"], [[name] for name in tests])
    return Drawn(train, tests, by_column(download, ["image_id", *classes], tests, classes, "0.25"))


TUBES = (
    "ETT - Abnormal,ETT - Borderline,ETT - Normal,NGT - Abnormal,NGT - Borderline,NGT - Incompletely Imaged,"
    "NGT - Normal,CVC - Abnormal,CVC - Borderline,CVC - Normal,Swan Ganz Catheter Present"
).split(",")
SETS = [(), (0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2)]  # of red, green and blue


def ranzcr_clip_catheter_line_classification(download):
    sets = [tuple(name for k, name in enumerate(TUBES) if k % 3 in chosen) for chosen in SETS]
    train, tests = (
        in_turn("1.2.826.0.1.3680043.8.498.{:03}97", sets, 48),
        in_turn("1.2.826.0.1.3680043.8.498.{}1", sets, 16),
    )
    levels = lambda target: [name in target for name in TUBES[:3]]  # noqa: E731
    download.images("train/{}.jpg", train, levels)
    download.images("test/{}.jpg", tests, levels)
    header = ["StudyInstanceUID", *TUBES]
    rows = [[*row, f"ec89415d{i // 2}"] for i, row in enumerate(rows_of(train, lambda target: marks(target, TUBES)))]
    download.table("train.csv", [*header, "PatientID"], rows)
    return Drawn(train, tests, by_column(download, header, tests, TUBES, "0"))


def sets_in_cells(download, train, tests, header, place, levels):
    """Sets of labels between blanks, a set out."""
    download.images(f"train/{place}", train, levels)
    download.images(f"test/{place}", tests, levels)
    tests = shuffled(tests)
    download.table("sample_submission.csv", header, [[name, "0 1 2"] for name in tests])
    return Drawn(train, tests, [header, *([name, " ".join(target)] for name, target in tests.items())])


def imet_2020_fgvc7(download):
    names = ["448", "782", "2429"]
    sets = [tuple(names[k] for k in chosen) for chosen in SETS]
    train, tests = in_turn("{:04}40d66f", sets[1:], 56), in_turn("{:03}11f01965", sets[1:], 14)
    cells = [[name, " ".join(target[::-1])] for name, target in train.items()]  # in any order
    download.table("train.csv", ["id", "attribute_ids"], cells)
    download.table("labels.csv", ["attribute_id", "attribute_name"], [["0", "country::afghanistan"]])
    levels = lambda target: [name in target for name in names]  # noqa: E731
    return sets_in_cells(download, train, tests, ["id", "attribute_ids"], "{}.png", levels)


def human_protein_atlas_image_classification(download):
    names = ["0", "7", "25"]
    sets = [tuple(names[k] for k in chosen) for chosen in SETS[1:]]
    train, tests = in_turn("{:04}-bbaf-11e8", sets, 28), in_turn("{:03}-bac2-11e8", sets, 7)
    download.table("train.csv", ["Id", "Target"], [[name, " ".join(target)] for name, target in train.items()])
    drawn = sets_in_cells(download, train, tests, ["Id", "Predicted"], "{}_red.png", lambda target: ["0" in target] * 3)
    for part, targets in dict(train=train, test=tests).items():
        for colour, label in dict(green="7", blue="25", yellow="0").items():
            download.images(part + "/{}_" + colour + ".png", targets, lambda target, label=label: [label in target] * 3)
    return drawn


def siim_isic_melanoma_classification(download):
    train, tests = in_turn("ISIC_{:07}", ["0", "0", "1"], 36), in_turn("ISIC_9{:06}", ["0", "1"], 6)
    meta = ["patient_id", "sex", "age_approx", "anatom_site_general_challenge"]
    rows = [
        [name, f"IP_{i // 2}", "male", "" if i % 3 else "45.0", "head/neck", "unknown", "benign", target]
        for i, (name, target) in enumerate(train.items())
    ]
    download.table("train.csv", ["image_name", *meta, "diagnosis", "benign_malignant", "target"], rows)
    download.table("test.csv", ["image_name", *meta], [[name, "IP_9", "female", "", "torso"] for name in tests])
    place = "jpeg/{}/{{}}.jpg"
    return simple(download, place.format("train"), place.format("test"), train, tests, ["image_name", "target"])


def petfinder_pawpularity_score(download):
    meta = "Subject Focus,Eyes,Face,Near,Action,Accessory,Group,Collage,Human,Occlusion,Info,Blur".split(",")
    train, tests = (
        in_turn("{:03}7de18844b", [(1.0,), (38.0,), (63.0,), (100.0,)], 24),
        in_turn("{}8bae22", [(38.0,)], 5),
    )
    download.table(
        "train.csv", ["Id", *meta, "Pawpularity"], [[n, *"010101010101", f"{p:.0f}"] for n, (p,) in train.items()]
    )
    download.images("train/{}.jpg", train)
    download.images("test/{}.jpg", tests)
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["Id", "Pawpularity"], [[name, "43.75"] for name in tests])
    return Drawn(train, tests, [["Id", "Pawpularity"], *([name, "38"] for name in tests)])


def state_farm_distracted_driver_detection(download):
    classes = [f"c{k}" for k in range(10)]
    train, tests = in_turn("img_4{:04}.jpg", classes, 40), in_turn("img_{}.jpg", classes[::-1], 12)
    for label in classes:
        download.images(f"imgs/train/{label}/{{}}", {name: own for name, own in train.items() if own == label})
    download.images("imgs/test/{}", tests)
    rows = [[f"p{i // 10:03}", target, name] for i, (name, target) in enumerate(train.items())]
    download.table("driver_imgs_list.csv", ["subject", "classname", "img"], rows)
    return Drawn(train, tests, by_column(download, ["img", *classes], tests, classes, "0.1"))


def dogs_vs_cats_redux_kernels_edition(download):
    kinds = {f"{kind}.{i}": kind for i in range(16) for kind in ("cat", "dog")}
    tests = in_turn("{}", ["dog", "cat", "dog"], 12)
    for part, targets in dict(train=kinds, test=tests).items():
        download.images(part + "/{}.jpg", targets)
        download.packed(f"{part}.zip", write_zip)
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["id", "label"], [[name, "0.5"] for name in tests])
    rows = [["id", "label"], *([name, str(int(target == "dog"))] for name, target in tests.items())]
    return Drawn({f"train/{name}.jpg": kind for name, kind in kinds.items()}, tests, rows)


def in_folders(download, place, classes, count):
    """Images in the folders of their classes, in turn. → {path below the first folder: class}."""
    names = {f"{label}/{i:04}{place[-4:]}": label for i in range(count) for label in classes}
    download.images(place[:-4], names)
    return {f"{place.partition('/')[2][:-6]}{name}": label for name, label in names.items()}


def plant_seedlings_classification(download):
    species = ["Black-grass", "Common wheat", "Sugar beet"]
    train, tests = in_folders(download, "train/{}.png", species, 12), in_turn("{:03}21e90e4.png", species[::-1], 8)
    return simple(download, "unused/{}", "test/{}", {}, tests, ["file", "species"], "Sugar beet")._replace(train=train)


def the_nature_conservancy_fisheries_monitoring(download):
    classes = "ALB BET DOL LAG NoF OTHER SHARK YFT".split()
    train, tests = in_folders(download, "train/{}.jpg", classes, 3), in_turn("img_{:05}.jpg", classes, 9)
    download.packed("train.zip", write_zip)
    download.images("test_stg1/{}", tests)
    download.packed("test_stg1.zip", write_zip)
    train = {f"train/{name}": label for name, label in train.items()}
    return Drawn(train, tests, by_column(download, ["image", *classes], tests, classes, "0.125"))


def zindi_cgiar_wheat_rust(download):
    classes = ["leaf_rust", "stem_rust", "healthy_wheat"]
    train, tests = in_folders(download, "train/{}.JPG", classes, 4), in_turn("{:03}I1Z6A", classes, 7)
    download.images("test/{}.jpg", tests)
    for part in ("train", "test"):
        download.packed(f"{part}.zip", write_zip)
    train = {f"train/{name}": label for name, label in train.items()}
    return Drawn(train, tests, by_column(download, ["ID", *classes], tests, classes, "0"))


def cassava_disease(download):
    classes = ["cbb", "cbsd", "cgm", "cmd", "healthy"]
    train, tests = in_folders(download, "train/train/{}.jpg", classes, 4), in_turn("test-img-{}.jpg", classes, 8)
    download.images("test/test/0/{}", tests)
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["Category", "Id"], [["healthy", name] for name in tests])
    return Drawn(train, tests, [["Category", "Id"], *([target, name] for name, target in tests.items())])


def ranked(target, classes, most):
    """→ the target, then the other classes in order, as far as they are wanted."""
    return [target, *(c for c in sorted(classes) if c != target)][:most]


def humpback_whale_identification(download):
    rare = ["w_1287fbc", "w_4c2af8d", "w_98baff9"]  # one image each
    classes = ["new_whale", "w_f48451c", "w_7554f44", *rare, "w_1eafe46"]
    train = in_turn("{:04}e88ab.jpg", ["new_whale", "w_f48451c", "w_7554f44", "w_1eafe46"], 48)
    for target in classes:
        download.colour(target)
    train |= dict(zip(["a.jpg", "b.jpg", "c.jpg"], rare, strict=True))
    tests = in_turn("{:03}28a005.jpg", ["w_1eafe46", "new_whale", "w_f48451c"], 9)
    download.table("train.csv", ["Image", "Id"], train.items())
    sample = "new_whale w_1287fbc w_98baff9 w_7554f44 w_1eafe46"
    drawn = simple(download, "train/{}", "test/{}", train, tests, ["Image", "Id"], sample)
    rows = [[name, " ".join(ranked(target, classes, 5))] for name, target in drawn.tests.items()]
    return drawn._replace(rows=[["Image", "Id"], *rows])


def zindi_turtle_recall(download):
    turtles = [f"t_id_{end}" for end in ("4ZfTUmwL", "8b8sfwiw", "9GFmcOd5", "D0Jyjs6j", "VP4NW7aO", "ksTLswDT")]
    train, tests = in_turn("ID_M{:02}WYAY4", turtles, 24), in_turn("ID_{}6QEUB6", turtles, 7)
    download.images("images/{}.JPG", train | tests)
    download.packed("images.tar", write_tar)
    rows = [[name, "left", target] for name, target in train.items()]
    download.table("train.csv", ["image_id", "image_location", "turtle_id"], rows)
    header = ["image_id", *(f"prediction{k}" for k in range(1, 6))]
    tests = shuffled(tests)
    download.table("SampleSubmission.csv", header, [[name, *turtles[:5]] for name in tests])
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


def csiro_biomass(download):
    kinds = ["Dry_Clover_g", "Dry_Dead_g", "GDM_g"]
    header = "sample_id image_path Sampling_Date State Species Pre_GSHH_NDVI Height_Ave_cm target_name target".split()
    train = dict(zip((f"ID10{i:02}" for i in range(80)), numbers(80, 0), strict=True))
    train["ID1003"] = (2.5, np.nan, 1.0)  # has no row for Dry_Dead_g
    tests = dict(zip((f"ID9{i}" for i in range(10)), numbers(10, 1), strict=True))
    download.images("train/{}.jpg", train, levels_of)
    download.images("test/{}.jpg", tests, levels_of)
    meta = ["2015/9/4", "Tas", "Ryegrass_Clover", "0.62", "4.6667"]
    rows = [
        [f"{name}__{kind}", f"train/{name}.jpg", *meta, kind, value]
        for name, triple in train.items()
        for kind, value in zip(kinds, triple, strict=True)
        if not np.isnan(value)
    ]
    download.table("train.csv", header, rows)
    pairs = [(name, kind) for kind in reversed(kinds) for name in tests]  # not image by image
    download.table("test.csv", ["sample_id", "image_path", "target_name"],
        [[f"{name}__{kind}", f"test/{name}.jpg", kind] for name, kind in sorted(pairs)])  # fmt: skip
    download.table(
        "sample_submission.csv", ["sample_id", "target"], [[f"{name}__{kind}", "0.0"] for name, kind in pairs]
    )
    rows = [[f"{name}__{kind}", f"{tests[name][kinds.index(kind)]:g}"] for name, kind in pairs]
    train, tests = ({f"{part}/{n}.jpg": t for n, t in of.items()} for part, of in (("train", train), ("test", tests)))
    return Drawn(train, tests, [["sample_id", "target"], *rows])


def rsna_intracranial_hemorrhage_detection(download):
    kinds = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]
    sets = [
        (),
        ("epidural", "any"),
        ("intraparenchymal", "subdural", "any"),
        ("intraventricular", "subarachnoid", "any"),
    ]
    train, tests = in_turn("ID_{:03}3f7d", sets, 24), in_turn("ID_{}fbab7eb", sets, 6)
    download.images("stage_2_train/{}.dcm", train)
    download.images("stage_2_test/{}.dcm", tests)
    rows = [[f"{name}_{kind}", int(kind in target)] for name, target in train.items() for kind in kinds]
    download.table("stage_2_train.csv", ["ID", "Label"], [*rows, *rows[:6]])  # some rows are there twice
    tests = shuffled(tests)
    pairs = [(name, kind) for name in tests for kind in kinds]
    download.table(
        "stage_2_sample_submission.csv", ["ID", "Label"], [[f"{name}_{kind}", "0.5"] for name, kind in pairs]
    )
    rows = [[f"{name}_{kind}", str(int(kind in tests[name]))] for name, kind in pairs]
    return Drawn(train, tests, [["ID", "Label"], *rows])


def signate(download, header, rows, train, tests, sample, ending=".jpg", separator=","):
    """SIGNATE's house form: tabs in, a submission without header."""
    drawn = simple(download, "train/{}", "test/{}", train, tests, None, sample, separator)
    for part in ("train", "test"):
        download.packed(f"{part}.zip", write_zip)
    download.tabs("train_master.tsv", [header, *rows])
    return drawn


def signate_404_expressions(download):
    classes = ["angry", "happy", "neutral", "sad"]
    train, tests = in_turn("train_{:04}.jpg", classes, 48), in_turn("test_{:04}.jpg", classes[::-1], 9)
    rows = [[name, f"an{i // 4}i", "left", target, "open"] for i, (name, target) in enumerate(train.items())]
    return signate(download, ["file_name", "user", "pose", "expression", "eyes"], rows, train, tests, "neutral")


def signate_printed_circuit_boards(download):
    train, tests = in_turn("train_{:04}.jpeg", ["0", "1"], 20), in_turn("test_{:04}.jpeg", ["1", "0", "0"], 6)
    return signate(download, ["file_name", "flag"], train.items(), train, tests, "1", separator="\t")


def jsai_cup_2018(download):
    train, tests = in_turn("train_{}.jpg", ["0", "10", "9"], 20), in_turn("test_{}.jpg", ["10", "9", "0"], 6)
    download.tabs("master.tsv", [["apple", "0"]])
    return signate(download, ["file_name", "category_id"], train.items(), train, tests, "0", separator="\t")


def cookpad_recipe_images(download):
    train, tests = in_turn("train_{:05}.jpg", ["0", "24", "5"], 18), in_turn("test_{:05}.jpg", ["24", "0"], 6)
    drawn = simple(download, "all/train/{}", "all/test/{}", train, tests, None, "0")
    for part, stem in dict(train="clf_train_images_labeled", test="clf_test_images").items():
        for i, file in enumerate(sorted((download.folder / "all" / part).iterdir())):
            download.file(f"{stem}_{1 + i % 2}/{file.name}", file.read_bytes())
            file.unlink()
    download.tabs("clf_train_master.tsv", [["file_name", "label_id"], *train.items()])
    return drawn


def signate_431_lemons(download):
    train, tests = in_turn("train_{:04}.jpg", ["0", "1", "2", "3"], 24), in_turn("test_{:04}.jpg", ["3", "0", "2"], 7)
    drawn = simple(download, "train_images/{}", "test_images/{}", train, tests)
    for part in ("train_images", "test_images"):
        download.packed(f"{part}.zip", write_zip)
    download.table("train_images.csv", ["id", "class_num"], train.items())
    download.table("test_images.csv", ["id"], [[name] for name in tests])
    return drawn


def mayo_clinic_strip_ai(download):
    patients = in_turn("{:04}388", ["CE", "LAA", "LAA"], 24)
    test_patients = {"01f2b3": "LAA", "00c058": "CE", "0fe7": "CE"}
    images = {f"{name}_{k}": target for name, target in patients.items() for k in range(2)}
    tests = {f"{name}_{k}": target for name, target in test_patients.items() for k in range(1 + (name != "0fe7"))}
    download.images("train/{}.tif", images)
    download.images("test/{}.tif", tests)
    header = ["image_id", "center_id", "patient_id", "image_num"]
    rows = [[name, "11", *name.split("_"), target] for name, target in images.items()]
    download.table("train.csv", [*header, "label"], rows)
    download.table("test.csv", header, [[name, "11", *name.split("_")] for name in sorted(tests)])
    rows = by_column(download, ["patient_id", "CE", "LAA"], test_patients, ["CE", "LAA"], "0.5")
    return Drawn(images, tests, rows)


def atmacup_11(download):
    train = in_turn("{:03}b09b09998d0be65", [(0.0,), (1.0,), (2.0,), (3.0,)], 60)
    tests = in_turn("{:03}1d6be41612ec9eae3", [(2.0,), (3.0,), (0.0,)], 12)
    download.images("photos/{}.jpg", train | tests, lambda target: [target[0] / 3] * 3)
    download.packed("photos.zip", write_zip)
    rows = [[name, 1600, f"5093{i // 2}", f"{t:.0f}"] for i, (name, (t,)) in enumerate(train.items())]
    download.table("train.csv", ["object_id", "sorting_date", "art_series_id", "target"], rows)
    tests = shuffled(tests)
    download.table("test.csv", ["object_id"], [[name] for name in tests])
    download.table("sample_submission.csv", ["target"], [["1.5"] for _ in tests])
    return Drawn(train, tests, [["target"], *([f"{value:g}"] for (value,) in tests.values())])


def coco(download, path, images, categories=None):
    """Writes a COCO-like JSON: images {id: file name} and, of training images, {id: category}."""
    content = dict(images=[dict(id=i, file_name=name, width=678, license=0) for i, name in images.items()], info={})
    if categories:
        notes = [dict(id=n, image_id=i, category_id=int(c)) for n, (i, c) in enumerate(categories.items())]
        content |= dict(annotations=notes[::-1], categories=[dict(id=1, name="Abarema abbottii", family="Fabaceae")])
    download.file(path, json.dumps(content).encode())


def herbarium_2021_fgvc8(download):
    train = {1104500 + i: ["1", "20", "3"][i % 3] for i in range(18)} | {77: "10"}  # one image of 10
    tests = {8000 + i: ["3", "20"][i % 2] for i in range(6)}
    for part, targets in dict(train=train, test=tests).items():
        files = {i: f"images/{i % 3:03}/{i // 100:02}/{i}.jpg" for i in targets}
        coco(download, f"{part}/metadata.json", files, train if part == "train" else None)
        download.images(part + "/{}", {name: targets[i] for i, name in files.items()})
    tests = shuffled({str(i): target for i, target in tests.items()})
    download.table("sample_submission.csv", ["Id", "Predicted"], [[name, "0"] for name in tests])
    return Drawn({str(i): c for i, c in train.items()}, tests, [["Id", "Predicted"], *map(list, tests.items())])


def inaturalist_2019_fgvc6(download):
    """Ids are not the files' names."""
    train = {i: ["0", "100", "99"][i % 3] for i in range(18)}
    tests = {268243 + i: ["99", "0"][i % 2] for i in range(6)}
    names = {i: f"train_val2019/Plants/{c}/{i:03}d1322d.jpg" for i, c in train.items()}
    names |= {i: f"test2019/{i % 7}e2a1.jpg" for i in tests}
    download.images("{}", {names[i]: target for i, target in (train | tests).items()})
    for part in ("train_val2019", "test2019"):
        download.packed(f"{part}.tar.gz", lambda path, files: write_tar(path, files, "w:gz"))
    coco(download, "train2019.json", {i: names[i] for i in train}, train)
    coco(download, "test2019.json", {i: names[i] for i in tests})
    rows = [[str(i), tests[i]] for i in reversed(tests)]
    download.table("kaggle_sample_submission.csv", ["id", "predicted"], [[name, "0"] for name, _ in rows])
    train, tests = ({names[i]: target for i, target in part.items()} for part in (train, tests))
    return Drawn(train, tests, [["id", "predicted"], *rows])


def conser_vision(download):
    classes = "antelope_duiker bird blank civet_genet hog leopard monkey_prosimian rodent".split()
    train, tests = in_turn("ZJ{:06}", classes, 32), in_turn("ZJ9{:05}", classes[::-1], 9)
    for part, targets in dict(train=train, test=tests).items():
        download.images(part + "_features/{}.jpg", targets)
        rows = [[name, f"{part}_features/{name}.jpg", f"S{i // 4:04}"] for i, name in enumerate(targets)]
        download.table(f"{part}_features.csv", ["id", "filepath", "site"], rows[::-1])
    download.table("train_labels.csv", ["id", *classes], rows_of(train, lambda target: marks(target, classes)))
    return Drawn(train, tests, by_column(download, ["id", *classes], tests, classes, "0.125", "submission_format.csv"))


def landmark_recognition_2021(download):
    train, tests = (
        in_turn("{:03}60ef415d37059", ["1", "137790", "27"], 18),
        in_turn("{:03}84cdf8f600d00", ["27", "1"], 6),
    )
    download.table("train.csv", ["id", "landmark_id"], train.items())
    for part, targets in dict(train=train, test=tests).items():
        paths = {f"{part}/{n[0]}/{n[1]}/{n[2]}/{n}.jpg": target for n, target in targets.items()}
        download.images("{}", paths)
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["id", "landmarks"], [[name, "137790 0.1"] for name in tests])
    return Drawn(train, tests, [["id", "landmarks"], *([name, f"{target} 1"] for name, target in tests.items())])


def solafune_mining_sites(download):
    train, tests = in_turn("train_{}.tif", ["0", "1", "0"], 24), in_turn("evaluation_{}.tif", ["1", "0"], 6)
    for part, targets in dict(train=train, evaluation_images=tests).items():
        for name, target in targets.items():
            bands = download.rng.integers(0, 300, (32, 32, 12), np.uint16)
            bands[..., 3] += 2000 * int(target)
            download.file(f"{part}/{name}", write_tiff(bands))
    tests = shuffled(tests)
    download.table("answer.csv", None, train.items())
    download.table("uploadsample.csv", None, [[name, "0"] for name in tests])
    return Drawn(train, tests, [*map(list, tests.items())])


def classify_leaves(download):
    """Names with the folder's, which holds the images of both parts."""
    train = in_turn("images/{}.jpg", ["abies_concolor", "ilex_opaca", "zelkova_serrata"], 18)
    tests = in_turn("images/9{}.jpg", ["ilex_opaca", "abies_concolor"], 6)
    download.table("train.csv", ["image", "label"], train.items())
    return simple(download, "{}", "{}", train, tests, ["image", "label"], "abies_concolor")


def sorghum_id_fgvc_9(download):
    train, tests = in_turn("2017-06-{:02}__1.png", ["PI_152651", "PI_19", "PI_8"], 18), in_turn("{}.png", ["PI_8"], 5)
    download.table("train_cultivar_mapping.csv", ["image", "cultivar"], [[".DS_Store", ""], *train.items()])
    return simple(download, "train_images/{}", "test/{}", train, tests, ["filename", "cultivar"], "PI_152651")


def invasive_species_monitoring(download):
    train, tests = in_turn("{}", ["0", "1", "1"], 18), in_turn("{}", ["1", "0"], 6)
    drawn = simple(download, "train/{}.jpg", "test/{}.jpg", train, tests, ["name", "invasive"], "0.5")
    for part in ("train", "test"):
        download.packed(f"{part}.7z", write_7z)
    download.table("train_labels.csv", ["name", "invasive"], train.items())
    for name in ("train_labels.csv", "sample_submission.csv"):
        with zipfile.ZipFile(download.folder / f"{name}.zip", "w") as archive:
            archive.write(download.folder / name, name)
            archive.writestr(f"__MACOSX/._{name}", b"x")
        (download.folder / name).unlink()
    return drawn


def planttraits2024(download):
    traits = ["X4", "X11", "X18", "X26", "X50", "X3112"]
    train = {f"{19200 + i}": (*row, *(10 * np.array(row))) for i, row in enumerate(numbers(30, 0))}
    train["19203"] = (*train["19203"][:4], np.nan, 5.0)  # a blank cell
    tests = {f"{20100 + i}": (*row, *(10 * np.array(row))) for i, row in enumerate(numbers(6, 1))}
    download.images("train_images/{}.jpeg", train, lambda target: levels_of(target[:3]))
    download.images("test_images/{}.jpeg", tests, lambda target: levels_of(target[:3]))
    header = ["id", "WORLDCLIM_BIO1", *(f"{trait}_mean" for trait in traits), *(f"{trait}_sd" for trait in traits)]
    rows = [[n, 12.1, *("" if np.isnan(v) else v for v in row), *["" if i else 0.5] * 6] for i, (n, row) in
        enumerate(train.items())]  # fmt: skip
    download.table("train.csv", header, rows)
    download.table("test.csv", header[:2], [[name, 12.1] for name in tests])
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["id", *traits], [[name, *["1.0"] * 6] for name in tests])
    return Drawn(train, tests, [["id", *traits], *rows_of(tests, lambda row: [f"{value:g}" for value in row])])


def fathomnet_2023(download):
    """The column osd isn't predicted: it stays as in the sample."""
    classes = ["1", "2", "160", "230"]
    sets = [("1", "2"), ("160",), ("2", "230"), ("1", "160", "230")]
    train, tests = in_turn("{:04}cd1-4d8e", sets, 16), in_turn("{}a7b-41f2", sets, 6)
    download.images("train/{}.png", train)
    download.images("test/{}.png", tests)
    download.table(
        "train.csv", ["id", "categories"], [[n, "[" + ", ".join(target) + "]"] for n, target in train.items()]
    )
    tests = shuffled(tests)
    header = ["id", "categories", "osd"]
    download.table("sample_submission.csv", header, [[name, "1 2 160", f"0.{i}"] for i, name in enumerate(tests)])
    best = {name: [*target, *(c for c in classes if c not in target)][:3] for name, target in tests.items()}
    return Drawn(train, tests, [header, *([n, " ".join(b), f"0.{i}"] for i, (n, b) in enumerate(best.items()))])


def of_pixels(download, targets, header, cells):
    """A table with a row of grey pixels for each image, 8 × 8, and what `cells` says of its target."""
    rows = []
    for target in targets.values():
        grey = download.colour(target)[:8, :8].mean(axis=2).astype(int).ravel().tolist()
        rows.append([*cells(target), *(grey if len(header) > 3 else [" ".join(map(str, grey))])])
    return rows


def digit_recognizer(download):
    train, tests = in_turn("{}", ["0", "1", "2", "3"], 24), in_turn("{}", ["3", "1", "0"], 6)
    header = [f"pixel{i}" for i in range(64)]
    download.table("train.csv", ["label", *header], of_pixels(download, train, header, lambda target: [target]))
    download.table("test.csv", header, of_pixels(download, tests, header, lambda target: []))
    train, tests = ({str(i + 1): t for i, t in enumerate(part.values())} for part in (train, tests))
    download.table("sample_submission.csv", ["ImageId", "Label"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["ImageId", "Label"], *map(list, tests.items())])


def fer2013(download):
    train, tests = in_turn("{}", ["0", "3", "6"], 24), in_turn("{}", ["3", "0"], 6)
    download.table("train.csv", ["emotion", "pixels"], of_pixels(download, train, ["pixels"], lambda target: [target]))
    download.table("test.csv", ["pixels"], of_pixels(download, tests, ["pixels"], lambda target: []))
    train, tests = ({str(i + 1): t for i, t in enumerate(part.values())} for part in (train, tests))
    download.table("sample_submission.csv", ["id", "emotion"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["id", "emotion"], *map(list, tests.items())])


def diabetic_retinopathy_detection(download):
    grades = ["0", "1", "2", "3", "4"]
    train = {f"{i}_{side}": grades[i % 5] for i in range(10, 25) for side in ("left", "right")}
    tests = {f"{i}_{side}": grades[i % 3] for i in range(1, 4) for side in ("left", "right")}
    download.images("train/{}.jpeg", train)
    download.images("test/{}.jpeg", tests)
    for part in ("train", "test"):
        download.packed(f"{part}.zip", write_zip)
    download.table("trainLabels.csv", ["image", "level"], train.items())
    tests = shuffled(tests)
    download.table("sampleSubmission.csv", ["image", "level"], [[name, "0"] for name in tests])
    return Drawn(train, tests, [["image", "level"], *map(list, tests.items())])


def aicrowd_car_rotation(download):
    sides = ["front", "back", "left", "right"]
    parts = dict(train=in_turn("{}", sides, 24), val=in_turn("9{:03}", sides, 8), test=in_turn("7{:03}", sides, 6))
    for part, targets in parts.items():
        download.images(part + "/{}.jpg", targets)
        download.packed(f"{part}.zip", write_zip)
        if part != "test":
            download.table(f"{part}.csv", ["ImageID", "label"], targets.items())
    tests = shuffled(parts["test"])
    download.table("sample_submission.csv", ["ImageID", "label"], [[name, "front"] for name in tests])
    return Drawn(parts["train"] | parts["val"], tests, [["ImageID", "label"], *map(list, tests.items())])


def alaska2_image_steganalysis(download):
    kinds = ["Cover", "JMiPOD", "JUNIWARD", "UERD"]
    train = {f"{kind}/{i:05}.jpg": kind for i in range(1, 13) for kind in kinds}
    tests = in_turn("{:04}.jpg", ["Cover", "UERD", "JMiPOD"], 6)
    download.images("{}", train)
    download.images("Test/{}", tests)
    tests = shuffled(tests)
    download.table("sample_submission.csv", ["Id", "Label"], [[name, "0"] for name in tests])
    rows = [[name, str(int(kind != "Cover"))] for name, kind in tests.items()]
    return Drawn(train, tests, [["Id", "Label"], *rows])


def draw(name, folder):
    """Draws a competition into folder/input. → (Drawn, the scripts' flags)."""
    download = Download(folder / "input")
    return globals()[name.replace("-", "_")](download), ["--input", download.folder, "--output", folder / "output"]
