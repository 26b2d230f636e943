"""How fast can frames be had? python tools/bench/event_loader.py BETON WORK [--frames T] [--size 48] [--workers N]

BETON holds frames (`tools/write_beton.py --frames`). Its samples are written to WORK as the `.npz` files that
spikingjelly keeps, compressed and not, and read through torch's DataLoader as is common: load, resize, mirror, then
one of roll, rotation and cutout, by torchvision. Beside it our loader with the same augmentations. All take turns in
this process with the same number of workers; a round is one epoch, after one to warm up.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from arguments import check_counts, check_outputs
from rounds import ratio, say
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.config import DataConfig
from tdkd_dist.data.beton.manifest import check_beton
from tdkd_dist.data.ffcv_reader import FfcvReader
from tdkd_dist.data.frames import CUTOUT, ROLL, ROTATE
from tdkd_dist.data.loaders import make_train_loader
from tdkd_dist.mistakes import require

FORMS: dict[str, Callable[..., Any]] = {"npz": np.savez, "npz compressed": np.savez_compressed}


class Files(Dataset[tuple[Tensor, int]]):
    """A `.npz` a sample, `frames` `[T, C, H, W]`, augmented as spikingjelly's users do."""

    def __init__(self, folder: Path, frames: int, size: int) -> None:
        self.paths, self.frames, self.size = sorted(folder.glob("*.npz")), frames, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample and its label."""
        with np.load(self.paths[index]) as file:
            x = torch.from_numpy(file["frames"][: self.frames]).float()
        x = TF.resize(x, [self.size, self.size], antialias=False)
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        return augment(x, int(torch.randint(3, ())), self.size), index % 10


def augment(x: Tensor, which: int, size: int) -> Tensor:
    """A roll, a rotation or a cutout."""
    if which == 0:
        down, right = torch.randint(-ROLL, ROLL + 1, (2,)).tolist()
        return x.roll((down, right), (-2, -1))
    if which == 1:
        turned: Tensor = TF.rotate(x, float(torch.empty(()).uniform_(-ROTATE, ROTATE)))
        return turned
    top, left = (torch.randint(size, (2,)) - CUTOUT // 2).tolist()
    x[..., max(0, top) : top + CUTOUT, max(0, left) : left + CUTOUT] = 0
    return x


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status."""
    return run_tool(lambda: measure(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("beton", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--frames", type=int, metavar="T", help="the first so many (default: all)")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(argv)
    check_counts(options, "frames", "size", "batch", "workers", "rounds")
    check_outputs(options, "markdown")
    return options


def measure(options: argparse.Namespace) -> None:
    """The measurement. Raises `Mistake`."""
    info = check_beton(options.beton, "BETON")
    require(info.frames is not None, f"{options.beton}: holds pictures; write one of recordings")
    assert info.frames is not None
    frames = options.frames or info.frames[0]
    unpack(options.beton, options.work, info.num_samples)
    data = DataConfig(train=str(options.beton), frames=frames, image_size=options.size, crop="none", event_augment=True)
    ours = make_train_loader(
        data,
        batch_size=options.batch,
        micro_batch=options.batch,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        workers=options.workers,
    )
    torch.set_num_threads(options.workers)
    epochs = iter(range(10_000))
    ways: dict[str, Callable[[], int]] = {"ours": lambda: sum(len(x) for x, _ in ours.epoch(next(epochs)))}
    for form in FORMS:
        loader = DataLoader(
            Files(options.work / form, frames, options.size),
            batch_size=options.batch,
            shuffle=True,
            drop_last=True,
            num_workers=options.workers,
            persistent_workers=True,
        )
        ways[form] = lambda loader=loader: sum(len(x) for x, _ in loader)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for k in range(options.rounds + 1):
        for way, epoch in ways.items():
            started = time.perf_counter()
            samples = epoch()
            if k:
                seconds[way].append((time.perf_counter() - started) / samples)
        say(f"round {k} of {options.rounds}")
    ours.close()
    publish(as_markdown(options, info.frames, info.num_samples, frames, seconds), options.markdown)


def unpack(beton: Path, work: Path, count: int) -> None:
    """Each sample of the beton as a file of either form."""
    if all(len(list((work / form).glob("*.npz"))) == count for form in FORMS):
        return
    reader = FfcvReader(beton, batch_size=32, rule=None, workers=1, device=torch.device("cpu"))
    index = 0
    for form in FORMS:
        (work / form).mkdir(parents=True, exist_ok=True)
    for counts, _ in reader.batches(np.arange(count), 0):
        for sample in counts.numpy():
            for form, save in FORMS.items():
                save(work / form / f"{index:06}.npz", frames=sample)
            index += 1
    reader.close()


def as_markdown(
    options: argparse.Namespace, stored: tuple[int, ...], count: int, frames: int, seconds: dict[str, list[float]]
) -> str:
    """The table."""
    sizes = {form: sum(p.stat().st_size for p in (options.work / form).glob("*.npz")) for form in FORMS}
    sizes["ours"] = options.beton.stat().st_size
    lines = [
        f"{count} recordings of {list(stored)}, {frames} frames to {options.size} px, batches of {options.batch},"
        f" {options.workers} workers, torch {torch.__version__}; {options.rounds} rounds",
        "",
        "| | frames/s | ours in times (least to most) | MB |",
        "|---|---|---|---|",
    ]
    for way, times in seconds.items():
        rate = frames / statistics.median(times)
        lines.append(f"| {way} | {rate:,.0f} | {ratio(times, seconds['ours'])} | {sizes[way] / 1e6:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
