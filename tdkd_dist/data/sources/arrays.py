"""Small pictures that come as arrays: idx files (MNIST's format) and the CIFAR archives. They are held in memory."""

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.source import Image, of_split, one_line
from tdkd_dist.mistakes import Mistake

IDX_PREFIXES = {"train": ("train",), "val": ("t10k", "test", "val")}
CIFAR_SIDE = 32


class ArraySource:
    """Pictures [N, H, W, 3] and their labels [N]."""

    lossless = True

    def __init__(
        self, kind: str, path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str] | None
    ):
        self.kind, self.path = kind, path
        self.images, self.labels, self.class_names = images, labels, names
        if len(images) != len(labels):
            raise Mistake(f"{path}: {len(images)} pictures but {len(labels)} labels")

    def name(self, index: int) -> str:
        """The file and the position in it."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]; a grey one gets three equal channels."""
        image = self.images[index]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image

    def signature(self) -> str:
        """Hash of pictures and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def open_arrays(path: Path, split: str | None, labels: Path | None) -> ArraySource | None:
    """The idx or CIFAR source at `path`, None if there is none. Raises `Mistake` if there is a broken one."""
    names = [p.name for p in path.iterdir()] if path.is_dir() else [path.name]
    if any("images-idx3" in name for name in names):
        return _open_idx(_find_idx(path, split) if path.is_dir() else path)
    files = _cifar_members(path)
    return None if files is None else _open_cifar(path, files, split)


def _find_idx(folder: Path, split: str | None) -> Path:
    found = of_split([p for p in folder.iterdir() if "images-idx3" in p.name], split, IDX_PREFIXES)
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        hint = "; say --split train or --split val" if split is None else ""
        raise Mistake(f"{folder}: expected one idx image file, found {names}{hint}")
    return found[0]


def _open_idx(path: Path) -> ArraySource:
    label_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if not label_path.is_file():
        raise Mistake(f"{path}: no label file {label_path.name} beside it")
    return ArraySource("idx", path, _read_idx(path, 3), _read_idx(label_path, 1).astype(np.int64), None)


def _read_idx(path: Path, dimensions: int) -> Image:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise Mistake(f"{path}: {one_line(error)}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise Mistake(f"{path}: not an idx file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).astype(np.int64)
    if len(content) != head + shape.prod():
        raise Mistake(f"{path}: {len(content)} bytes, but its header promises {head + shape.prod()}")
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _cifar_members(path: Path) -> dict[str, bytes] | None:
    """The files of a CIFAR archive, or of the folder it unpacks to, by name; None if `path` is neither."""
    if path.is_dir():
        files = {p.name: p for p in path.iterdir() if p.is_file()}
        return {name: p.read_bytes() for name, p in files.items() if _is_cifar(name)} if _is_whole(files) else None
    if not path.name.startswith("cifar") or not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return None
    try:
        with tarfile.open(path) as tar:
            members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
            content = {name: tar.extractfile(m) for name, m in members.items() if _is_cifar(name)}
            files_read = {name: file.read() for name, file in content.items() if file is not None}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise Mistake(f"{path}: {one_line(error)}") from error
    if not _is_whole(files_read):
        raise Mistake(f"{path}: no CIFAR data in it")
    return files_read


def _is_cifar(name: str) -> bool:
    exact = {"train", "test", "meta", "train.bin", "test.bin", "fine_label_names.txt", "batches.meta.txt"}
    return name in exact or name.startswith(("data_batch_", "test_batch", "batches.meta"))


def _is_whole(files: Any) -> bool:
    return (
        "data_batch_1" in files or "data_batch_1.bin" in files or "train.bin" in files or {"train", "meta"} <= {*files}
    )


def _open_cifar(path: Path, files: dict[str, bytes], split: str | None) -> ArraySource:
    if split is None:
        raise Mistake(f"{path}: holds both parts; say --split train or --split val")
    ten = "data_batch_1" in files or "data_batch_1.bin" in files
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    parts = train if split == "train" else ["test_batch" if ten else "test"]
    binary = "data_batch_1.bin" in files or "train.bin" in files
    missing = [p for p in parts if (f"{p}.bin" if binary else p) not in files]
    if missing:
        raise Mistake(f"{path}: {', '.join(missing)} is missing")
    if binary:
        read = [_read_cifar_binary(path, files[f"{p}.bin"], label_bytes=1 if ten else 2) for p in parts]
        text = files.get("batches.meta.txt" if ten else "fine_label_names.txt", b"").decode()
        names = text.split() or None
    else:
        read = [_read_cifar_pickle(path, files[p]) for p in parts]
        meta = _unpickle(path, files["batches.meta" if ten else "meta"])
        names = [n.decode() for n in meta[b"label_names" if ten else b"fine_label_names"]]
    images = np.concatenate([images for images, _ in read]).reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
    labels = np.concatenate([labels for _, labels in read]).astype(np.int64)
    return ArraySource("cifar10" if ten else "cifar100", path, np.ascontiguousarray(images), labels, names)


def _read_cifar_binary(path: Path, content: bytes, label_bytes: int) -> tuple[Image, NDArray[np.int64]]:
    record = label_bytes + 3 * CIFAR_SIDE**2
    if len(content) == 0 or len(content) % record:
        raise Mistake(f"{path}: {len(content)} bytes are not a whole number of {record}-byte records")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _read_cifar_pickle(path: Path, content: bytes) -> tuple[Image, NDArray[np.int64]]:
    batch = _unpickle(path, content)
    labels = batch.get(b"fine_labels", batch.get(b"labels"))
    data = batch.get(b"data")
    if labels is None or not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise Mistake(f"{path}: no CIFAR batch")
    return data.reshape(-1, 3 * CIFAR_SIDE**2), np.asarray(labels, dtype=np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names a pickled array needs."""
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"):
            allowed = {
                "_reconstruct": np.empty(0).__reduce__()[0],
                "ndarray": np.ndarray,
                "dtype": np.dtype,
                "encode": lambda text, encoding: text.encode(encoding) if encoding == "latin1" else None,
            }
            if name in allowed:
                return allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")


def _unpickle(path: Path, content: bytes) -> dict[bytes, Any]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        raise Mistake(f"{path}: not a CIFAR batch: {one_line(error)}") from error
    if not isinstance(batch, dict):
        raise Mistake(f"{path}: not a CIFAR batch")
    return batch
