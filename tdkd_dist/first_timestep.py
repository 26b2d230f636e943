"""What layers have in common that treat the first timestep otherwise. Apart from them: this must import without timm.

Shapes: T timesteps, B images, C channels.
"""

import torch
from torch import Tensor, nn


class KnowsFirst(nn.Module):
    """A layer that treats the first timestep otherwise; x is `[T*B, C, ...]`, T-major.

    `is_first`, which `SpikingNet.step` sets and clears, says of a call on one timestep whether it is the first: a bool,
    or, in graphs that are the same for all, `[B, 1]` of 1 and 0. None: x holds all `num_timesteps`.
    """

    num_timesteps: int
    is_first: bool | Tensor | None

    def at_first(self, x: Tensor) -> Tensor:
        """The output at the first timestep."""
        raise NotImplementedError

    def later(self, x: Tensor) -> Tensor:
        """The output at all timesteps after it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, ...]` in and out, `[B, C, ...]` where `is_first` is set."""
        first, T = self.is_first, self.num_timesteps
        if isinstance(first, Tensor):
            return torch.where(first.view(-1, *[1] * (x.ndim - 1)) > 0, self.at_first(x), self.later(x))
        if first or (T == 1 and first is None):
            return self.at_first(x)
        if first is not None:
            return self.later(x)
        B = x.shape[0] // T
        return torch.cat([self.at_first(x[:B]), self.later(x[B:])])
