"""What one GPU makes of the thesis' recipe: EVA-02-L at 448 px, batch 17, and how near the kit comes to the bare model.

    python tests/bench/gpu.py                    # one CUDA GPU, within 8 minutes; needs no data and no weights
    python tests/bench/gpu.py --tiny             # the same code at a tiny size, also on a CPU: checks that it runs

Prints a table with the GPU's name: images/s of the kit's training loop and of the bare model (the same steps on one
batch that lies on the GPU), model FLOPs utilisation, ms of the optimiser's step, inference with 8 views, peak memory,
the memory and speed of a setting for a 15 GB GPU (batch 1, gradients of 17 added up, gradient checkpointing), and the
time of the thesis' whole job, extrapolated from these rates.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import model as models
from ranger21_fast import Ranger21Fast

spec = importlib.util.spec_from_file_location("train_fold", ROOT / "01_train_fold.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

EVA = "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"
# dense fp16 TFLOP/s by the makers' data sheets
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65, "V100": 125, "P100": 19, "4090": 165}


class Bench:
    def __init__(self, tiny):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.size, self.batch, self.steps = (56, 4, 3) if tiny else (448, 17, 20)
        kwargs = dict(depth=2, embed_dim=64, num_heads=4) if tiny else {}
        self.config = dict(
            model=EVA, model_kwargs=kwargs, weights="none", head="linear", tune="all", norm="thesis", size=self.size,
            augment="d4", sampler="imbalanced", batch_size=self.batch, accumulate=1, epochs=2, loss="cce", lr=6e-5,
            min_lr=3e-5, weight_decay=1e-4, optimizer="ranger21", ranger21_decay="package", seed=777,
            amp=models.pick_amp("auto", self.device), grad_checkpointing=False,
        )  # fmt: skip
        self.rows = []

    def row(self, what, value):
        self.rows.append((what, value))
        print(f"{what}: {value}", flush=True)

    def seconds(self, work, repeat=1):
        """Of one `work()`, the device waited for; the best of three rounds after one to warm up."""
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
        """Frees what earlier parts held, and starts the peak of memory anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.device.type == "cuda" else "not on a CPU"

    # ------------------------------------------------------------ parts

    def parts(self, **changes):
        config = self.config | changes
        network = models.build_model(config, 2).to(self.device)
        optimizer, scheduler = train.make_optimizer(network, config, 100)
        scaler = torch.amp.GradScaler(self.device.type, enabled=config["amp"] == "fp16")
        return config, network, optimizer, scheduler, scaler

    def bare(self, batch, compiled=False):
        """Images/s of the model alone: forward, backward and step on one batch that lies on the device."""
        config, network, optimizer, _, scaler = self.parts(batch_size=batch)
        network.train()
        if compiled:
            network.compile()
        images = torch.randint(0, 255, (batch, 3, self.size, self.size), dtype=torch.uint8, device=self.device)
        targets = torch.arange(batch, device=self.device) % 2

        def step():
            with models.autocast(self.device, config["amp"]):
                logits = network(images)
            scaler.scale(torch.nn.functional.cross_entropy(logits, targets)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        rate = batch / self.seconds(step, max(1, self.steps // 4))
        if compiled:
            self.row(f"bare model, compiled, batch {batch}", f"{rate:.1f} images/s, peak {self.peak()}")
            return rate
        with FlopCounterMode(display=False) as counter:
            network(images[:1]).sum().backward()
        flops = counter.get_total_flops()
        peak = next((value for key, value in PEAK.items() if key in self.name), None)
        share = f", {rate * flops / peak / 1e12:.0%} of {peak} TFLOP/s" if peak else ""
        self.row(f"bare model, batch {batch}", f"{rate:.1f} images/s{share}, peak {self.peak()}")
        return rate

    def largest_batch(self):
        """Doubles the batch until the memory is full."""
        found = self.batch
        while self.device.type == "cuda" and found < 1000:
            self.fresh()
            try:
                self.bare(2 * found)
            except torch.cuda.OutOfMemoryError:
                break
            found *= 2
        self.row("largest batch tried that fits", found)

    def loop(self, images, **changes):
        """Images/s of the kit's own epoch: memory map, augmentation, workers, scores and all."""
        config, network, optimizer, scheduler, scaler = self.parts(**changes)
        rows, targets = np.arange(len(images)), np.arange(len(images)) % 2
        workers, rates = models.pick_workers(None, self.device), []
        resume = train.ResumeFile(None, 0, {})
        for epoch in range(2):  # the first warms up
            loader = train.training_batches(images, rows, targets, config, 0, epoch, workers, self.device)
            self.wait()
            began = time.perf_counter()
            train.train_epoch(network, loader, train.LOSSES["cce"], optimizer, scheduler, scaler, config, self.device,
                None, train.at_epochs_start(), resume)  # fmt: skip
            rates.append(len(loader) * config["batch_size"] / (time.perf_counter() - began))
        return rates[-1], network

    def optimizers(self):
        network = models.build_model(self.config, 2).to(self.device)
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        for name in ("ranger21-package", "ranger21", "adamw"):
            self.fresh()
            optimizer, _ = train.make_optimizer(network, self.config | dict(optimizer=name), 100)

            def step(optimizer=optimizer):
                with contextlib.redirect_stdout(io.StringIO()):
                    optimizer.step()

            self.row(f"step of {name}", f"{1000 * self.seconds(step, 5):.1f} ms")
            del optimizer, step
        if self.device.type == "cpu":
            return  # compiling for it takes minutes
        torch._dynamo.config.recompile_limit = 64  # once for each shape of a parameter
        compiled = Ranger21Fast(network.parameters(), 6e-5, 100, 2, compiled=True)
        self.row("step of ranger21, compiled", f"{1000 * self.seconds(compiled.step, 5):.1f} ms")

    def inference(self, network, images, views):
        rows, amp = np.arange(len(images)), models.pick_amp(self.config["amp"], self.device)
        workers = models.pick_workers(None, self.device)
        module = models.d4_views(network.eval()) if views == 8 else network.eval()
        work = lambda: models.predict(module, images, rows, 32, self.device, amp, workers)  # noqa: E731
        rate = len(images) / self.seconds(work)
        self.row(f"inference with {views} views, batch 32", f"{rate:.1f} images/s")
        return rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    bench = Bench(args.tiny)
    print(f"{bench.name}, torch {torch.__version__}, {EVA} at {bench.size} px, {bench.config['amp']}")
    with tempfile.TemporaryDirectory() as folder:
        count = bench.steps * bench.batch
        shape = (count, bench.size, bench.size, 3)
        images = np.lib.format.open_memmap(Path(folder) / "images.npy", "w+", np.uint8, shape)
        rng = np.random.default_rng(0)
        for image in images:
            image[:] = rng.integers(0, 255, shape[1:], np.uint8)
        bench.fresh()
        alone = bench.bare(bench.batch)
        bench.fresh()
        if bench.device.type == "cuda":  # on a CPU, compiling takes longer than all the rest
            bench.bare(bench.batch, compiled=True)
            bench.fresh()
        training, network = bench.loop(images)
        bench.row(f"kit's training loop, batch {bench.batch}", f"{training:.1f} images/s, {training / alone:.3f} of it")
        eight = bench.inference(network, images, 8)
        one = bench.inference(network, images, 1)
        del network
        bench.optimizers()
        bench.fresh()
        small = dict(batch_size=1, accumulate=bench.batch, grad_checkpointing=True)
        rate, network = bench.loop(images, **small)
        del network
        words = f"batch 1 × {bench.batch}, gradient checkpointing"
        bench.row(words, f"{rate:.1f} images/s, {rate / training:.2f} of batch {bench.batch}, peak {bench.peak()}")
        bench.largest_batch()
    job = 5 * (2 * 1741 / training + 2 * 435 / one + 2180 / eight)
    bench.row("thesis' whole job, extrapolated (5 folds × 2 epochs, 2180 × 8 views × 5)", f"{job / 60:.1f} minutes")
    print(f"\n| {bench.name} | |\n|---|---|")
    for what, value in bench.rows:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
