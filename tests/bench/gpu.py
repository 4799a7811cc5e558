"""Throughput and memory of the thesis' recipe, EVA-02-L at 448 px and batch 17, on one GPU.

    python tests/bench/gpu.py                    # one CUDA GPU, within 12 minutes; needs no data and no weights
    python tests/bench/gpu.py --tiny             # a tiny size, also on a CPU: checks that the bench runs

The table has images/s of the kit's training loop and of the bare model (the same steps on one batch in GPU memory), in
fp16 and compiled in bf16; model FLOPs utilisation, ms of the optimiser's step, inference with 8 views, peak memory; the
memory and speed of settings for a 15 GB GPU (batches computed in parts, without and with gradient checkpointing); the
time of the thesis' complete job, extrapolated from these rates; and the seconds of 00, 01 and 03 for a fold of 200
drawn images, compiled in 03.
"""

import argparse
import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ranger21 import Ranger21
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import ROOT, png, toy_image, write_csv, write_zip

from kit.data.prepared import Prepared
from kit.score.tasks import Classes
from kit.train.checkpoint import fold_start
from kit.train.device import pick_amp, pick_device, pick_workers
from kit.train.inference import TTAS, predict
from kit.train.run import Experiment, set_up
from kit.train.settings import settings

spec = importlib.util.spec_from_file_location("train_fold", ROOT / "01_train_fold.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

EVA = "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"
TINY = "--size 56 --batch-size 4 --model-kwargs depth=2 embed_dim=64 num_heads=4"
FOR_15_GB = "--micro-batch 4", "--micro-batch 4 --grad-checkpointing"
DRAWN = 200, 40  # training and test images of the fold from end to end; with --tiny a fifth
# dense fp16 TFLOP/s, from the data sheets
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65, "V100": 125, "P100": 19, "4090": 165}


class Bench:
    def __init__(self, tiny):
        self.device = pick_device("auto")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.flags = f"--fold 0 --weights none {TINY if tiny else ''}"
        self.steps = 3 if tiny else 40
        args = self.args()
        self.size, self.batch = args.size, args.batch_size
        self.rows = []

    def args(self, flags=""):
        return train.make_parser().parse_args(f"{self.flags} {flags}".split())

    def row(self, name, value):
        self.rows.append((name, value))
        print(f"{name}: {value}", flush=True)

    def seconds(self, work, repeat=1):
        """Return the seconds of one `work()` until the device is done: the best of three rounds after a warm-up."""
        work()
        times = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(repeat):
                work()
            self.wait()
            times.append((time.perf_counter() - began) / repeat)
        return min(times)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fresh(self):
        """Free the memory of earlier parts and reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.device.type == "cuda" else "not on a CPU"

    # ------------------------------------------------------------ parts

    def fold(self, flags="", images=None):
        """Return the FoldRun of a fold that trains on all of `images`."""
        args, task = self.args(flags), Classes(["0", "1"])
        count = 2 * args.batch_size if images is None else len(images)
        folds = pd.DataFrame(dict(fold=1, target=np.arange(count) % 2), index=range(count))
        prepared = Prepared(
            folder=Path(), made_from={}, task=task, metric="auc", folds=2, seed=0, groups="none", submission={}
        )
        machine = {name: value for name, value in vars(args).items() if name in Experiment.__dataclass_fields__}
        machine |= dict(device=self.device, amp=pick_amp(args.amp, self.device), save_minutes=0)
        machine |= dict(workers=pick_workers(args.workers, self.device))
        config = settings(args, *args.seed) | dict(sampler="imbalanced", metric="auc")
        experiment = Experiment(
            folder=Path(), config=config, provenance={}, chosen=[0], replaced=set(), prepared=prepared, folds=folds,
            images=images, targets=folds.target.to_numpy(), **machine,
        )  # fmt: skip
        return set_up(experiment, 0)

    def bare(self, flags):
        """Return images/s of the model alone: forward, backward and step on one batch in the device's memory."""
        self.fresh()
        run = self.fold(flags)
        run.classifier.train()
        images = torch.randint(0, 255, (self.batch, 3, self.size, self.size), dtype=torch.uint8, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        targets = torch.arange(self.batch, device=self.device) % 2

        def step():
            train.train_step(run, images, targets, 1, True)
            train.update(run, 1)

        began = time.perf_counter()
        step()
        self.wait()
        first, rate = time.perf_counter() - began, self.batch / self.seconds(step, max(1, self.steps // 8))
        peak = next((value for key, value in PEAK.items() if key in self.name), None)
        share = f", {rate * self.flops / peak / 1e12:.0%} of {peak} TFLOP/s" if peak else ""
        self.row(f"bare model, {flags}", f"{rate:.1f} images/s{share}, peak {self.peak()}, first step {first:.0f} s")
        return rate

    def count_flops(self):
        """Count the FLOPs of a forward and a backward pass of one image."""
        run = self.fold()
        images = torch.zeros((1, 3, self.size, self.size), dtype=torch.uint8, device=self.device)
        with FlopCounterMode(display=False) as counter:
            run.classifier(images).sum().backward()
        self.flops = counter.get_total_flops()

    def loop(self, images, flags):
        """Return images/s of 01's own epoch, with memory map, augmentation, workers and scores, and the model."""
        self.fresh()
        run, rates = self.fold(flags, images), []
        for epoch in (1, 2):  # the first warms up
            state = fold_start() | dict(epoch=epoch)
            self.wait()
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                train.train_epoch(run, state)
            rates.append(state["step"] * run.experiment.config["batch_size"] / (time.perf_counter() - began))
        return rates[-1], run.classifier

    def optimizers(self):
        """Time a step of each optimiser on random gradients."""
        run = self.fold()
        params = list(run.classifier.parameters())
        grads = [torch.randn_like(p) for p in params]

        def build(name):
            return train.OPTIMIZERS[name](run.classifier, run.experiment.config, 200)[0]

        def compiled():
            (optimizer := build("ranger21")).compile()
            return optimizer

        kinds = {"the package's Ranger21": lambda: Ranger21(params, 6e-5, num_batches_per_epoch=100, num_epochs=2,
            warmdown_min_lr=3e-5), "ranger21": lambda: build("ranger21"), "ranger21, compiled": compiled,
            "adamw": lambda: build("adamw")}  # fmt: skip
        for name, make in kinds.items():
            self.fresh()
            with contextlib.redirect_stdout(io.StringIO()):  # the package prints
                optimizer = make()

                def step(optimizer=optimizer):
                    for p, grad in zip(params, grads, strict=True):
                        p.grad = grad
                    optimizer.step()

                spent = self.seconds(step, 5)
            self.row(f"step of {name}", f"{1000 * spent:.1f} ms")
            del optimizer

    def inference(self, network, images, views, flags, batch=32):
        rows, workers = np.arange(len(images)), pick_workers(None, self.device)
        amp = pick_amp(self.args(flags).amp, self.device)
        module = TTAS[views](network.eval())
        work = lambda: predict(module, images, rows, batch, self.device, amp, workers)  # noqa: E731
        rate = len(images) / self.seconds(work)
        self.row(f"inference, views {views}, batch {batch}", f"{rate:.1f} images/s")
        return rate

    def end_to_end(self, folder):
        """Time 00, 01 and 03 on a drawn competition, one fold, random weights."""
        rng, (training, tests) = np.random.default_rng(0), (count // (5 if self.steps == 3 else 1) for count in DRAWN)
        rows = [(f"{i:03}.png", i % 2) for i in range(training)]
        given = [(f"t{i:03}.png", i % 2) for i in range(tests)]
        (folder / "input").mkdir()
        for name, images in (("train", rows), ("test", given)):
            pictures = {f"{name}/{file}": png(toy_image(rng, label, self.size)) for file, label in images}
            write_zip(folder / "input" / f"{name}.zip", pictures)
        write_csv(folder / "input" / "train.csv", [("image_name", "label"), *rows])
        write_csv(folder / "input" / "sample_submit.csv", [(file, 0.5) for file, _ in given])
        compiled = ["--compile"] if self.device.type == "cuda" else []
        for script, words in (
            ("00_prepare.py", ["--size", self.size, "--groups", "none"]),
            ("01_train_fold.py", self.flags.split()),
            ("03_infer.py", compiled),
        ):
            where = ["--input", folder / "input", "--output", folder / "output"]
            began = time.perf_counter()
            subprocess.run([str(word) for word in (sys.executable, ROOT / script, *where, *words)], check=True)
            name = f"{script}{', compiled' * (words == ['--compile'])}, {training} training and {tests} test images"
            self.row(name, f"{time.perf_counter() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and images, also on a CPU")
    args = parser.parse_args()
    bench = Bench(args.tiny)
    print(f"{bench.name}, torch {torch.__version__}, {EVA} at {bench.size} px")
    with tempfile.TemporaryDirectory() as folder:
        count = bench.steps * bench.batch
        shape = (count, bench.size, bench.size, 3)
        images = np.lib.format.open_memmap(Path(folder) / "images.npy", "w+", np.uint8, shape)
        rng = np.random.default_rng(0)
        for image in images:
            image[:] = rng.integers(0, 255, shape[1:], np.uint8)
        bench.count_flops()
        for flags in ("--amp fp16 --compile off", "--amp bf16 --compile"):
            if bench.device.type != "cuda" and flags.endswith("--compile"):
                continue  # on a CPU, compiling takes longer than all the rest
            alone = bench.bare(flags)
            training, network = bench.loop(images, flags)
            bench.row(f"kit's training loop, {flags}", f"{training:.1f} images/s, {training / alone:.3f} of it")
            one = bench.inference(network, images, "none", flags)
            eight = bench.inference(network, images[: 2 * bench.steps], "d4", flags)
            job = 5 * (2 * 1741 / training + 2 * 435 / one + 2180 / eight)
            bench.row("thesis' complete job (5 folds × 2 epochs, 2180 × 8 views × 5)", f"{job / 60:.1f} minutes")
            del network
        for flags in FOR_15_GB:
            rate, network = bench.loop(images[: 4 * bench.batch], f"{flags} --compile off")
            del network
            bench.row(flags, f"{rate:.1f} images/s, peak {bench.peak()}")
        bench.optimizers()
        bench.fresh()
        bench.end_to_end(Path(folder))
    print(f"\n| {bench.name} | |\n|---|---|")
    for name, value in bench.rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
