"""The membrane at the start: against the formula and a hand-written BPTT, step by step, compiled, saved, taken up."""

import numpy as np
import pytest
import torch
from exports import lively
from hypothesis import given, settings
from hypothesis import strategies as st
from test_neurons import KINDS, RESETS, B, T, currents, layer, reference

from tdkd_dist import neurons
from tdkd_dist.config import StudentConfig
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import create_student, spiking_names
from tdkd_dist.weights import load_student, save_student, start_from_relu

STARTS = np.linspace(-0.4, 0.9, 7)
SCALES = np.linspace(1.6, 0.7, 7)


def learning(kind: str = "lif", v_reset: float | None = None, channels: int = 7, **others: object) -> SpikingNeuron:
    """A layer whose channels have learned different starts."""
    config = NeuronConfig(kind, 0.3, v_reset=v_reset, v_init="learned", first_scale="learned", **others)
    net = SpikingNeuron(config, T, channels).double()
    with torch.no_grad():
        net.v_init.copy_(torch.from_numpy(np.resize(STARTS, channels)))
        net.first_scale.copy_(torch.from_numpy(np.resize(SCALES, channels)))
    return net


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_spikes_and_gradients_are_those_of_the_formula(kind, v_reset, detach_reset):
    net = learning(kind, v_reset, detach_reset=detach_reset)
    x = currents(7).requires_grad_()
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    spikes = net(x)
    spikes.backward(g)
    decay = net.decay.item() if kind == "plif" else net.decay
    currents_TBC = x.detach().view(T, B, 7).numpy().copy()
    currents_TBC[0] *= SCALES
    want = reference(currents_TBC, g.view(T, B, 7).numpy(), net.config, decay, STARTS)
    grad_scale = (want.grad_x[0] * x.detach().view(T, B, 7).numpy()[0]).sum(0)
    want.grad_x[0] *= SCALES
    np.testing.assert_array_equal(spikes.detach().view(T, B, 7).numpy(), want.spikes)
    np.testing.assert_allclose(x.grad.view(T, B, 7).numpy(), want.grad_x, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(net.first_scale.grad.numpy(), grad_scale, rtol=1e-10)
    np.testing.assert_allclose(net.v_init.grad.numpy(), want.grad_v.sum(0), rtol=1e-10)
    if kind == "plif":
        slope = -torch.sigmoid(net.w) * (1 - torch.sigmoid(net.w))
        assert net.w.grad.item() == pytest.approx(want.grad_decay * slope.item(), rel=1e-10)


@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_is_the_same_start_for_all(kind, v_reset):
    net = layer(kind=kind, decay=0.3, v_reset=v_reset, v_init=0.8).double()
    x = currents(70)
    decay = net.decay.item() if kind == "plif" else net.decay
    want = reference(x.view(T, B, 70).numpy(), np.zeros((T, B, 70)), net.config, decay, 0.8)
    np.testing.assert_array_equal(net(x).detach().view(T, B, 70).numpy(), want.spikes)
    assert not torch.equal(net(x), layer(kind=kind, decay=0.3, v_reset=v_reset).double()(x))
    scaled = torch.cat([1.3 * x[:B], x[B:]])
    louder = layer(kind=kind, decay=0.3, v_reset=v_reset, first_scale=1.3).double()
    assert torch.equal(louder(x), layer(kind=kind, decay=0.3, v_reset=v_reset).double()(scaled))


@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_backward_is_the_derivative_of_forward(kind, monkeypatch):
    """gradcheck of the eager function, with the surrogate's primitive in place of the step."""
    monkeypatch.setattr(neurons, "_fire", lambda h, gap, out: out.copy_(torch.sigmoid(4 * (h - gap))))
    net = learning(kind, channels=3)
    x = currents(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *net.parameters()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_are_single_steps_bit_for_bit(kind, dtype):
    for net in (
        learning(kind, channels=4).float(),
        layer(kind=kind, decay=0.3, v_reset=-0.25, v_init=0.3, first_scale=1.2),
    ):
        net = net.double() if dtype is torch.float64 else net
        x = currents(4, 5, 3, dtype=dtype).to(memory_format=torch.channels_last)
        for context in (torch.no_grad(), torch.enable_grad()):
            state, steps = None, []
            with context:
                for x_t in x.view(T, B, 4, 5, 3):
                    spikes, state = net.step(x_t, state)
                    steps.append(spikes)
            assert torch.equal(net(x), torch.cat(steps))
            assert state.is_contiguous(memory_format=torch.channels_last)
        half = x[:B]
        assert torch.equal(net(half, constant=True), net(torch.cat([half] * T)))


@pytest.mark.parametrize("v_reset", RESETS)
def test_from_the_reset_value_nothing_changes_by_a_bit(v_reset):
    x = currents(7, dtype=torch.float32).requires_grad_()
    plain = layer(v_reset=v_reset)
    learned = SpikingNeuron(NeuronConfig(v_reset=v_reset, v_init="learned", first_scale="learned"), T, 7)
    constant = layer(v_reset=v_reset, v_init=v_reset or 0, first_scale=1)
    g = torch.randn_like(x)
    want = torch.autograd.grad(plain(x), x, g)[0]
    for net in (learned, constant):
        assert torch.equal(net(x), plain(x))
        assert torch.equal(torch.autograd.grad(net(x), x, g)[0], want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_compiled_it_is_the_same(kind):
    net = learning(kind, channels=5).float()
    x = currents(5, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn_like(x)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True)
    assert torch.equal(compiled(x), net(x))
    wanted = [x, *net.parameters()]
    for one, other in zip(*(torch.autograd.grad(f(x), wanted, g) for f in (compiled, net)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(spiking_names()), st.sampled_from([("learned", "learned"), (0.5, 1.2)]), st.integers(1, 4))
def test_what_a_student_says_at_t_is_the_same_for_every_length(name, start, t):
    net = lively(name, NeuronConfig(v_init=start[0], first_scale=start[1])).double()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, SpikingNeuron) and start[0] == "learned":
                layer.v_init.uniform_(-1, 1)
                layer.first_scale.uniform_(0.8, 1.3)
    images = torch.randn(2, *net.default_cfg["input_size"], dtype=torch.float64)
    net.set_num_timesteps(4)
    with torch.no_grad():
        whole = net(images)
        net.set_num_timesteps(t)
        part = net(images)
        state, steps = None, []
        for _ in range(t):
            logits, state = net.step(images, state)
            steps.append(logits)
    torch.testing.assert_close(part, whole[:t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(steps), part, rtol=1e-10, atol=1e-10)


def test_every_layer_learns_its_channels_and_the_file_keeps_them(tmp_path):
    config = StudentConfig(
        "sew_resnet8", num_classes=4, width=16, neuron=NeuronConfig(v_init="learned", first_scale="learned")
    )
    net = create_student(config)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, SpikingNeuron)}
    assert {f"{name}.{own}" for name in layers for own in ("v_init", "first_scale")} == net.no_weight_decay()
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(m.v_init.grad.abs().sum() > 0 < m.first_scale.grad.abs().sum() for m in layers.values())
    with torch.no_grad():
        for m in layers.values():
            m.v_init.normal_()
            m.first_scale.uniform_(0.5, 2)
    save_student(
        tmp_path / "s.safetensors", net.state_dict(), config, input_size=(3, 32, 32), mean=[0] * 3, std=[1] * 3
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_student(tmp_path / "s.safetensors")(images), net.eval()(images))


def test_a_start_that_the_file_does_not_have_stays_as_initialised():
    plain = create_student(StudentConfig("sew_resnet8", num_classes=4, width=16))
    net = create_student(
        StudentConfig("sew_resnet8", num_classes=4, width=16, neuron=NeuronConfig(v_reset=-0.2, v_init="learned"))
    )
    said = start_from_relu(net, plain.state_dict(), "here")
    assert "v_init" in said
    assert all((p == -0.2).all() for name, p in net.named_parameters() if name.endswith("v_init"))
    with pytest.raises(ValueError, match=r"student\.neuron\.v_init=learned"):
        start_from_relu(plain, net.state_dict(), "here")


def test_a_layer_of_unknown_channels_cannot_learn():
    with pytest.raises(ValueError, match=r"v_init=learned: [^\n]*channels"):
        layer(v_init="learned")
