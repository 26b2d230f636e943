"""What readers and loaders hand out.

Shapes: B images, C channels, H and W pixels.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Borrowed images and labels: the reader writes the next ones over them as soon as these are asked for.

    What is computed from them may be kept; of themselves, only copies (`clone`). FFCV's are views of a ring of buffers,
    so that what was kept is still right for a while, and then silently another batch's.
    """

    images_BCHW: Tensor
    """uint8 `[B, 3, H, W]`, channels_last; of event recordings float32 frames `[B, T, C, H, W]`."""
    labels_B: Tensor
    """int64 `[B]`."""
