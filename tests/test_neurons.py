"""The neurons against the written formula, a hand-written BPTT, gradcheck, and their own single steps."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tdkd_dist import neurons
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron

T, B = 5, 6
RESETS = [None, 0.0, -0.25]
SURROGATES = ["sigmoid", "atan", "rectangle", "triangle"]
KINDS = ["if", "lif", "plif"]


def primitive(surrogate: str, u: torch.Tensor) -> torch.Tensor:
    """The function whose derivative the surrogate is, at its default slope."""
    return {
        "sigmoid": lambda: torch.sigmoid(4 * u),
        "atan": lambda: torch.atan(math.pi * u) / math.pi + 0.5,
        "rectangle": lambda: (u + 0.5).clamp(0, 1),
        "triangle": lambda: torch.where(u < 0, (1 + u.clamp(-1, 1)) ** 2 / 2, 1 - (1 - u.clamp(-1, 1)) ** 2 / 2),
    }[surrogate]()


def derivative(surrogate: str, u: np.ndarray) -> np.ndarray:
    """The surrogates' formulas at their default slopes, written out in NumPy."""
    sigma = 1 / (1 + np.exp(-4 * u))
    return {
        "sigmoid": 4 * sigma * (1 - sigma),
        "atan": 1 / (1 + (np.pi * u) ** 2),
        "rectangle": (np.abs(u) < 0.5).astype(float),
        "triangle": np.maximum(0, 1 - np.abs(u)),
    }[surrogate]


class Reference(NamedTuple):
    """What `reference` computes; `grad_v` is that of the membrane before the first timestep."""

    spikes: np.ndarray
    grad_x: np.ndarray
    grad_decay: float
    grad_v: np.ndarray


def reference(
    x: np.ndarray, g: np.ndarray, config: NeuronConfig, decay: float, start: float | np.ndarray | None = None
) -> Reference:
    """Spikes and gradients for incoming gradient g, all `[T, ...]`, by hand; the membrane is `start` at first."""
    v_r, soft, threshold = config.v_reset or 0.0, config.v_reset is None, config.threshold
    v = np.zeros_like(x[0]) + (v_r if start is None else start)
    before, charged, spikes = [], [], []
    for x_t in x:
        before.append(v)
        h = v_r + decay * (v - v_r) + x_t
        s = (h >= threshold).astype(float)
        v = h - threshold * s if soft else (1 - s) * h + s * v_r
        charged.append(h)
        spikes.append(s)
    grad_x, grad_decay, grad_v = np.zeros_like(x), 0.0, np.zeros_like(x[0])
    for t in reversed(range(len(x))):
        reset_by_spike = -threshold if soft else v_r - charged[t]
        grad_s = g[t] + (0 if config.detach_reset else grad_v * reset_by_spike)
        kept = 1 if soft else 1 - spikes[t]
        grad_x[t] = grad_v * kept + grad_s * derivative(config.surrogate, charged[t] - threshold)
        grad_decay += float((grad_x[t] * (before[t] - v_r)).sum())
        grad_v = decay * grad_x[t]
    return Reference(np.stack(spikes), grad_x, grad_decay, grad_v)


def layer(**constants: object) -> SpikingNeuron:
    return SpikingNeuron(NeuronConfig(**constants), T)


def currents(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T * B, *shape, generator=generator, dtype=torch.float64) * 0.8 + 0.3).to(dtype)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_spikes_and_gradients_are_those_of_the_formula(kind, v_reset, surrogate, detach_reset):
    net = layer(kind=kind, decay=0.3, v_reset=v_reset, surrogate=surrogate, detach_reset=detach_reset).double()
    x = currents(7).requires_grad_()
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    spikes = net(x)
    spikes.backward(g)
    decay = net.decay.item() if kind == "plif" else net.decay
    assert decay == pytest.approx(1.0 if kind == "if" else 0.3, abs=1e-7)  # PLIF's w starts as a float32
    want, grad_x, grad_decay, _ = reference(*(a.detach().view(T, B, 7).numpy() for a in (x, g)), net.config, decay)
    assert 0.1 < want.mean() < 0.9
    np.testing.assert_array_equal(spikes.detach().view(T, B, 7).numpy(), want)
    np.testing.assert_allclose(x.grad.view(T, B, 7).numpy(), grad_x, rtol=1e-10, atol=1e-13)
    if kind == "plif":
        slope = -torch.sigmoid(net.w) * (1 - torch.sigmoid(net.w))  # decay = 1 - sigmoid(w)
        assert net.w.grad.item() == pytest.approx(grad_decay * slope.item(), rel=1e-10)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_backward_is_the_derivative_of_forward(kind, v_reset, surrogate, monkeypatch):
    """gradcheck of the eager function, with the smooth primitive in place of the step."""
    monkeypatch.setattr(neurons, "_fire", lambda h, gap, out: out.copy_(primitive(surrogate, h - gap)))
    net = layer(kind=kind, decay=0.3, v_reset=v_reset, surrogate=surrogate).double()
    x = currents(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *net.parameters()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_are_single_steps_bit_for_bit(kind, v_reset, dtype):
    net = layer(kind=kind, decay=0.3, v_reset=v_reset)
    x = currents(4, 5, 3, dtype=dtype).to(memory_format=torch.channels_last)
    state, steps = None, []
    for x_t in x.view(T, B, 4, 5, 3):
        spikes, state = net.step(x_t, state)
        assert state.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        steps.append(spikes)
    assert torch.equal(net(x), torch.cat(steps))
    assert net(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_without_gradients_is_the_same_and_leaves_what_it_reads(kind, v_reset, dtype):
    neuron = SpikingNeuron(NeuronConfig(kind=kind, decay=0.7, v_reset=v_reset), T)
    x = (torch.randn(T, B, 4, 3, 3) + 0.5).to(dtype)
    with torch.no_grad():
        inputs, state, wanted = [c.contiguous(memory_format=torch.channels_last) for c in x], None, None
        for current in inputs:
            kept = None if state is None else state.clone()
            spikes, after = neuron.step(current, state)
            assert state is None or torch.equal(state, kept)
            with torch.enable_grad():
                want, wanted = neuron.step(current, wanted)
            assert spikes.dtype == want.dtype
            assert spikes.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(spikes, want)
            assert after.dtype == wanted.dtype
            assert torch.equal(after, wanted)
            state = after
        assert torch.equal(torch.stack(inputs), x)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_steps_are_those_of_many(kind, v_reset, detach_reset):
    net = layer(kind=kind, decay=0.3, v_reset=v_reset, detach_reset=detach_reset).double()
    x = currents(9).requires_grad_()
    g = torch.randn(x.shape, dtype=x.dtype)
    together = torch.autograd.grad(net(x), [x, *net.parameters()], g)
    state, steps = None, []
    for x_t in x.view(T, B, 9):
        spikes, state = net.step(x_t, state)
        steps.append(spikes)
    for one, other in zip(together, torch.autograd.grad(torch.cat(steps), [x, *net.parameters()], g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_membrane_is_fp32_for_half_inputs():
    """bfloat16 currents give the spikes of the same currents in fp32; a bfloat16 membrane would not."""
    net = layer(decay=0.3)
    x = currents(1000, dtype=torch.bfloat16)
    assert torch.equal(net(x).float(), net(x.float()))
    rounded = torch.zeros(B, 1000, dtype=torch.bfloat16)
    differing = 0
    for x_t, s_t in zip(x.view(T, B, -1), net(x).view(T, B, -1), strict=True):
        rounded = 0.3 * rounded + x_t
        differing += int(((rounded >= 1).to(s_t.dtype) != s_t).sum())
        rounded = rounded - s_t
    assert differing > 0


def test_autocast_leaves_the_membrane_alone():
    net = layer(decay=0.3, kind="plif")
    x = currents(50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), layer(decay=0.3, kind="plif")(x))
        assert net(x).dtype == torch.float32


def test_a_constant_current_is_a_repeated_one():
    net = layer(decay=0.3, v_reset=-0.1).double()
    x = currents(4, 3, 3)[:B].to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(T * B, 4, 3, 3, dtype=x.dtype)
    once, repeated = net(x, constant=True), net(torch.cat([x] * T))
    assert torch.equal(once, repeated)
    one, other = (torch.autograd.grad(y, x, g)[0] for y in (once, repeated))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_remembered():
    net = layer()
    x = currents(20)
    first = net(x)
    net(x + 1)
    assert torch.equal(net(x), first)
    assert not list(net.buffers())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    net = layer()
    x = currents(4, 6, 6).to(memory_format=memory_format).requires_grad_()
    for spikes in (net(x), net(x[:B], constant=True)):
        assert spikes.is_contiguous(memory_format=memory_format)
    assert torch.autograd.grad(net(x).sum(), x)[0].is_contiguous(memory_format=memory_format)


def saved_bytes(run, elements: int) -> float:
    """Bytes that a forward pass keeps for its backward pass, an element; shared storage counts once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in storages.values()) / elements


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_eager_mode_saves_the_input_and_nothing_else(dtype, most, v_reset):
    net = layer(v_reset=v_reset)
    x = currents(1000, dtype=dtype).requires_grad_()
    assert saved_bytes(lambda: net(x), x.numel()) == most
    half = currents(1000, dtype=dtype)[:B].clone().requires_grad_()
    assert saved_bytes(lambda: net(half, constant=True), T * half.numel()) <= most / T + 1e-9

    def unrolled():
        state = None
        for x_t in x.view(T, B, -1):
            _, state = net.step(x_t, state)

    assert saved_bytes(unrolled, x.numel()) >= (1 if v_reset is None else 2) * most


def test_a_single_timestep_gives_the_decay_a_gradient_of_zero():
    torch.compiler.reset()
    x = currents(20, dtype=torch.float32)
    for backend in (None, "aot_eager"):
        net = SpikingNeuron(NeuronConfig(kind="plif"), 1)
        if backend is not None:
            net.compile(backend=backend, fullgraph=True)
        net(x.clone().requires_grad_()).sum().backward()
        assert net.w.grad is not None
        assert torch.equal(net.w.grad, torch.zeros_like(net.w))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_compiled_it_is_one_kernel_over_all_timesteps(kind):
    from torch._inductor import metrics

    net = layer(kind=kind, decay=0.3)
    x = currents(64, dtype=torch.float32).requires_grad_()
    g = torch.randn_like(x)
    torch.compiler.reset()
    metrics.reset()
    compiled = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        spikes = compiled(x)
    assert metrics.generated_kernel_count == (1 if kind == "lif" else 2)  # PLIF's other one is the scalar leak
    assert torch.equal(spikes, net(x))
    one, other = (torch.autograd.grad(f(x), x, g)[0] for f in (compiled, net))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("constants", "key"),
    [
        ({"kind": "alif"}, "kind"),
        ({"surrogate": "relu"}, "surrogate"),
        ({"decay": 1.5}, "decay"),
        ({"decay": -0.1}, "decay"),
        ({"decay": 1.0, "kind": "plif"}, "decay"),
        ({"threshold": 0.0}, "threshold"),
        ({"v_reset": 1.0}, "v_reset"),
        ({"v_reset": math.nan}, "v_reset"),
        ({"surrogate_alpha": 0.0}, "surrogate_alpha"),
        ({"v_init": 1.0}, "v_init"),
        ({"v_init": math.nan}, "v_init"),
        ({"v_init": "lerned"}, "v_init"),
    ],
)
def test_a_bad_constant_is_named(constants, key):
    with pytest.raises(ValueError, match=rf"^student\.neuron\.{key}=[^\n]*must be[^\n]*$"):
        NeuronConfig(**constants)


def test_default_slopes():
    assert [NeuronConfig(surrogate=s).slope for s in SURROGATES] == [4, 2, 1, 1]
    assert NeuronConfig(surrogate_alpha=3.0).slope == 3


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_slope_scales_the_surrogate(surrogate):
    """Every surrogate is a * f(a * u): doubling the slope at half the distance doubles the derivative."""
    u = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
    derivative = neurons.SURROGATES[surrogate]
    torch.testing.assert_close(derivative(u / 2, 2.0, None), 2 * derivative(u, 1.0, None))


def test_constants_may_be_given_in_order():
    config = NeuronConfig("lif", 0.5, 1.0, None, "atan", 3.0, True)
    assert (config.surrogate, config.slope, config.detach_reset) == ("atan", 3.0, True)
