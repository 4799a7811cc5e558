"""Twelve timm families × (probe, half of the layers frozen, all trained) × (fp32, bf16), at a tiny size on a CPU.

    python tests/bench/families.py                         # some 5 minutes on 2 cores
    python tests/bench/families.py resnet vit              # these families

Each family gets random weights in a file, as if downloaded. Each cell trains fold 0 of a drawn competition by 01 and is
stopped after its first step, or its first part of the features, and resumed: it says how the bytes of foldK.pt and
foldK.csv compare with an uninterrupted run's, and the AUC on the held-out images.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import timm
import torch
from conftest import kit
from small_models import PREPARE, PROBE, STEP, TRAIN, competition

from kit.experiment import read_record
from kit.train import linear_probe

SMALL_VIT = "depth=2 embed_dim=64 num_heads=2"
FAMILIES = {  # name → (--model, --model-kwargs, px)
    "vit": ("vit_tiny_patch16_224", SMALL_VIT, 64),
    "eva02": ("eva02_tiny_patch14_224", SMALL_VIT, 56),
    "beit": ("beit_base_patch16_224", SMALL_VIT, 64),
    "dinov3": ("vit_small_patch16_dinov3", SMALL_VIT, 64),
    "swin": ("swin_tiny_patch4_window7_224", "depths=(1,1,1,1) embed_dim=24 num_heads=(1,2,2,4)", 64),
    "maxvit": ("maxvit_rmlp_pico_rw_256", "", 64),
    "convnext": ("convnext_atto", "depths=(1,1,1,1) dims=(16,16,32,32)", 64),
    "convnextv2": ("convnextv2_atto", "depths=(1,1,1,1) dims=(16,16,32,32)", 64),
    "caformer": ("caformer_s18", "", 64),
    "resnet": ("resnet10t", "", 64),
    "efficientnet": ("tf_efficientnet_lite0", "", 64),
    "mobilenet": ("mobilenetv3_small_050", "", 64),
}
STEPS = "--head fresh --optimizer adamw --lr 1e-3 --epochs 2 --batch-size 8".split()
TUNED = {"probe": PROBE, "half": [*STEPS, "--freeze", "0.5"], "all": [*STEPS, "--ema", "0.9"]}
PRECISIONS = {"fp32": "none", "bf16": "bf16"}


def train(*words):
    """Train by 01, and resume until it is done. → the number of stops. Raises SystemExit where it fails."""
    stops = 0
    while (result := kit(TRAIN, *words)).code == 75:
        words, stops = [word for word in words if word not in STEP], stops + 1
    if result.code:
        sys.exit(f"{words}: {result.err}")
    return stops


def cell(flags, exp, words):
    """Train fold 0 twice, once with a stop. → 'AUC 0.912, resumed to the same bytes'."""
    train(*flags, *words, "--fold", 0, "--exp", f"{exp}_once")
    with contextlib.ExitStack() as held:
        if "probe" in words:
            for path in (flags[3] / "prepared").glob("features_*"):
                path.unlink()  # or there would be nothing to stop
            held.callback(setattr, linear_probe, "BLOCK", linear_probe.BLOCK)
            linear_probe.BLOCK = 16
        stops = train(*flags, *words, "--fold", 0, "--exp", f"{exp}_twice", *STEP)
    folders = [flags[3] / f"{exp}_{times}" for times in ("once", "twice")]
    one, other = ([(folder / f"fold0.{ending}").read_bytes() for ending in ("pt", "csv")] for folder in folders)
    how = "to the same bytes" if one == other else "TO OTHER BYTES"
    return f"{read_record(folders[0], 0)['scores']['auc']:.3f}, resumed {how if stops else 'NEVER'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    names = parser.parse_args().families or FAMILIES
    torch.set_num_threads(1)
    columns = [(tuned, amp) for tuned in TUNED for amp in PRECISIONS]
    print("| AUC of the held-out images |", " | ".join(f"{tuned}, {amp}" for tuned, amp in columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        competition(Path(folder) / "world", 2)
        flags = ["--input", Path(folder) / "world", "--output", Path(folder) / "output"]
        for size in {FAMILIES[name][2] for name in names}:
            kit("00_prepare.py", *flags, "--size", size, *PREPARE)
        for name in names:
            model, kwargs, size = FAMILIES[name]
            given = dict(word.split("=") for word in kwargs.split())
            given = {key: tuple(map(int, value.strip("()").split(","))) if "(" in value else int(value)
                     for key, value in given.items()}  # fmt: skip
            fixed = dict(img_size=size) if timm.get_pretrained_cfg(model).fixed_input_size else {}
            torch.manual_seed(1)
            torch.save(timm.create_model(model, **given, **fixed).state_dict(), weights := Path(folder) / f"{name}.pth")
            words = ["--model", model, "--size", size, "--weights", weights, "--model-kwargs", *kwargs.split()]
            cells = [cell(flags, f"{name}_{tuned}_{amp}", [*words, *TUNED[tuned], "--amp", PRECISIONS[amp]])
                     for tuned, amp in columns]  # fmt: skip
            print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
