"""Where pictures come from: one file a form; `open_source` chooses."""

from pathlib import Path

from tdkd_dist.data.sources import archives, arrays
from tdkd_dist.data.sources.classes import InTeacherOrder
from tdkd_dist.data.sources.folder import FolderSource
from tdkd_dist.data.sources.guarded import Guarded, reading
from tdkd_dist.data.sources.source import Source
from tdkd_dist.mistakes import Mistake


def open_source(path: Path, split: str | None = None, labels: Path | None = None) -> Source:
    """The reader for whatever lies at `path`; `split` (train or val) says which part of a source that holds both.

    ImageNet-1k's classes are numbered as timm's teachers number them, whatever the source's own order.
    `labels` are the ground truth of pictures that carry none, see `archives.FlatSource`. Raises `Mistake` when
    nothing here can read it.
    """
    with reading(path):
        return Guarded(_open(path, split, labels))


def _open(path: Path, split: str | None, labels: Path | None) -> Source:
    if not path.exists():
        raise Mistake(f"{path}: no such file or folder")
    if path.is_dir() and split is not None and (path / split).is_dir():
        path = path / split
    for opener in (arrays.open_arrays, archives.open_archive):
        source = opener(path, split, labels)
        if source is not None:
            return InTeacherOrder(source)
    if path.is_dir():
        if split is None:
            archives.refuse_both(path, {part for part in archives.HALVES if (path / part).is_dir()})
        return FolderSource(path)  # its order is that of the sorted names, and so is timm's
    raise Mistake(f"{path}: neither pictures in class folders, tar, parquet, idx nor CIFAR files")
