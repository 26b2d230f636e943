"""Training and validation batches: who sees which sample, in which order.

The order of an epoch is one permutation of the whole set, a function of (seed, epoch). Step s of the global batch size
B takes its elements s*B to (s+1)*B; a rank takes one contiguous slice of these, and cuts it into micro-batches. So two
ranks see exactly the micro-batches that one rank with twice the accumulation sees. Augmentation is a function of
(seed, epoch, sample index), see `crops`.

Shapes: B images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from tdkd_dist.config import DataConfig
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.beton.manifest import check_beton
from tdkd_dist.data.beton.staging import staged
from tdkd_dist.data.checks import check_classes, check_frames, say_where_it_is_cached
from tdkd_dist.data.crops import CropRule, Ints
from tdkd_dist.data.frames import FrameRule
from tdkd_dist.data.jitter import ColorJitter
from tdkd_dist.data.sources import open_source
from tdkd_dist.data.sources.source import Source
from tdkd_dist.mistakes import Mistake


class Reader(Protocol):
    """Batches of any order of samples."""

    def batches(self, order: Ints, epoch: int) -> Generator[Batch]:
        """The samples `order`, in batches, augmented for `epoch`."""
        ...

    def close(self) -> None:
        """Free threads and processes."""
        ...


class TrainLoader:
    """This rank's part of the training set, epoch by epoch."""

    def __init__(
        self,
        reader: Reader,
        num_samples: int,
        num_classes: int | None,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        jitter: ColorJitter | None = None,
    ):
        self.num_samples, self.num_classes = num_samples, num_classes
        self.steps_per_epoch = num_samples // batch_size
        self._reader, self._batch_size, self._seed = reader, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._share = batch_size // world_size
        self._jitter = jitter

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """This rank's micro-batches of an epoch, in order, from global step `start_step` on.

        Raises `Mistake` naming a sample that cannot be decoded, `RuntimeError` if the reader dies or stalls.
        """
        order = self._order(epoch)[start_step * self._share :]
        batches = self._reader.batches(order, epoch)
        return batches if self._jitter is None else _jittered(batches, self._jitter, order, epoch)

    def samples(self, epoch: int, step: int) -> Ints:
        """The indices of the samples that this rank sees in a step of an epoch."""
        return self._order(epoch)[step * self._share : (step + 1) * self._share]

    def close(self) -> None:
        """Free threads and processes."""
        self._reader.close()

    def _order(self, epoch: int) -> Ints:
        return rank_order(
            epoch_order(self._seed, epoch, self.num_samples)[: self.steps_per_epoch * self._batch_size],
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )


class ValLoader:
    """This rank's part of the validation set; every sample is in exactly one rank's part, once."""

    def __init__(
        self,
        reader: Reader,
        num_samples: int,
        num_classes: int | None,
        *,
        rank: int,
        world_size: int,
        class_names: Sequence[str] | None = None,
    ):
        self.num_samples, self.num_classes, self.class_names = num_samples, num_classes, class_names
        self._reader, self._order = reader, np.arange(num_samples)[rank::world_size]

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Raises as `TrainLoader.epoch` does."""
        return self._reader.batches(self._order, 0)

    def close(self) -> None:
        """Free threads and processes."""
        self._reader.close()


def _jittered(batches: Generator[Batch], jitter: ColorJitter, order: Ints, epoch: int) -> Generator[Batch]:
    position = 0
    try:
        for images_BCHW, labels_B in batches:
            indices_B = order[position : position + len(labels_B)]
            position += len(labels_B)
            yield Batch(jitter(images_BCHW, epoch, indices_B), labels_B)
    finally:
        batches.close()


def epoch_order(seed: int, epoch: int, num_samples: int) -> Ints:
    """The order in which all ranks together see the samples."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def rank_order(order: Ints, *, batch_size: int, rank: int, world_size: int) -> Ints:
    """What one rank sees of `order`, whose length is a multiple of the global `batch_size`."""
    return order.reshape(-1, world_size, batch_size // world_size)[:, rank].reshape(-1)


def make_train_loader(
    data: DataConfig,
    *,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    device: torch.device,
    workers: int,
    beat: Callable[[], None] = lambda: None,
) -> TrainLoader:
    """Open `data.train`; `batch_size` is the global batch. `beat` is called while it is copied (`data.stage_to`).

    Raises `Mistake` naming the key that is wrong.
    """
    if batch_size % world_size or batch_size // world_size % micro_batch:
        raise Mistake(
            f"train.batch_size={batch_size} does not divide over {world_size} ranks in micro-batches of {micro_batch}"
        )
    rule = train_rule(data, seed) if data.frames is None else frame_rule(data, seed)
    reader, num_samples, num_classes, _ = _open("train", data, rule, micro_batch, device, workers, beat)
    if num_samples < batch_size:
        reader.close()
        raise Mistake(f"train.batch_size={batch_size}: data.train={data.train} holds only {num_samples} samples")
    return TrainLoader(
        reader,
        num_samples,
        num_classes,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        jitter=ColorJitter(data.color_jitter, seed) if data.color_jitter else None,
    )


def train_rule(data: DataConfig, seed: int) -> CropRule:
    """The augmentation that the configuration asks for."""
    # Random erasing is applied to normalised pictures elsewhere, with 0: that is the mean here.
    mean = tuple(round(255 * m) for m in data.mean)
    return CropRule(
        data.image_size,
        data.crop,
        flip=data.flip,
        seed=seed,
        cutout=data.cutout,
        erasing=data.erasing,
        fill=(0, 0, 0) if data.cutout else (mean[0], mean[1], mean[2]),
        start_size=data.start_size,
        full_size_epoch=data.full_size_epoch,
    )


def frame_rule(data: DataConfig, seed: int | None) -> FrameRule:
    """What becomes of stored frames; without a seed, no augmentation."""
    assert data.frames is not None
    rule = FrameRule(data.frames, data.frame_choice, data.image_size)
    return rule if seed is None else replace(rule, flip=data.flip, events=data.event_augment, seed=seed)


def make_val_loader(
    data: DataConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    workers: int,
    beat: Callable[[], None] = lambda: None,
    split: Literal["train", "val"] = "val",
) -> ValLoader:
    """Open `data.val`, or `data.train` as if it were that; `batch_size` is one rank's. Else as `make_train_loader`."""
    crop = CropRule(data.image_size, "center", crop_pct=data.crop_pct)
    rule = crop if data.frames is None else frame_rule(data, None)
    reader, num_samples, num_classes, names = _open(split, data, rule, batch_size, device, workers, beat)
    return ValLoader(reader, num_samples, num_classes, rank=rank, world_size=world_size, class_names=names)


def _open(
    split: str,
    data: DataConfig,
    rule: CropRule | FrameRule,
    batch_size: int,
    device: torch.device,
    workers: int,
    beat: Callable[[], None],
) -> tuple[Reader, int, int | None, Sequence[str] | None]:
    """The reader of `data.train` or `data.val`, the number of samples and, where known, that of classes and names."""
    key, path = f"data.{split}", data.train if split == "train" else data.val
    if path is None:
        raise Mistake(f"{key} is not set: give a {'beton' if data.format == 'ffcv' else 'folder'}")
    if data.format == "imagefolder":
        assert isinstance(rule, CropRule)
        from tdkd_dist.data.folder_reader import FolderReader

        source = open_pictures(path, key)
        check_classes(data, key, source)
        reader = FolderReader(
            source,
            batch_size=batch_size,
            rule=rule,
            workers=workers,
            device=device,
            auto_augment=data.auto_augment if split == "train" else None,
        )
        return reader, len(source.labels), count_classes(source), source.class_names
    info = check_beton(path, key)
    check_classes(data, key, info)
    check_frames(data, key, info)
    here = staged(info.path, data.stage_to, beat) if data.stage_to else info.path
    say_where_it_is_cached(key, here)
    try:
        from tdkd_dist.data.ffcv_reader import FfcvReader

        opened = FfcvReader(here, batch_size=batch_size, rule=rule, workers=workers, device=device)
        return opened, info.num_samples, info.num_classes, info.class_names
    except ImportError as error:
        raise Mistake(f"data.format=ffcv: {error}; install ffcv, or say data.format=imagefolder") from error


def open_pictures(path: str, key: str) -> Source:
    """What lies at `path`, the value of the configuration's `key` (data.train or data.val).

    Raises `Mistake` starting with `key=path` if nothing here can read it.
    """
    try:
        return open_source(Path(path), key.removeprefix("data."))
    except Mistake as error:
        raise Mistake(f"{key}={error}") from error


def signature_of(source: Source) -> str:
    """A hash of the labels, the pictures' names and their order; no picture is read, nor its size asked for."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels, dtype=np.int64).tobytes())
    for k in range(len(source.labels)):
        digest.update(f"{Path(source.name(k)).name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def count_classes(source: Source) -> int:
    """How many classes a source names or, without names, the largest label + 1."""
    return int(source.labels.max()) + 1 if source.class_names is None else len(source.class_names)
