"""Whether what was written computes what the student computes, on real pictures.

Shapes: T timesteps, B images, C channels, H, W pixels, K classes.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdkd_dist.anytime import AnytimeStudent, read_picture
from tdkd_dist.calibration import open_labelled
from tdkd_dist.data.crops import CropRule
from tdkd_dist.data.folder_reader import follow
from tdkd_dist.data.sources.source import decode_image
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.students.base import SpikingNet

NOISE = 3.0
"""How much further off than the student's own fp32 a file may be: both round, and a membrane that rounds to the other
side of the threshold changes all that comes after it."""
FLOOR = 0.01
"""Of the logits' spread, what is allowed besides: the fp32 of a few pictures may have had no such membrane."""
SIZES = (1, 3)
"""Of the first batches, so that the batch size is shown to be free; the last one has the rest."""


@dataclass(frozen=True)
class Agreement:
    """How far the logits that were read back are from the student's in float64, over pictures and timesteps."""

    pictures: int
    worst: float
    """The largest difference of a logit."""
    mean: float
    """The mean difference of a logit."""
    own: float
    """The same of the student in fp32."""
    spread: float
    """Standard deviation of the student's logits over pictures, averaged over timesteps and classes."""
    alike: int
    """Pictures whose predicted class is the student's after every timestep."""

    @property
    def holds(self) -> bool:
        """Whether the differences are those of rounding."""
        return self.mean <= NOISE * self.own + FLOOR * self.spread + 1e-9

    def __str__(self) -> str:
        same = f"{self.alike} of {self.pictures} pictures classified alike after every timestep"
        logits = f"logits differ by {self.mean:.2g} on average and {self.worst:.2g} at most"
        return f"{same}; {logits} (the student's own fp32: {self.own:.2g}; their spread: {self.spread:.2g})"


def compare(exact_TBK: Tensor, own_TBK: Tensor, read_TBK: Tensor) -> Agreement:
    """Of the student's logits in float64 and in fp32, and of those read back."""
    read_TBK = read_TBK.double()
    assert read_TBK.shape == exact_TBK.shape, (read_TBK.shape, exact_TBK.shape)
    off_TBK = (read_TBK - exact_TBK).abs()
    alike_TB = ensembles(read_TBK).argmax(-1) == ensembles(exact_TBK).argmax(-1)
    return Agreement(
        pictures=exact_TBK.shape[1],
        worst=float(off_TBK.max()),
        mean=float(off_TBK.mean()),
        own=float((own_TBK.double() - exact_TBK).abs().mean()),
        spread=float(exact_TBK.std(1).mean()),
        alike=int(alike_TB.all(0).sum()),
    )


@torch.no_grad()
def exact(model: SpikingNet, images: Tensor) -> Tensor:
    """The student's logits `[T, B, K]` in float64."""
    logits_TBK: Tensor = copy.deepcopy(model).double()(images.double())
    return logits_TBK


def batches(images: Tensor) -> list[Tensor]:
    """Images `[B, C, H, W]`, or frames `[T, B, C, H, W]`, in batches of 1, 3 and the rest."""
    sizes = [*SIZES, images.shape[-4] - sum(SIZES)]
    return [batch.contiguous() for batch in torch.split(images, sizes, dim=-4)]


def real_pictures(student: AnytimeStudent, path: Path, given: list[Path], count: int) -> tuple[Tensor, str]:
    """`count` uint8 pictures `[B, C, H, W]`, or recordings' frames `[B, T, C, H, W]`, and where they are from.

    `path` is the student's file. Those that are given: files, or whatever pictures are read from; else the validation
    set of the run that the file lies in; else parts of the photograph that Matplotlib brings. Raises `Mistake` for what
    cannot be read.
    """
    recordings = student.frames is not None
    if given and not recordings and not (len(given) == 1 and (given[0].is_dir() or given[0].suffix in SETS)):
        pictures = [read_picture(p, student.image_size, student.crop_pct) for p in given]
        return torch.stack([pictures[k % len(pictures)] for k in range(count)]), f"{len(given)} files"
    source = given[0] if given else _validation_set(path)
    if source is not None:
        loader, _ = open_labelled(student, source, name="--pictures", batch_size=count, workers=1)
        try:
            found = next(iter(loader))[0][:count].clone()
            return found[torch.arange(count) % len(found)], str(source)
        finally:
            loader.close()
    require(not recordings, "this student reads recordings: give a beton of them with --pictures")
    return _photograph(student, count), "parts of Matplotlib's photograph"


SETS = (".beton", ".ffcv", ".tar", ".tgz", ".parquet")
"""Suffixes of files that hold many pictures."""


def _validation_set(path: Path) -> Path | None:
    from tdkd_dist.recipe import read_config

    config = path.parent / "config.yaml"
    if not config.is_file():
        return None
    try:
        source = read_config(config).data.val
    except (Mistake, ModuleNotFoundError):  # reading it takes the extra `train`
        return None
    return Path(source) if source is not None and Path(source).exists() else None


def _photograph(student: AnytimeStudent, count: int) -> Tensor:
    """Random parts of a photograph, as in training."""
    import matplotlib

    require(student.model.in_chans == 3, f"this student reads {student.model.in_chans} channels, no pictures")
    path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    pixels_HWC, size = decode_image(path, str(path)), student.image_size
    sizes = (np.full(count, n) for n in pixels_HWC.shape[:2])
    plans = CropRule(size, "random_resized").plan(0, np.arange(count), *sizes)
    return torch.stack([torch.from_numpy(follow(plan, pixels_HWC, size)).permute(2, 0, 1) for plan in plans])
