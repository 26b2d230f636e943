"""How fast can pictures be had? python tools/bench/loader.py PHOTOS WORK [--count 2000] [--size 224] [--workers N].

PHOTOS: any folder of large photographs (Debian: the pictures of mate-backgrounds and plasma-workspace-wallpapers).
They are cut into JPEGs of ImageNet's size in WORK, written as a beton, and read by our loader, by bare FFCV with the
same pipeline, by torchvision's ImageFolder under a DataLoader, and by a JPEG decoder that does nothing else; each in a
process of its own, in turn, several rounds. Printed: the median, the spread, core time (which holds on a busy machine
too), memory, and what limits.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import require

CASES = ("ours", "bare_ffcv", "imagefolder", "our_imagefolder", "jpeg_only")
STUDENT_RATE = 162
"""Images/s of SEW-ResNet-34, T = 4, on one GPU of an A100 host, as published."""


def main() -> int:
    """The command line; returns the exit status."""
    return run_tool(bench)


def bench() -> None:
    """Prepare, measure, print; with --case, be one of the measured processes."""
    parser = Parser(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=2000, help="pictures to cut")
    parser.add_argument("--size", type=int, default=224, help="side of the crops")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args)))
        return
    prepare(args.photos, args.work, args.count, args.workers)
    compare(args)
    profile(args.work, args.size)


def prepare(photos: Path, work: Path, count: int, workers: int) -> None:
    """Cut `count` pictures of about ImageNet's sizes out of the photographs, in ten classes, and write the beton."""
    from PIL import Image

    from tdkd_dist.data.beton.writing import write
    from tdkd_dist.data.sources.folder import FolderSource

    tree = work / "tree"
    if not (work / "x.beton").exists():
        rng = np.random.default_rng(0)
        files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        require(bool(files), f"{photos}: no photographs are here (.jpg, .jpeg, .png, .webp)")
        made = 0
        while made < count:
            for file in files:
                photo = Image.open(file).convert("RGB")
                for _ in range(-(-count // len(files))):
                    width, height = (500, 375) if rng.random() < 0.7 else (375, 500)
                    zoom = rng.uniform(1, max(1, min(photo.width / width, photo.height / height)))
                    w, h = min(photo.width, int(width * zoom)), min(photo.height, int(height * zoom))
                    left, top = int(rng.uniform(0, photo.width - w + 1)), int(rng.uniform(0, photo.height - h + 1))
                    tile = photo.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
                    folder = tree / f"{made % 10}"
                    folder.mkdir(parents=True, exist_ok=True)
                    tile.save(folder / f"{made:06d}.JPEG", quality=92)
                    made += 1
        start = time.perf_counter()
        manifest = write(FolderSource(tree), work / "x.beton", workers=workers)
        print(f"beton: {manifest.num_samples / (time.perf_counter() - start):,.0f} images/s written")
    sizes = [p.stat().st_size for p in tree.rglob("*.JPEG")]
    beton = (work / "x.beton").stat().st_size / len(sizes)
    print(f"{len(sizes)} pictures, {np.mean(sizes) / 1e3:.0f} kB each as JPEG, {beton / 1e3:.0f} kB in the beton")


def compare(args: argparse.Namespace) -> None:
    """Run the cases in turn, and print a table."""
    results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(args.rounds):
        for case in CASES:
            command = [sys.executable, *sys.argv, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{case} failed:\n{done.stderr}")
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
    ours = statistics.median(r["rate"] for r in results["ours"])
    ours_cpu = statistics.median(r["cpu"] for r in results["ours"])
    print(f"load average {os.getloadavg()[0]:.1f}; {args.workers} workers, {args.size} px, batch {args.batch}")
    heads = ("images/s", "spread", "ours / it", "core ms", "it / ours", "first batch s", "memory MB")
    print(f"{'case':<16}" + "".join(f"{head:>15}" for head in heads))
    for case, rows in results.items():
        rates = [r["rate"] for r in rows]
        cpu, first, memory = (statistics.median(r[key] for r in rows) for key in ("cpu", "first", "memory"))
        rate, spread = statistics.median(rates), f"{min(rates):,.0f} to {max(rates):,.0f}"
        cells = (f"{rate:,.0f}", spread, f"{ours / rate:.2f}", f"{cpu:.2f}", f"{cpu / ours_cpu:.2f}")
        print(f"{case:<16}" + "".join(f"{cell:>15}" for cell in (*cells, f"{first:.1f}", f"{memory:,.0f}")))
    # Not from images/s: on a busy machine that counts other people's work.
    cores = STUDENT_RATE * ours_cpu / 1e3
    print(f"a GPU that trains {STUDENT_RATE} images/s needs {cores:.1f} cores like these for its loader")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One case in this process: images/s after the first pass, seconds to the first batch, peak memory in MB."""
    start = time.perf_counter()
    epoch: Callable[[], Iterator[int]] = globals()[f"open_{args.case}"](args)
    first, count = 0.0, 0
    for images in epoch():
        first = first or time.perf_counter() - start
        count += images
    start, cpu, count = time.perf_counter(), cpu_seconds(), 0
    for _ in range(2):
        count += sum(epoch())
    rate = count / (time.perf_counter() - start)
    cpu = 1e3 * (cpu_seconds() - cpu) / count
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"rate": rate, "cpu": cpu, "first": first, "memory": memory / 1e3}


def cpu_seconds() -> float:
    """Of this process and its children."""
    import psutil

    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def open_ours(args: argparse.Namespace, format: str = "ffcv") -> Callable[[], Iterator[int]]:
    """Our loader."""
    import torch

    from tdkd_dist.config import DataConfig
    from tdkd_dist.data.loaders import make_train_loader

    path = str(args.work / ("x.beton" if format == "ffcv" else "tree"))
    loader = make_train_loader(
        DataConfig(train=path, format=format, image_size=args.size),  # type: ignore[arg-type]
        batch_size=args.batch,
        micro_batch=args.batch,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        workers=args.workers,
    )
    epochs = iter(range(1000))
    return lambda: (len(labels) for _, labels in loader.epoch(next(epochs)))


def open_our_imagefolder(args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """Our loader, format=imagefolder."""
    return open_ours(args, "imagefolder")


def open_bare_ffcv(args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """FFCV as its documentation has it: the same crops and flips, unseeded."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    image: list[Any] = [RandomResizedCropRGBImageDecoder((args.size, args.size)), RandomHorizontalFlip()]
    loader = Loader(
        str(args.work / "x.beton"),
        batch_size=args.batch,
        num_workers=args.workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": [*image, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
    )
    return lambda: (len(labels) for _, labels in loader)


def open_imagefolder(args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """torchvision's ImageFolder under a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    pipeline = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    loader = DataLoader(
        datasets.ImageFolder(str(args.work / "tree"), transforms.Compose(pipeline)),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=True,
    )
    return lambda: (len(labels) for _, labels in loader)


def open_jpeg_only(args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """OpenCV decoding the JPEG files from memory in threads."""
    import cv2

    cv2.setNumThreads(1)
    files = [np.frombuffer(p.read_bytes(), np.uint8) for p in sorted((args.work / "tree").rglob("*.JPEG"))]
    pool = ThreadPoolExecutor(args.workers)

    def decode(data: Any) -> int:
        assert cv2.imdecode(data, cv2.IMREAD_COLOR) is not None
        return 1

    return lambda: pool.map(decode, files)


def profile(work: Path, size: int) -> None:
    """What one picture costs at each stage of our loader, on one thread, by FFCV's own functions."""
    from ffcv.libffcv import imdecode, resize_crop

    from tdkd_dist.data.beton.layout import MODE_JPEG, read_tables
    from tdkd_dist.data.crops import HEIGHT, LEFT, TOP, WIDTH, CropRule

    tables = read_tables(work / "x.beton")
    content = np.memmap(work / "x.beton", mode="r")
    pictures = tables.samples["image"][:1000]
    count = len(pictures)
    heights, widths = (pictures[side].astype(np.int64) for side in ("height", "width"))
    spent = dict.fromkeys(("plan", "read", "decode", "resize"), 0.0)
    start = time.perf_counter()
    plans = CropRule(size, "random_resized", flip=True).plan(0, np.arange(count), heights, widths)
    spent["plan"] = time.perf_counter() - start
    output = np.empty((size, size, 3), np.uint8)
    for index, picture in enumerate(pictures):
        ptr, length = tables.place(index)
        start = time.perf_counter()
        data = np.array(content[ptr : ptr + length])
        spent["read"] += time.perf_counter() - start
        height, width = int(picture["height"]), int(picture["width"])
        start = time.perf_counter()
        pixels = (
            np.empty((height, width, 3), np.uint8) if picture["mode"] == MODE_JPEG else data.reshape(height, width, 3)
        )
        if picture["mode"] == MODE_JPEG:
            imdecode(data, pixels, height, width, height, width)
        spent["decode"] += time.perf_counter() - start
        top, left, h, w = (int(plans[index, column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
        start = time.perf_counter()
        resize_crop(pixels, top, top + h, left, left + w, output)
        spent["resize"] += time.perf_counter() - start
    jpegs = (pictures["mode"] == MODE_JPEG).mean()
    limit = max(spent, key=spent.__getitem__)
    stages = ", ".join(f"{stage} {1e3 * seconds / count:.2f} ms" for stage, seconds in spent.items())
    print(f"one picture on one thread ({100 * jpegs:.0f} % are JPEGs): {stages}; {limit} limits")


if __name__ == "__main__":
    sys.exit(main())
