"""With which commands are an experiment, and its submission, made again?"""

import shlex


def flag_words(settings):
    """→ the words of a command line that give these settings: {'lr': 0.001, 'init': 'probe'} → ['--lr', '0.001', …]"""
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{name}={part}" for name, part in value.items()]
        if isinstance(value, str) and value.startswith("-"):
            words.append(f"{flag}={value}")
        elif value is not None and value is not False:
            parts = value if isinstance(value, list) else [value]
            words += [flag] if value is True else [flag, *map(str, parts)]
    return words


def command(*words):
    return f"python {shlex.join(map(str, words))}"


def recipe(oof):
    """→ the flags of 01 that aren't the defaults, as words; the precision too, unless it is a CPU's usual one."""
    record, settings = oof.records[oof.present[0]], dict(oof.config["changed"])
    if record["weights"] not in ("hub", "none"):
        settings["weights"] = "WEIGHTS_FILE"
    return flag_words(settings | precision(record))


def precision(record):
    run = record.get("run", dict(device="cpu", amp="none"))
    return {} if (run["device"], run["amp"]) == ("cpu", "none") else dict(amp=run["amp"])


def prepare_commands(prepared, oofs, *folders):
    """→ the commands of 00, one for each size of the images, the first as it was given."""
    flags = prepared.get("flags")
    if flags is None:  # of an older version of the kit
        flags = dict(metric=prepared["metric"], folds=prepared["folds"], seed=prepared["seed"])
        flags |= dict(limit=prepared["limit"], size=prepared["sizes"][0])
    first = flags.get("size", 448)
    sizes = dict.fromkeys([first, *sorted({oof.config["size"] for oof in oofs})])
    return [command("00_prepare.py", *flag_words(flags | dict(size=size)), *folders) for size in sizes]


def infer_command(args, output, *folders):
    """→ the command of 03 that makes the submission again, as OUTPUT/remade.csv. A file of fitted weights is that of
    the folder `output`."""
    fitted, given = f"blend_{'+'.join(sorted(args.exps))}.json", shlex.split(args.infer)
    for i, word in enumerate(given):
        flag, equals, value = word.rpartition("=")
        given[i] = f"{flag}{equals}{output}/{fitted}" if value.endswith(fitted) else word
    return command("03_infer.py", *args.exps, *given, *folders, "--name", f"{output}/remade.csv")


def remaking(args, oofs, every, submission):
    """→ {place in handover.md: the shell commands} that remake the submission in two ways."""
    prepared = oofs[0].prepared
    kept = [*prepare_commands(prepared, oofs), infer_command(args, "output")]
    scratch = prepare_commands(prepared, every, "--output", "scratch")
    for oof in every:
        train = "01_train_fold.py", "--fold", "all", "--exp", oof.exp, *recipe(oof), "--output", "scratch"
        scratch.append(command(*train))
    scratch += [command("02_oof.py", *args.exps, "--output", "scratch")]
    scratch += [infer_command(args, "scratch", "--output", "scratch")]
    compare = ["cmp", f"submission/{submission.name}"]
    return dict(
        from_weights="\n".join([*kept, shlex.join([*compare, "output/remade.csv"])]),
        from_scratch="\n".join([*scratch, shlex.join([*compare, "scratch/remade.csv"])]),
    )
