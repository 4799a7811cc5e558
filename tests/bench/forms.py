"""Do other forms of the same competition give the same result? Real photos as a table, as folders without a table, as
one-hot columns, as sets of labels, and with a number.

    python tests/bench/forms.py --photos DIR --weights FILE --folder /tmp/forms

DIR and FILE are those of real.py; 500 training and 300 test images. Clothes: the class in a column, in the folders'
names, in one-hot columns; the first and the last must agree to the byte, and the folders, whose order makes other
folds, nearly. Cartons (the test set's products are known ones): the product and whether it is a drink as a set of
labels; 0 for a drink and 1 for food as a number. Frozen features and a linear head (probe.args), all folds, plain
folds; 02 and 03 follow. Prints CV and test score of each.
"""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from real import NETWORK, SIZE, make_competition, photos, run, split

TRAIN, TEST = 500, 300
PROBE = f"@recipes/probe.args --fold all --model {NETWORK} --size {SIZE} --weights".split()
USUAL = "--size", SIZE, "--groups", "none"


def competition(args, kind):
    """→ the table of the photos of a competition, copied into folder/kind."""
    table = split(photos(args.photos, kind), kind, 0, 0)
    if kind == "drink":  # other photos of the same products
        table["test"] = np.arange(len(table)) % 3 == 0
        table["part"] = np.where(table.test, "test", "train")
        table["image_name"] = table.part.str[:2] + table.groupby("part").cumcount().map("{:04}.jpg".format)
    table = pd.concat([table[~table.test].head(TRAIN), table[table.test].head(TEST)])
    make_competition(args.folder / kind, table)
    return table


def form(args, name, kind, train, sample, solution, folders=None):
    """Makes the competition `name` of the photos of `kind`, with these tables; folders: of the training images."""
    source, target = args.folder / kind, args.folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    (target / "test").symlink_to(source / "test")
    if folders is None:
        (target / "train").symlink_to(source / "train")
        train.to_csv(target / "train.csv", index=False)
    else:
        for image, label in folders.items():
            (target / "train" / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "train" / image, target / "train" / label / image)
    sample.to_csv(target / "sample_submission.csv", index=False)
    solution.assign(usage="Private").to_csv(target / "solution.csv", index=False)
    return target


def result(args, name, *flags):
    """Runs the four scripts. → a row of the table."""
    folder, output = args.folder / name, args.folder / f"{name}_output"
    shutil.rmtree(output, ignore_errors=True)
    said = run("00_prepare.py", folder, output, *USUAL, *flags).splitlines()[0]
    run("01_train_fold.py", folder, output, *PROBE, args.weights)
    run("02_oof.py", folder, output)
    words = run("03_infer.py", folder, output)
    cv, test = re.search(r"^CV (\S+)", words, re.M)[1], re.search(r"private (\S+)", words)[1]
    return dict(form=name, CV=cv, test=test, understood=said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--folder", type=Path, required=True, help="where competitions and models go")
    args = parser.parse_args()
    args.folder, args.weights, args.photos = (path.resolve() for path in (args.folder, args.weights, args.photos))
    args.folder.mkdir(parents=True, exist_ok=True)

    table = competition(args, "cloth")
    train, test = (table.loc[table.test == part, ["image_name", "label"]] for part in (False, True))
    sample = test.assign(label=train.label.iloc[0])
    form(args, "table", "cloth", train, sample, test)
    form(args, "folders", "cloth", None, sample, test, dict(train.to_numpy()))
    columns = pd.get_dummies(train.label).astype(int)
    form(args, "onehot", "cloth", pd.concat([train.image_name, columns], axis=1), sample, test)
    rows = [result(args, "table"), result(args, "folders"), result(args, "onehot", "--label-column", *columns)]

    table = competition(args, "drink")
    words = table["product"] + " " + np.where(table.label == "1", "food", "drink")
    sets = table[["image_name"]].assign(label=words)
    train, test = sets[~table.test], sets[table.test]
    form(args, "labels", "drink", train, test.assign(label=""), test)
    rows += [result(args, "labels", "--metric", "column-auc"), result(args, "labels", "--metric", "f1-samples")]
    number = table[["image_name", "label"]]
    form(args, "number", "drink", number[~table.test], number[table.test].assign(label=0.5), number[table.test])
    rows.append(result(args, "number", "--metric", "rmse"))
    print(pd.DataFrame(rows).to_string(index=False, justify="left"))


if __name__ == "__main__":
    main()
