"""Pictures whose label is their own index, so that batches tell who is in them, and loaders of them.

`conftest.py` makes the fixtures known to all tests.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdkd_dist.config import DataConfig
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.loaders import (
    Reader,
    TrainLoader,
    make_train_loader,
)
from tdkd_dist.data.sources.source import Image as Pixels

SIZE = 16
CPU = torch.device("cpu")
COUNTS = (1, 2, 7, 203)


class Numbered:
    """`count` pictures of several sizes; the label of each is its index."""

    kind, path, class_names = "numbered", Path("numbered"), None

    def __init__(self, count: int, lossless: bool = True):
        self.labels, self.lossless = np.arange(count), lossless

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Pixels:
        rng = np.random.default_rng(index)
        height, width = rng.integers(20, 60, 2)
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        return np.asarray(small.resize((int(width), int(height)), Image.Resampling.BICUBIC))

    def signature(self) -> str:
        return str(len(self.labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`N.beton` and the ImageFolder tree `N` of the same pictures, one class each, for every count."""
    root = tmp_path_factory.mktemp("data")
    for count in COUNTS:
        source = Numbered(count)
        write(source, root / f"{count}.beton")
        for i in range(count):
            (root / str(count) / f"{i:04d}").mkdir(parents=True)
            Image.fromarray(source.read(i)).save(root / str(count) / f"{i:04d}" / "x.png")
    return root


def config(folder: Path, count: int, format: str = "ffcv", **kwargs: object) -> DataConfig:
    path = str(folder / (f"{count}.beton" if format == "ffcv" else str(count)))
    return DataConfig(train=path, val=path, format=format, image_size=SIZE, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["ffcv", "imagefolder"])
def readers(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[int, Reader]]:
    """One reader a set, shared between ranks and world sizes: FFCV compiles each."""
    if request.param == "ffcv":
        pytest.importorskip("ffcv")
    made = {}
    for count in COUNTS:
        data = config(folder, count, request.param)
        loader = make_train_loader(
            data, batch_size=1, micro_batch=1, rank=0, world_size=1, seed=5, device=CPU, workers=2
        )
        made[count] = loader._reader
    yield made
    for reader in made.values():
        reader.close()


def train(reader: Reader, count: int, batch_size: int, rank: int, world: int) -> TrainLoader:
    return TrainLoader(reader, count, None, batch_size=batch_size, rank=rank, world_size=world, seed=5)


def seen(batches: Iterable[Batch]) -> list[tuple[int, bytes]]:
    """(index, pixels) of each sample, in order."""
    return [(int(y), x.numpy().tobytes()) for images, labels in batches for x, y in zip(images, labels, strict=True)]
