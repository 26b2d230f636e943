"""A tree of pictures and its beton. `conftest.py` makes the fixtures known to all tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdkd_dist.data.beton.manifest import WriteOptions
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources.folder import FolderSource

SIZES = [(60, 80), (300, 200), (50, 50), (700, 90), (33, 47), (128, 128)]


def picture(seed: int, height: int, width: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 6, 12 and 18 pictures of several sizes."""
    root = tmp_path_factory.mktemp("tree")
    for c, name in enumerate(("cat", "dog", "owl")):
        (root / name).mkdir()
        for i in range(6 * (c + 1)):
            picture(100 * c + i, *SIZES[i % 6]).save(root / name / f"{i:02d}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def beton(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "tree.beton"
    write(FolderSource(tree), path, WriteOptions(max_side=256))
    return path


@pytest.fixture
def copy(beton: Path, tmp_path: Path) -> Path:
    """A beton with its manifest, to be damaged."""
    for name in (beton.name, beton.name + ".json"):
        shutil.copy(beton.with_name(name), tmp_path / name)
    return tmp_path / beton.name


def stored(path: Path) -> Iterator[tuple[np.ndarray, int, bool]]:
    """(pixels, label, whether it is a JPEG) of each sample, found by FFCV's reader and decoded by OpenCV."""
    import cv2
    from ffcv.reader import Reader

    reader = Reader(str(path))
    content = path.read_bytes()
    sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
    for sample in reader.metadata:
        field, ptr = sample["f0"], int(sample["f0"]["data_ptr"])
        data = np.frombuffer(content[ptr : ptr + sizes[ptr]], np.uint8)
        if field["mode"] == 0:
            pixels = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        else:
            pixels = data.reshape(field["height"], field["width"], 3)
        yield pixels, int(sample["f1"]), field["mode"] == 0
