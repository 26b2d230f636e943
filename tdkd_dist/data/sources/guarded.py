"""The boundary of the sources: whatever a reader raises over a file of others becomes a line about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.source import Image, Source, one_line
from tdkd_dist.mistakes import Mistake

MOST_CLASSES = 1_000_000
"""As `student.num_classes` may be."""


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn what is raised inside into a `Mistake` that says where, and how to mend it."""
    try:
        yield
    except Mistake:
        raise
    except Exception as error:  # a damaged file may break its reader anywhere
        what = f"{type(error).__name__}: {one_line(error)}"
        raise Mistake(f"{where}: damaged, or of another form ({what}); get it anew, or leave it out") from error


def checked_labels(labels: NDArray[np.int64], path: Path) -> NDArray[np.int64]:
    """The labels [N] themselves. Raises `Mistake` if they are no classes from 0 on."""
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise Mistake(f"{path}: its labels are {labels.dtype} {list(labels.shape)}; one integer each wanted")
    if len(labels) and not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise Mistake(f"{path}: a label is {wrong}: must be in 0 to {MOST_CLASSES - 1:,}")
    return labels


class Guarded:
    """A source whose every answer is an answer or a `Mistake`."""

    def __init__(self, source: Source):
        self.source = source
        self.kind, self.path, self.lossless = source.kind, source.path, source.lossless

    @property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        with reading(f"{self.path}: its classes"):
            return self.source.class_names

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]: from 0 on."""
        with reading(f"{self.path}: its labels"):
            return checked_labels(self.source.labels, self.path)

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""
        with reading(f"{self.path}: the name of picture {index}"):
            return self.source.name(index)

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]."""
        with reading(self.name(index)):
            return self.source.read(index)

    def signature(self) -> str:
        """That of the source."""
        with reading(self.path):
            return self.source.signature()
