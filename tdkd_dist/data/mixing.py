"""Mixup and cutmix of whole micro-batches, on the device (Zhang et al. 2018, Yun et al. 2019); timm's.

Shapes: B images, C channels, H and W pixels, K classes.
"""

import numpy as np
from timm.data import Mixup
from torch import Tensor


class Mixer:
    """timm's `Mixup` with draws that are a function of (seed, step, rank, micro-batch).

    `mixup` and `cutmix` are the parameters of their beta distributions; 0 switches one off. With both, each batch
    takes one of them at random.
    """

    def __init__(self, *, mixup: float, cutmix: float, num_classes: int, seed: int, rank: int) -> None:
        self._mixup = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_classes)
        self._active = mixup > 0 or cutmix > 0
        self._seed, self._rank = seed, rank

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Mixed images (in place) and soft labels `[B, K]`; with nothing switched on, what was given."""
        if not self._active:
            return images_BCHW, labels_B
        state = np.random.get_state()
        # timm draws from numpy's global generator.
        np.random.seed([self._seed, step, self._rank, micro_batch])
        try:
            # All frames of a sample are mixed alike.
            mixed, soft_BK = self._mixup(images_BCHW.flatten(1, -3), labels_B)
        finally:
            np.random.set_state(state)
        return mixed.view_as(images_BCHW), soft_BK
