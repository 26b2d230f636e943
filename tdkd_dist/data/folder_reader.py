"""Batches from an ImageFolder tree, or any other source, through torch's DataLoader, with FFCV's reader's plans.

Only the interpolation differs: Pillow's bilinear with antialiasing here, OpenCV's area average there.
Shapes: B pictures, H x W pixels, P columns of a plan.
"""

import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from tdkd_dist.data.batch import Batch
from tdkd_dist.data.crops import DOWN, ERASE_TOP, FLIP, HEIGHT, LEFT, RIGHT, TOP, WIDTH, CropRule, Ints
from tdkd_dist.data.jitter import augment_seed
from tdkd_dist.data.sources.source import Image, Source
from tdkd_dist.mistakes import Mistake

STALL_SECONDS = 600
"""Longest wait for a batch from a process that still lives."""

LINGER_SECONDS = 120
"""How long a process goes on after it was asked to end."""

Item = tuple[int, int]
"""(epoch, index): what the sampler hands to the processes, which outlive an epoch."""


class FolderReader:
    """Reads any order of samples from a source of pictures, in batches, with `workers` processes."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        rule: CropRule,
        workers: int,
        device: torch.device,
        auto_augment: str | None = None,
    ):
        self.path: Path = source.path
        self._device = device
        self._sampler = _Sampler(batch_size)
        self._loader: DataLoader[Any] = DataLoader(
            _Pictures(source, rule, auto_augment),
            batch_sampler=self._sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            timeout=STALL_SECONDS,
            worker_init_fn=_outlive_signals,
        )

    def batches(self, order: Ints, epoch: int) -> Generator[Batch]:
        """The samples `order` in batches.

        Raises `Mistake` naming a picture that cannot be read, `RuntimeError` when a process dies.
        """
        self._sampler.items = [(epoch, int(index)) for index in order]
        if len(order) == 0:
            return
        try:
            for images_BHWC, labels_B in self._loader:
                images_BCHW = images_BHWC.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
                yield Batch(images_BCHW, labels_B.to(self._device, non_blocking=True))
        except Mistake as error:
            # The DataLoader's message is the traceback of its process; the last line is ours.
            raise Mistake(str(error).strip().splitlines()[-1].removeprefix("tdkd_dist.mistakes.Mistake: ")) from error

    def close(self) -> None:
        """End the processes."""
        self._sampler.items = []
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None


def _outlive_signals(worker: int) -> None:
    """Slurm signals all processes of a rank, which still needs this one until it has saved and ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # torch's own handler ends the process, and the rank with it. Not ignored: one that hangs is ended by TERM.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LINGER_SECONDS))


class _Sampler(Sampler[list[Item]]):
    def __init__(self, batch_size: int):
        self.items: list[Item] = []
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Item]]:
        items = self.items
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]


class _Pictures(Dataset[tuple[Image, np.int64]]):
    def __init__(self, source: Source, rule: CropRule, auto_augment: str | None):
        self.source, self.rule = source, rule
        self._policy = _policy(auto_augment) if auto_augment else None

    def __getitem__(self, item: Item) -> tuple[Image, np.int64]:
        epoch, index = item
        pixels_HWC = self.source.read(index)
        height, width = pixels_HWC.shape[:2]
        plan_1P = self.rule.plan(epoch, np.array([index]), np.array([height]), np.array([width]))
        policy = partial(self._policy, augment_seed(self.rule.seed, epoch, index)) if self._policy else None
        image_HWC = follow(plan_1P[0], pixels_HWC, self.rule.size_at(epoch), self.rule.fill, policy)
        return image_HWC, self.source.labels[index]


def _policy(name: str) -> Callable[[int, Image], Image]:
    """torchvision's AutoAugment policy as a function of a seed and a picture (Cubuk et al. 2019)."""
    from PIL import Image as Pillow
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    transform = AutoAugment(AutoAugmentPolicy(name), fill=[128.0, 128.0, 128.0])

    def apply(seed: int, image_HWC: Image) -> Image:
        # torchvision draws from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return np.array(transform(Pillow.fromarray(image_HWC)))

    return apply


def follow(
    plan_P: NDArray[np.int64],
    pixels_HWC: Image,
    size: int,
    fill: tuple[int, int, int] = (0, 0, 0),
    policy: Callable[[Image], Image] | None = None,
) -> Image:
    """What the plan makes of a picture: [size, size, 3]; `policy` comes after the flip and before the filled box."""
    from PIL import Image as Pillow

    top, left, height, width = (int(plan_P[column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
    # Cut first: Pillow's own `box` lets pixels outside it bleed in.
    part = Pillow.fromarray(np.ascontiguousarray(pixels_HWC[top : top + height, left : left + width]))
    image_HWC = np.array(part.resize((size, size), Pillow.Resampling.BILINEAR))
    down, right = int(plan_P[DOWN]), int(plan_P[RIGHT])
    if down or right:
        image_HWC = _moved(image_HWC, down, right)
    if plan_P[FLIP]:
        image_HWC = np.ascontiguousarray(image_HWC[:, ::-1])
    if policy is not None:
        image_HWC = policy(image_HWC)
    top, left, height, width = (int(n) for n in plan_P[ERASE_TOP:])
    image_HWC[top : top + height, left : left + width] = fill
    return image_HWC


def _moved(image_HWC: Image, down: int, right: int) -> Image:
    height, width = image_HWC.shape[:2]
    moved_HWC = np.zeros_like(image_HWC)
    moved_HWC[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image_HWC[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved_HWC
