"""The order of the classes. A wrong one trains quietly and ruins the distillation: the teacher's logits are timm's.

timm's ImageNet-1k order is that of the sorted synsets.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.data.sources.source import Image, Source
from tdkd_dist.mistakes import Mistake

SYNSET = re.compile(r"n\d{8}")


def synsets_of(names: Iterable[str], labels: Iterable[int]) -> list[str] | None:
    """The synset of each label, if all the pictures' names tell it and agree."""
    found: dict[int, str] = {}
    for name, label in zip(names, labels, strict=True):
        match = SYNSET.search(name)
        if match is None or found.setdefault(int(label), match[0]) != match[0]:
            return None
    return [found[i] for i in range(len(found))] if sorted(found) == list(range(len(found))) else None


def teacher_order(names: Sequence[str] | None) -> list[str] | None:
    """timm's order of ImageNet-1k's synsets if `names` are these, in any order; else None."""
    if names is None or len(names) != 1000 or not all(SYNSET.fullmatch(name) for name in names):
        return None
    from timm.data import ImageNetInfo

    order = list(ImageNetInfo("imagenet-1k").label_names())
    return order if set(order) == set(names) else None


def check_order(names: Sequence[str] | None, key: str) -> None:
    """Raise `Mistake` starting with `key` if `names` are ImageNet-1k's synsets in another order than timm's."""
    order = teacher_order(names)
    if order is not None and names is not None and list(names) != order:
        at = next(i for i, (name, right) in enumerate(zip(names, order, strict=True)) if name != right)
        raise Mistake(f"{key}: its class {at} is {names[at]}, but the teacher's is {order[at]}: write it again")


class InTeacherOrder:
    """A source, with its labels renumbered if it has ImageNet-1k's classes in another order than timm's.

    Nothing is read before it is asked for: to know the classes may mean passing through 150 GB of headers.
    """

    def __init__(self, source: Source):
        self.source = source
        self.kind, self.path, self.lossless = source.kind, source.path, source.lossless

    @cached_property
    def class_names(self) -> Sequence[str] | None:
        """A name for each label, where the source has them."""
        return teacher_order(self.source.class_names) or self.source.class_names

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The label of every picture, [N]."""
        names, order = self.source.class_names, self.class_names
        if names is None or order is None or list(names) == list(order):
            return self.source.labels
        at = {name: label for label, name in enumerate(order)}
        return np.array([at[name] for name in names], dtype=np.int64)[self.source.labels]

    def name(self, index: int) -> str:
        """What to call picture `index` in a message."""
        return self.source.name(index)

    def read(self, index: int) -> Image:
        """Picture `index`, [H, W, 3]."""
        return self.source.read(index)

    def signature(self) -> str:
        """That of the source."""
        return self.source.signature()
