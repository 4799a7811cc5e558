"""Memory and time of 00, 01 and 03 as the number of images grows tenfold: RAM should stay, time grow tenfold.

    python tests/bench/scale.py --folder /tmp/scale                        # 2,000 and 20,000 images
    python tests/bench/scale.py --folder /tmp/scale --counts 400 4000

Drawn PNGs of 96 px, four fifths of them for training, cached at 48 px, with the search for relatives; `test_resnet`,
one fold, one epoch; inference with 8 views by five copies of that fold's model. Memory is the peak of RssAnon in MiB:
mapped cache pages don't count. Each script runs in a process of its own; time includes its start.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import speed

SIZE = 48


def train(folder):
    model = ["--model", "test_resnet", "--weights", "none", "--epochs", 1, "--batch-size", 32]
    speed.script("01_train_fold.py", *speed.flags(folder), "--fold", 0, "--size", SIZE, *model)


def infer(folder):
    speed.copy_fold(folder)
    speed.script("03_infer.py", *speed.flags(folder))


PARTS = {
    "00": lambda folder: speed.script("00_prepare.py", *speed.flags(folder), "--size", SIZE),
    "01": train,
    "03": infer,
}


def measure(part, folder):
    """Runs a part in a process of its own. → (peak MiB, seconds)."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])["MiB"], time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs=2, default=[2000, 20000])
    parser.add_argument("--part", choices=PARTS, help="of the bench itself: runs one part in this process")
    args = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    if args.part:
        result = {}
        with speed.peak_memory(result):
            PARTS[args.part](args.folder)
        print(json.dumps(result))
        return
    few, many = args.counts
    print(f"| | MiB, {few} images | MiB, {many} | ratio of RAM | ratio of time for {many / few:.0f} times the images |")
    print("|---|---|---|---|---|", flush=True)
    folders = [args.folder / str(count) for count in args.counts]
    for folder, count in zip(folders, args.counts, strict=True):
        speed.make_data(folder / "input", count - count // 5, count // 5, side=96)
        speed.remove(folder / "output")
    for part in PARTS:
        (low, short), (high, long) = (measure(part, folder) for folder in folders)
        print(f"| {part} | {low:.0f} | {high:.0f} | {high / low:.2f} | {long / short:.1f} |", flush=True)


if __name__ == "__main__":
    main()
