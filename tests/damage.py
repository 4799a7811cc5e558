"""Damages a competition's files, and looks whether a script that refuses them leaves everything as it was."""

from conftest import refused


def flags_of(folder):
    return ["--input", folder / "input", "--output", folder / "output"]


def snapshot(folder):
    """The bytes of every file; not of lock files, whose content says who held them last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {
        str(path): path.read_bytes() if path.exists() else b"dead link"
        for path in files
        if not path.name.endswith("lock")
    }


def refused_untouched(folder, script, *flags):
    """→ the one line; nothing in the folder may have changed."""
    before = snapshot(folder)
    line = refused(script, *flags_of(folder), *flags)
    assert snapshot(folder) == before, "something was written, changed or removed"
    return line


def edited(name, change):
    """A file whose text is changed by a function."""

    def damage(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()
