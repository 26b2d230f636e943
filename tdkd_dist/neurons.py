"""Spiking neurons over a folded batch: integrate-and-fire, leaky, and leaky with a learned decay.

Shapes: T timesteps, B samples, ... anything (usually C, H, W). A multi-step layer reads and returns `[T*B, ...]`,
T-major. `m` is the membrane measured from its reset value (v - v_r): 0 at the start, unless `v_init` says otherwise.
What is left of that start after the first leak is added to the first current, which `first_scale` multiplies.

The arithmetic of a timestep is `_charge`, `_fire` and `_reset`. Three things run it: `SpikingNeuron.step` (plain
operations; unrolled over T it is what torch.compile fuses into one kernel), `_FoldedNeuron` (eager mode: in place,
keeping only the layer's input for the backward pass, which computes the membranes again) and `_step_without_gradient`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdkd_dist.mistakes import Mistake
from tdkd_dist.neuron_config import NeuronConfig

__all__ = ["NeuronConfig", "SpikingNeuron"]

# Surrogate derivatives at u = v - threshold, into `out` if it is given; it may be u itself. Eager mode on a CPU needs
# that: a fresh tensor an operation costs more than the arithmetic. Compiled code must not: whatever is written in place
# is kept for the backward pass instead of computed again.


def _sigmoid(u: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    y = torch.sigmoid(torch.mul(u, a, out=out), out=out)
    return torch.mul(torch.addcmul(y, y, y, value=-1, out=out), a, out=out)


def _atan(u: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    squared = torch.square(torch.mul(u, math.pi / 2 * a, out=out), out=out)
    return torch.mul(torch.reciprocal(torch.add(squared, 1, out=out), out=out), a / 2, out=out)


def _rectangle(u: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    inside = torch.lt(torch.abs(u, out=out), 0.5 / a, out=out).to(u.dtype)
    return torch.mul(inside, a, out=out)


def _triangle(u: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    slope = torch.add(torch.mul(torch.abs(u, out=out), -a * a, out=out), a, out=out)
    return torch.clamp(slope, min=0, out=out)


SURROGATES: dict[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {
    "sigmoid": _sigmoid,
    "atan": _atan,
    "rectangle": _rectangle,
    "triangle": _triangle,
}
"""The derivative of every surrogate."""


class _Dynamics(NamedTuple):
    gap: float
    """Threshold minus reset value: m fires from here on."""
    drop: float | None
    """What a soft reset subtracts; None: hard reset."""
    surrogate: str
    alpha: float
    detach_reset: bool


def _charge(x: Tensor, m: Tensor, decay: float | Tensor, out: Tensor | None = None) -> Tensor:
    if isinstance(decay, Tensor):
        return torch.mul(m, decay, out=out).add_(x)
    return torch.add(x, m, alpha=decay, out=out)


class _First(NamedTuple):
    """What the first timestep's current is multiplied by and what is added; both broadcast to it, None: nothing."""

    scale: Tensor | None
    offset: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The first charge."""
        h = x.to(_state_dtype(x)) if self.scale is None else x * self.scale
        return h if self.offset is None else h + self.offset


def _start(x: Tensor, first: _First) -> Tensor:
    """The first charge, as a computation of its own.

    Not the sum with a membrane of zeros: Inductor makes all layers of a shape share one, and AOTAutograd's partitioner
    keeps what is computed from it, taking the first layer and the last for too far apart to compute it again. Nor x
    itself: a part of all timesteps' currents that is read twice, which makes Inductor write all of them to memory. It
    takes out sums with 0 and copies, but not this.
    """
    h = first.of(x)
    return h if h is not x else x.neg().neg()


def _fire(h: Tensor, gap: float, out: Tensor) -> Tensor:
    return torch.ge(h, gap, out=out)


def _reset(h: Tensor, s: Tensor, drop: float | None, out: Tensor | None = None) -> Tensor:
    if drop is None:
        return torch.addcmul(h, h, s, value=-1, out=out)
    return torch.sub(h, s, alpha=drop, out=out)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _step_without_gradient(
    x: Tensor, m: Tensor | None, decay: float | Tensor, first: _First, k: _Dynamics
) -> tuple[Tensor, Tensor]:
    """Spikes and membrane of one timestep in eager mode, written once each; x and m are left as they are."""
    h = first.of(x) if m is None else _charge(x, m, decay)
    s = _fire(h, k.gap, out=torch.empty_like(x))
    return s, _reset(h, s, k.drop, out=None if h is x else h)


class _Spike(torch.autograd.Function):
    """The step function at `gap`, with a surrogate's derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gap: float, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.constants = gap, surrogate, alpha
        return torch.ge(h, gap).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (h,) = ctx.saved_tensors
        gap, surrogate, alpha = ctx.constants
        return SURROGATES[surrogate](h - gap, alpha, None) * grad, None, None, None


class _FoldedNeuron(torch.autograd.Function):
    """All T timesteps of a layer, `x_TB` `[T, B, ...]` to spikes of the same shape.

    `scale` and `offset` are those of `_First`. Besides it saves `x_TB` alone. The backward pass fills one buffer with
    the membranes after each charge and then, from the last step to the first, overwrites each with the gradient of its
    input.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TB: Tensor, decay: float | Tensor, scale: Tensor | None, offset: Tensor | None, k: _Dynamics
    ) -> Tensor:
        m = torch.zeros_like(x_TB[0], dtype=_state_dtype(x_TB))
        s_TB = _steps_like(m, len(x_TB), x_TB.dtype)
        for t, (x, s) in enumerate(zip(x_TB, s_TB, strict=True)):
            _charge(x, m, decay, out=m)
            if t == 0:
                _change_first(m, scale, offset)
            _fire(m, k.gap, out=s)
            _reset(m, s, k.drop, out=m)
        ctx.save_for_backward(x_TB, decay if isinstance(decay, Tensor) else None, scale, offset)
        ctx.constants = decay if isinstance(decay, float) else None, k
        return s_TB

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TB: Tensor) -> tuple[Tensor | None, ...]:
        (x_TB, learned, scale, offset), (constant, k) = ctx.saved_tensors, ctx.constants
        decay = constant if learned is None else learned
        m = torch.zeros_like(x_TB[0], dtype=_state_dtype(x_TB))
        s, d, grad_s = torch.empty_like(m), torch.empty_like(m), torch.empty_like(m)
        h_TB = _steps_like(m, len(x_TB), m.dtype)
        for t, (x, h) in enumerate(zip(x_TB, h_TB, strict=True)):
            _charge(x, m, decay, out=h)
            if t == 0:
                _change_first(h, scale, offset)
            _reset(h, _fire(h, k.gap, out=s), k.drop, out=m)

        grad_m = m.zero_()  # of the membrane after the reset; nothing reads the last one
        grad_decay = m.new_zeros(1) if learned is not None else None
        for t in reversed(range(len(x_TB))):
            h = h_TB[t]
            derivative = SURROGATES[k.surrogate](torch.sub(h, k.gap, out=d), k.alpha, d)
            if k.detach_reset:
                grad_s.copy_(grad_TB[t])
            elif k.drop is None:
                torch.addcmul(grad_TB[t], grad_m, h, value=-1, out=grad_s)
            else:
                torch.sub(grad_TB[t], grad_m, alpha=k.drop, out=grad_s)
            if k.drop is None:
                grad_m.addcmul_(grad_m, _fire(h, k.gap, out=s), value=-1)
            grad_h = torch.addcmul(grad_m, grad_s, derivative, out=h)
            if grad_decay is not None and t > 0:
                before = h_TB[t - 1]
                grad_decay += _reset(before, _fire(before, k.gap, out=s), k.drop, out=d).mul_(grad_h).sum()
            torch.mul(grad_h, decay, out=grad_m)
        grad_scale = (h_TB[0] * x_TB[0]).sum_to_size(scale.shape) if ctx.needs_input_grad[2] else None
        grad_offset = h_TB[0].sum_to_size(offset.shape) if ctx.needs_input_grad[3] else None
        _change_first(h_TB[0], scale, None)
        return h_TB.to(x_TB.dtype), grad_decay, grad_scale, grad_offset, None


def _change_first(h: Tensor, scale: Tensor | None, offset: Tensor | None) -> None:
    """`_First.of` in place."""
    if scale is not None:
        h *= scale
    if offset is not None:
        h += offset


def _steps_like(m: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised `[steps, *m.shape]` with every step laid out as the dense `m`, so channels_last stays so."""
    return torch.empty_strided((steps, *m.shape), (m.numel(), *m.stride()), dtype=dtype, device=m.device)


class _AddSteps(torch.autograd.Function):
    """The concatenation of `steps`, plus `shortcut`; its gradient is the shortcut's as it is, without a copy.

    Except with `write`: then it is put together from the timesteps' gradients, so that the neurons' kernel writes it.
    Otherwise each block of a stage reads all the terms that the blocks behind it have added to it.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, write: bool, *steps: Tensor) -> Tensor:
        ctx.num_steps, ctx.write = len(steps), write
        return torch.cat([a + s for a, s in zip(shortcut.chunk(len(steps)), steps, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps = grad.chunk(ctx.num_steps)
        return torch.cat(steps) if ctx.write else grad, None, *steps


def _as_rows(x: Tensor) -> Tensor:
    """A view of `[N, C, H, W]` in channels_last as `[N*H*W, C]`; anything else as it is."""
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _is_fused() -> bool:
    """Whether torch.compile is at work, for Inductor; torch.export's graphs are for others."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class SpikingNeuron(nn.Module):
    """A layer of spiking neurons as a `NeuronConfig` describes them (Yu et al. 2025, eq. 1-3; PLIF: Fang et al. 2021).

    Called with `[T*B, ...]` it returns spikes (0 or 1) of the same shape, dtype and memory format. The membrane
    starts at `v_init` or its reset value, is kept in fp32 or wider, and is forgotten afterwards. `channels`, the second
    of the current's dimensions, must be said where each learns its own start; `Mistake` if it is not.
    """

    def __init__(self, config: NeuronConfig, num_timesteps: int, channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.num_timesteps = num_timesteps
        v_r = config.v_reset or 0.0
        drop = config.threshold if config.v_reset is None else None
        self._dynamics = _Dynamics(
            config.threshold - v_r, drop, config.surrogate, float(config.slope), config.detach_reset
        )
        self._decay = 1.0 if config.kind == "if" else float(config.decay)
        self.writes_shortcut_gradient = False
        """Compiled, behind an identity shortcut: whether to write the sum of the gradients that meet in it. Less is
        moved in Inductor's code for a GPU, more in that for a CPU, where it takes several kernels."""
        self.carries = False
        """Whether a call is one timestep, from `membrane` and into it: `SpikingNet.step` sets both, and clears them."""
        self.membrane: Tensor | None = None
        self.first: Tensor | None = None
        """Beside a carried membrane: `[B, 1]`, 1 if this is a first timestep; for graphs that are the same for all."""
        if config.kind == "plif":
            # [1] and not a scalar: DeepSpeed broadcasts parameters as bytes, which a scalar can't be viewed as.
            self.w = nn.Parameter(torch.tensor([math.log(1 / config.decay - 1)]))
        for name, start in (("v_init", v_r), ("first_scale", 1.0)):
            if getattr(config, name) == "learned":
                if channels is None:
                    raise Mistake(f"student.neuron.{name}=learned: this student does not say its layers' channels")
                self.register_parameter(name, nn.Parameter(torch.full((channels,), start)))

    @property
    def decay(self) -> float | Tensor:
        """Share of the membrane that a timestep keeps; for PLIF a tensor `[1]`, 1 - sigmoid(w)."""
        return 1 - self.w.sigmoid() if self.config.kind == "plif" else self._decay

    def initial(self, x: Tensor) -> Tensor | None:
        """What the state is at the start, such that it broadcasts to the current `[B, C, ...]`; None at rest."""
        v_r = self.config.v_reset or 0.0
        v = self._own("v_init", v_r, x)
        return None if v is None else v - v_r

    @property
    def scales_first(self) -> bool:
        """Whether the first timestep's current is scaled."""
        return self.config.first_scale not in (None, 1)

    def _own(self, name: str, default: float, x: Tensor) -> Tensor | None:
        """A constant `[1]`, or what the channels have learned, such that it broadcasts to x; None for the default."""
        value, dtype = getattr(self.config, name), _state_dtype(x)
        if value == "learned":
            learned: Tensor = getattr(self, name)
            return learned.to(dtype).view(-1, *[1] * (x.ndim - 2))
        return None if value is None or value == default else x.new_full((1,), value, dtype=dtype)

    def _first(self, x: Tensor, decay: float | Tensor) -> _First:
        m = self.initial(x)
        if m is None and isinstance(decay, Tensor) and self.num_timesteps == 1 and torch.is_grad_enabled():
            m = x.new_zeros(1, dtype=_state_dtype(x))  # so that the decay gets its gradient, 0
        return _First(self._own("first_scale", 1.0, x), None if m is None else m * decay)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Older files and spikingjelly's hold w as a scalar.
        w = state_dict.get(f"{prefix}w")
        if w is not None and w.ndim == 0:
            state_dict[f"{prefix}w"] = w.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor, constant: bool = False) -> Tensor:
        """Spikes `[T*B, ...]` for currents `[T*B, ...]`, T-major; `constant`: `[B, ...]`, the same at every step."""
        if self.carries:
            if self.first is not None:
                scale = self._own("first_scale", 1.0, x)
                x = x if scale is None else x * (1 + (scale - 1) * self.first.view(-1, *[1] * (x.ndim - 1)))
            spikes, self.membrane = self.step(x, self.membrane)
            return spikes
        T = self.num_timesteps
        if _is_fused():
            return self._unroll(x, constant=constant)
        x_TB = x.expand(T, *x.shape) if constant else x.view(T, -1, *x.shape[1:])
        if torch.compiler.is_compiling():
            return self._step_all(x_TB)
        decay = self.decay
        s_TB: Tensor = _FoldedNeuron.apply(x_TB, decay, *self._first(x, decay), self._dynamics)
        return s_TB.flatten(0, 1)

    def add_spikes(self, x: Tensor, shortcut: Tensor, *, identity: bool) -> Tensor:
        """`shortcut + forward(x)`, all `[T*B, ...]`; compiled, the sum is a part of the neurons' kernel.

        `identity`: whether the shortcut is what the block reads, not a convolution of it.
        """
        if _is_fused() and not self.carries:
            return self._unroll(x, shortcut, identity and self.writes_shortcut_gradient)
        spikes: Tensor = self(x)
        return shortcut + spikes

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One timestep: `(spikes, state)` for a current `[B, ...]` and the state before it (None: the start).

        The state is the membrane minus its reset value, in fp32 or wider. T steps give what `forward` gives.
        """
        return self._step(x, state, self.decay)

    def _step(self, x: Tensor, m: Tensor | None, decay: float | Tensor) -> tuple[Tensor, Tensor]:
        k = self._dynamics
        first = self._first(x, decay) if m is None else _First(None, None)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return _step_without_gradient(x, m, decay, first, k)
        h = _start(x, first) if m is None else _charge(x, m, decay)
        s = _Spike.apply(h, k.gap, k.surrogate, k.alpha)
        return s.to(x.dtype), _reset(h, s.detach() if k.detach_reset else s, k.drop)

    def _step_all(self, x_TB: Tensor) -> Tensor:
        """Spikes `[T*B, ...]` of all steps, for a batch size that the graph leaves open: chunks would fix it."""
        m, steps = None, []
        for x in x_TB:
            s, m = self.step(x, m)
            steps.append(s)
        return torch.stack(steps).flatten(0, 1)

    def _unroll(
        self, x: Tensor, shortcut: Tensor | None = None, write: bool = False, *, constant: bool = False
    ) -> Tensor:
        """What Inductor makes one kernel of, forward and backward: one step after the other, in plain operations.

        It does so of chunks and one concatenation of matrices, positions times channels. Of `[B, C, H, W]` it would
        write the gradient in another memory format, and of unbind's results keep the surrogates for the backward pass.
        """
        T, decay, steps, m = self.num_timesteps, self.decay, [], None
        rows = _as_rows(x)
        if shortcut is not None and rows is not x:
            shortcut = _as_rows(shortcut.contiguous(memory_format=torch.channels_last))
        for current in [rows] * T if constant else rows.chunk(T):
            s, m = self._step(current, m, decay)
            steps.append(s)
        y = torch.cat(steps) if shortcut is None else _AddSteps.apply(shortcut, write, *steps)
        if rows is x:
            return y
        _, C, H, W = x.shape
        return y.view(-1, H, W, C).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"T={self.num_timesteps}, {self.config}"
