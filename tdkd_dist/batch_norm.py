"""Batch norm over all ranks, made of parts that torch.compile traces; of an image that is repeated; of timesteps.

`nn.SyncBatchNorm` cuts a compiled network into a graph a layer, waits for the device in each, and runs on CUDA alone.
Here a layer's statistics travel in one functional all-reduce forward and one backward, over nccl as over gloo.

Shapes: x and y are `[n, C, ...]`; T timesteps, B images; S two rows of sums a channel.
"""

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkd_dist.mistakes import Mistake

Net = TypeVar("Net", bound=nn.Module)


def synchronise(net: Net) -> Net:
    """Make every batch norm of `net` take its statistics in training over all ranks, and return `net`.

    In place; parameters, buffers and their names stay. With batches of equal size, W ranks then compute what one
    process computes of all their samples (Ioffe & Szegedy 2015): output, running statistics and, once averaged over
    ranks, gradients. In eval mode, on one rank and outside a process group nothing changes. Raises `Mistake`, naming
    `train.sync_bn`, for a network with another kind of batch norm than those below.
    """
    for module in net.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, _OverRanks):
            continue
        kind = next((kind for plain, kind in _KINDS if type(module) is plain), None)
        if kind is None:
            raise Mistake(f"train.sync_bn: {type(module).__name__} can't be synchronised; set train.sync_bn=false")
        module.__class__ = kind  # which keeps parameters, buffers, hooks and settings as they are
    return net


def batch_norm_repeated(bn: nn.Module, x: Tensor, repeats: int) -> Tensor:
    """`bn(x)`, leaving the running statistics that `repeats` copies of x in one batch would have left.

    Output, gradients and running mean do not depend on the number of copies; the running variance does, since it is
    of n/(n-1) times the batch's, n counting every copy on every rank.
    """
    if not isinstance(bn, _BatchNorm):  # folded into the convolution before it
        return cast(Tensor, bn(x))
    if isinstance(bn, _OverRanks) and bn.synchronised:
        return bn.forward(x, repeats)
    before = None if bn.running_var is None else bn.running_var.clone()
    y: Tensor = bn(x)
    if not bn.training or bn.running_var is None or before is None or repeats == 1:
        return y
    n = x.numel() // x.shape[1]
    correction = (n - 1) / n * repeats * n / (repeats * n - 1)
    kept = before * (1 - _momentum(bn))
    # Through .data, since autograd guards running_var for a backward pass that reads it in eval mode only.
    bn.running_var.data.copy_(kept + (bn.running_var - kept) * correction)
    return y


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


class FirstStatistics(KnowsFirst, nn.BatchNorm2d):
    """Batch norm whose first timestep has a mean and a variance of its own; weight and bias are those of all.

    Later currents find membranes that earlier ones have charged, so at t = 1 fewer neurons fire, and what pools over
    timesteps normalises it least. Made of a `BatchNorm2d` by `give_first_statistics`.
    """

    first_running_mean: Tensor
    first_running_var: Tensor

    def at_first(self, x: Tensor) -> Tensor:
        """By the first timestep's statistics."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return self._normalise(x, self.first_running_mean, self.first_running_var)

    def later(self, x: Tensor) -> Tensor:
        """By those that all later timesteps share."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self._normalise(x, self.running_mean, self.running_var)

    def _normalise(self, x: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        assert self.momentum is not None
        return F.batch_norm(x, mean_C, var_C, self.weight, self.bias, self.training, self.momentum, self.eps)


def give_first_statistics(net: nn.Module, num_timesteps: int) -> None:
    """Make every `BatchNorm2d` of `net`, in place, one with statistics of its own for the first timestep.

    They are new buffers `first_running_mean` and `first_running_var` (timm's `distribute_bn` goes by such names), and
    start as the layer's are; other parameters, buffers and names stay.
    """
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            assert module.running_mean is not None
            assert module.running_var is not None
            module.__class__ = FirstStatistics
            module.num_timesteps, module.is_first = num_timesteps, None  # type: ignore[assignment]
            module.register_buffer("first_running_mean", module.running_mean.clone())
            module.register_buffer("first_running_var", module.running_var.clone())


def _momentum(bn: _BatchNorm) -> float | Tensor:
    """The weight of a batch in the running statistics, once `num_batches_tracked` counts it."""
    if bn.momentum is not None:
        return bn.momentum
    assert bn.num_batches_tracked is not None
    assert bn.running_var is not None
    return 1 / bn.num_batches_tracked.to(bn.running_var.dtype)


class _OverRanks(_BatchNorm):
    """What makes a batch norm one over all ranks; comes before the class that it extends."""

    @property
    def synchronised(self) -> bool:
        """Whether the next pass takes other ranks' samples into account."""
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        """As the class that it extends; `repeats` as in `batch_norm_repeated`."""
        if not self.synchronised:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = self._normalise_over_ranks(x, self.running_mean, self.running_var, repeats)
        if isinstance(self, BatchNormAct2d):
            y = self.act(self.drop(y))
        return y

    def _normalise_over_ranks(
        self, x: Tensor, running_mean_C: Tensor | None, running_var_C: Tensor | None, repeats: int = 1
    ) -> Tensor:
        mean_C, var_C = _statistics(x)
        if running_mean_C is not None and running_var_C is not None and self.num_batches_tracked is not None:
            n = repeats * dist.get_world_size() * (x.numel() // x.shape[1])
            with torch.no_grad():
                momentum = _momentum(self)
                running_mean_C.add_(momentum * (mean_C - running_mean_C))
                running_var_C.add_(momentum * (var_C * (n / (n - 1)) - running_var_C))
        y: Tensor = _Normalise.apply(x, mean_C, var_C, self.weight, self.bias, self.eps)
        return y


class _BatchNorm1d(_OverRanks, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_OverRanks, nn.BatchNorm2d):
    pass


class _BatchNormAct2d(_OverRanks, BatchNormAct2d):  # type: ignore[misc]
    pass


class _FirstStatistics(FirstStatistics, _OverRanks):  # type: ignore[misc]  # forward is that of the former
    def _normalise(self, x: Tensor, mean_C: Tensor, var_C: Tensor) -> Tensor:
        over_ranks = self.synchronised
        return self._normalise_over_ranks(x, mean_C, var_C) if over_ranks else super()._normalise(x, mean_C, var_C)


_KINDS: tuple[tuple[type[_BatchNorm], type[_BatchNorm]], ...] = (
    (nn.BatchNorm1d, _BatchNorm1d),
    (nn.BatchNorm2d, _BatchNorm2d),
    (FirstStatistics, _FirstStatistics),
    (BatchNormAct2d, _BatchNormAct2d),
)


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` over all ranks, in fp32 or wider."""
    var_C, mean_C = torch.var_mean(x.to(_wide(x)), _all_but_channels(x), correction=0)
    # The variance is a difference of two means, which loses digits where the mean is large: not in float64.
    mean_square_2C = torch.cat([mean_C.double(), var_C.double() + mean_C.double().square()])
    mean_C, square_C = (_sum_over_ranks(mean_square_2C) / dist.get_world_size()).chunk(2)
    var_C = (square_C - mean_C.square()).clamp(min=0)
    return mean_C.to(_wide(x)), var_C.to(_wide(x))


class _Normalise(torch.autograd.Function):
    """Batch norm with given statistics, which are those of all ranks' x: the gradient goes through them.

    Each rank's gradient of x is that of the sum of all ranks' losses; averaging the parameters' gradients over ranks,
    as data-parallel training does, makes them those of the mean loss.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean_C: Tensor, var_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean_C, var_C, weight_C)
        ctx.eps = eps
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, training=False, eps=eps).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, Tensor | None, None]:
        x, mean_C, var_C, weight_C = ctx.saved_tensors
        along_C = (-1, *[1] * (x.ndim - 2))
        invstd_C = (var_C + ctx.eps).rsqrt()
        g, centred = grad.to(_wide(x)), x.to(_wide(x)) - mean_C.view(along_C)
        sum_g_C = g.sum(_all_but_channels(x))
        sum_gx_C = (g * centred).sum(_all_but_channels(x)) * invstd_C
        n = dist.get_world_size() * (x.numel() // x.shape[1])
        mean_g_C, mean_gx_C = (_sum_over_ranks(torch.cat([sum_g_C, sum_gx_C])) / n).chunk(2)
        slope_C = invstd_C if weight_C is None else invstd_C * weight_C
        towards_mean = centred * (mean_gx_C * invstd_C).view(along_C)
        grad_x = (g - mean_g_C.view(along_C) - towards_mean) * slope_C.view(along_C)
        wants_weight, wants_bias = ctx.needs_input_grad[3:5]
        affine = sum_gx_C if wants_weight else None, sum_g_C if wants_bias else None
        return grad_x.to(x.dtype), None, None, *affine, None


def _sum_over_ranks(x: Tensor) -> Tensor:
    # The operators themselves: `funcol.all_reduce` waits by itself where it is traced, and only there.
    operators, world = torch.ops._c10d_functional, dist.group.WORLD
    assert world is not None
    summed: Tensor = operators.wait_tensor(operators.all_reduce(x.contiguous(), "sum", world.group_name))
    return summed


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
