"""Where are the images of a part, and are all of them there?"""

from kit.images import ImageSource
from kit.pixels import find_pixels
from kit.tables import TRAIN, check_unique, refuse

USUAL = "{part}", "{part}_images", "images"  # zips or folders, in this order
ENDINGS = ".zip", "", ".7z", ".tar", ".tar.gz", ".tgz"
TABLES = {"train": TRAIN, "test": ("test.csv",)}  # that may hold pixels


def find_images(args, part):
    """→ the source of the images of `part`: the folders and archives given by its flag, else INPUT/part.zip, INPUT/part
    and so on, else a table of pixels. Raises UserError where there is none."""
    given = getattr(args, f"{part}_images")
    usual = [f"{name.format(part=part)}{ending}" for name in USUAL for ending in ENDINGS]
    paths = [args.input / name for name in given or usual]
    there = [path for path in paths if path.exists() or path.with_name(f"{path.name}.001").exists()]
    if not there:
        named = given[0] if given else (args.train_csv or [None])[0] if part == "train" else None
        if pixels := find_pixels(args.input, named, TABLES[part]):
            return pixels
    lacking = [path for path in paths if path not in there] if given else paths[:1] * (not there)
    problem = f"is missing: put the competition's images there, or name them with --{part}-images"
    refuse(lacking and lacking[0], lacking, problem)
    return ImageSource(there if given else there[:1], args.bands, args.output / "unpacked", args.channels)


def check_images(source, names, table):
    """Raises UserError naming the images of the table that the source lacks, or that the table spells in two ways."""
    missing = [name for name in names if source.find(name) is None]
    refuse(
        source.path, missing, f"lacks {len(missing)} of the images in {table}: * (see --image-column, --submit-header)"
    )
    check_unique(table, map(source.find, names))
