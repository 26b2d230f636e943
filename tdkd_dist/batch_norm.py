"""Batch norm over all ranks, made of parts that torch.compile traces; of an image that is repeated; of timesteps.

`nn.SyncBatchNorm` cuts a compiled network into a graph a layer, waits for the device in each, and runs on CUDA alone.
Here a layer's statistics travel in one functional all-reduce forward and one backward, over nccl as over gloo.

Shapes: x and y are `[n, C, ...]`; T timesteps, B images; S two rows of sums a channel.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkd_dist.first_timestep import KnowsFirst
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

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, ...]` in and out, `[B, C, ...]` where `is_first` is set."""
        everything = self.training and self.is_first is None and self.num_timesteps > 1
        if not (everything and torch.compiler.is_compiling()):
            return super().forward(x)
        # Inductor would write a concatenation to memory, between the convolution and the neurons.
        B, over_ranks = x.shape[0] // self.num_timesteps, isinstance(self, _OverRanks) and self.synchronised
        mean_SC, var_SC = _statistics(x[:B], x[B:], over_ranks=over_ranks)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        running = (self.first_running_mean, self.first_running_var), (self.running_mean, self.running_var)
        for part, mean_C, var_C, (running_mean_C, running_var_C) in zip(
            (x[:B], x[B:]), mean_SC, var_SC, running, strict=True
        ):
            _track(
                self,
                part,
                mean_C,
                var_C,
                running_mean_C,
                running_var_C,
                copies=dist.get_world_size() if over_ranks else 1,
            )
        y: Tensor = _NormaliseFirst.apply(
            x, mean_SC, var_SC, self.weight, self.bias, self.eps, self.num_timesteps, over_ranks
        )
        return y

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
        (mean_C,), (var_C,) = _statistics(x, over_ranks=True)
        _track(self, x, mean_C, var_C, running_mean_C, running_var_C, copies=repeats * dist.get_world_size())
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
def _statistics(*parts: Tensor, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each part, `[S, C]`, in fp32 or wider."""
    wide = _wide(parts[0])
    found = [torch.var_mean(x.to(wide), _all_but_channels(x), correction=0) for x in parts]
    var_SC, mean_SC = (torch.stack(one) for one in zip(*found, strict=True))
    if not over_ranks:
        return mean_SC, var_SC
    # The variance is a difference of two means, which loses digits where the mean is large: not in float64.
    mean_square_2SC = torch.stack([mean_SC.double(), var_SC.double() + mean_SC.double().square()])
    mean_SC, square_SC = _sum_over_ranks(mean_square_2SC) / dist.get_world_size()
    var_SC = (square_SC - mean_SC.square()).clamp(min=0)
    return mean_SC.to(wide), var_SC.to(wide)


@torch.no_grad()
def _track(
    bn: _BatchNorm,
    x: Tensor,
    mean_C: Tensor,
    var_C: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    *,
    copies: int,
) -> None:
    """Move the running statistics towards a batch's, which so many times x make up."""
    if running_mean_C is None or running_var_C is None or bn.num_batches_tracked is None:
        return
    n = copies * (x.numel() // x.shape[1])
    momentum = _momentum(bn)
    running_mean_C.add_(momentum * (mean_C - running_mean_C))
    running_var_C.add_(momentum * (var_C * (n / (n - 1)) - running_var_C))


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


class _NormaliseFirst(torch.autograd.Function):
    """The same of T timesteps at once, the first with statistics of its own: S = 2 rows of them, first and later."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean_SC: Tensor,
        var_SC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        eps: float,
        num_timesteps: int,
        over_ranks: bool,
    ) -> Tensor:
        invstd_SC = (var_SC + eps).rsqrt()
        ctx.save_for_backward(x, mean_SC, invstd_SC, weight_C)
        ctx.constants = num_timesteps, over_ranks
        x_TB, along = _timesteps(x, num_timesteps)
        scale_SC = invstd_SC * weight_C
        y_TB = x_TB.to(_wide(x)) * along(scale_SC) + along(bias_C - mean_SC * scale_SC)
        return y_TB.flatten(0, 1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, mean_SC, invstd_SC, weight_C), (T, over_ranks) = ctx.saved_tensors, ctx.constants
        x_TB, along = _timesteps(x, T)
        g_TB, _ = _timesteps(grad.to(_wide(grad)), T)
        normal_TB = (x_TB.to(_wide(x)) - along(mean_SC)) * along(invstd_SC)
        sums_2TC = torch.stack([v.sum([1, *range(3, v.ndim)]) for v in (g_TB, g_TB * normal_TB)])
        sums_2SC = torch.stack([sums_2TC[:, 0], sums_2TC[:, 1:].sum(1)], 1)
        n = x.numel() // x.shape[1] // T
        n_S1 = torch.stack([sums_2SC.new_full((1,), n), sums_2SC.new_full((1,), n * (T - 1))])
        mean_g_SC, mean_gx_SC = (
            _sum_over_ranks(sums_2SC) / (n_S1 * dist.get_world_size()) if over_ranks else sums_2SC / n_S1
        )
        grad_TB = (g_TB - along(mean_g_SC) - normal_TB * along(mean_gx_SC)) * along(invstd_SC * weight_C)
        grad_bias, grad_weight = sums_2SC.sum(1)
        return grad_TB.flatten(0, 1).to(x.dtype), None, None, grad_weight, grad_bias, None, None, None


def _timesteps(x: Tensor, T: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`[T, B, C, ...]` of `[T*B, C, ...]`, and what gives it the rows `[2, C]` of the first and the later timesteps."""
    x_TB = x.view(T, x.shape[0] // T, *x.shape[1:])

    def along(v_SC: Tensor) -> Tensor:
        v_TC = torch.cat([v_SC[:1], v_SC[1:].expand(T - 1, -1)])
        return v_TC.view(T, 1, -1, *[1] * (x.ndim - 2))

    return x_TB, along


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
