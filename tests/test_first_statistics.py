"""Batch statistics of the first timestep: against two plain batch norms, by steps, folded, written, compiled, saved."""

import copy

import pytest
import torch
from exports import T as EXPORTED
from exports import lively, read, written
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import B, K, T, assert_close, everything, images, student
from torch import nn

from tdkd_dist.batch_norm import FirstStatistics, give_first_statistics
from tdkd_dist.config import StudentConfig
from tdkd_dist.export.plain import fold_batch_norms
from tdkd_dist.first_timestep import KnowsFirst
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.recipe import load_config
from tdkd_dist.students import create_student
from tdkd_dist.weights import load_student, save_student, start_from_relu

FAMILIES = ("sew_resnet8", "sew_resnet50", "ms_resnet18", "preact_resnet34", "spiking_resnet19")
"""One of each kind of block; which other depths repeat."""


def pair(channels: int = 5) -> tuple[FirstStatistics, nn.BatchNorm2d]:
    """A layer for T timesteps, and the plain one it was made of."""
    plain = nn.BatchNorm2d(channels).double()
    nn.init.uniform_(plain.weight, 0.5, 2)
    nn.init.normal_(plain.bias)
    net = nn.Sequential(copy.deepcopy(plain))
    give_first_statistics(net, T)
    assert isinstance(net[0], FirstStatistics)
    return net[0], plain


def test_it_is_two_batch_norms_with_one_weight():
    own, first = pair()
    later = copy.deepcopy(first)
    later.weight, later.bias = first.weight, first.bias
    torch.manual_seed(0)
    for _ in range(3):
        x = torch.randn(T * B, 5, 4, 4, dtype=torch.float64) * torch.arange(1, T * B + 1).view(-1, 1, 1, 1)
        want = torch.cat([first(x[:B]), later(x[B:])])
        torch.testing.assert_close(own(x), want, rtol=1e-12, atol=1e-12)
        g = torch.randn_like(x)
        for one, other in zip(
            torch.autograd.grad(own(x), [own.weight, own.bias], g),
            torch.autograd.grad(torch.cat([first(x[:B]), later(x[B:])]), [first.weight, first.bias], g),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for name, norm in (("first_running", first), ("running", later)):
        for of in ("mean", "var"):
            torch.testing.assert_close(getattr(own, f"{name}_{of}"), getattr(norm, f"running_{of}"))
    assert own.num_batches_tracked == first.num_batches_tracked
    own.eval(), first.eval(), later.eval()
    assert torch.equal(own(x), torch.cat([first(x[:B]), later(x[B:])]))
    assert not torch.equal(own(x), later(x))


def test_alone_a_first_timestep_is_a_batch_norm():
    own, plain = pair()
    own.num_timesteps = 1
    x = torch.randn(B, 5, 4, 4, dtype=torch.float64)
    assert torch.equal(own(x), plain(x))
    assert torch.equal(own.first_running_var, plain.running_var)
    assert torch.equal(own.running_var, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", FAMILIES)
def test_with_equal_statistics_nothing_changes_by_a_bit(name):
    own, plain = student(name, first_statistics=True), student(name)
    alike = {n: plain.state_dict()[n.replace("first_running", "running")] for n in own.state_dict()}
    own.load_state_dict(alike)
    assert torch.equal(own(images()), plain(images()))
    assert not isinstance(own.bn1, FirstStatistics)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(1, 4), st.booleans())
def test_what_a_student_says_at_t_is_the_same_for_every_length(name, t, folded):
    net = lively(name, NeuronConfig(decay=0.6), first_statistics=True)
    assert any((m.first_running_var != m.running_var).any() for m in net.modules() if isinstance(m, FirstStatistics))
    x = images(seed=7)
    net.set_num_timesteps(4)
    with torch.no_grad():
        whole = net(x)
        net = fold_batch_norms(net) if folded else net
        assert any(isinstance(m, KnowsFirst) for m in net.modules())
        net.set_num_timesteps(t)
        part, (state, steps) = net(x), (None, [])
        for _ in range(t):
            logits, state = net.step(x, state)
            steps.append(logits)
    torch.testing.assert_close(part, whole[:t], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack(steps), part, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ONNX, all timesteps", "ONNX, one timestep", "program", "program, one timestep"])
@pytest.mark.parametrize("name", ["sew_resnet8", "ms_resnet18"])
def test_a_written_file_has_them(name, form, tmp_path):
    net = lively(name, NeuronConfig(decay=0.6, v_reset=0.0), first_statistics=True)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, FirstStatistics):
                module.first_running_var.mul_(0.5)
    written(net, form, tmp_path / "student")
    batches = [images(net.in_chans, seed, batch) for seed, batch in ((3, 1), (4, 3))]
    with torch.no_grad():
        want = torch.cat([net(x) for x in batches], dim=1)
    assert len(want) == EXPORTED
    torch.testing.assert_close(read(form, tmp_path / "student", batches), want, rtol=1e-9, atol=1e-9)


def test_nir_cannot_say_it(tmp_path):
    net = lively("sew_resnet8", NeuronConfig(v_reset=0.0), first_statistics=True)
    with pytest.raises(ValueError, match=r"no timestep that differs[^\n]*student\.first_statistics"):
        written(net, "NIR", tmp_path / "student")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype):
    """There it is a function of its own, forward and backward, without a concatenation."""
    own, _ = pair()
    eager = copy.deepcopy(own)
    torch.compiler.reset()
    own.compile(fullgraph=True)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    own.to(torch.promote_types(dtype, torch.float32)), eager.to(torch.promote_types(dtype, torch.float32))
    x = (3 * torch.randn(T * B, 5, 4, 4)).to(dtype).contiguous(memory_format=torch.channels_last)
    assert_close(everything(own, x), everything(eager, x), tolerance)
    assert own(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_so_it_is_in_a_student():
    net = student("sew_resnet8", first_statistics=True).train()
    eager = copy.deepcopy(net)
    torch.compiler.reset()
    net.compile(fullgraph=True)
    assert_close(everything(net, images()), everything(eager, images()), 1e-9)


@pytest.mark.parametrize("name", ["sew_resnet8"])
def test_recomputed_stages_change_nothing(name):
    net = student(name, first_statistics=True).train()
    whole = copy.deepcopy(net)
    net.recompute([1, 2])
    assert_close(everything(net, images()), everything(whole, images()))


def config(**options: object) -> StudentConfig:
    return StudentConfig("sew_resnet8", num_classes=K, width=16, **options)


def test_the_file_keeps_them_and_others_are_told_apart(tmp_path):
    own, plain = create_student(config(first_statistics=True)), create_student(config())
    own(torch.randn(4, 3, 32, 32))
    path, x = tmp_path / "s.safetensors", torch.randn(2, 3, 32, 32)
    save_student(
        path, own.state_dict(), config(first_statistics=True), input_size=(3, 32, 32), mean=[0] * 3, std=[1] * 3
    )
    assert torch.equal(load_student(path)(x), own.eval()(x))
    with pytest.raises(ValueError, match=r"which wants student\.first_statistics=true"):
        start_from_relu(plain, own.state_dict(), "here")
    plain(torch.randn(4, 3, 32, 32))
    said = start_from_relu(own, plain.state_dict(), "here")
    assert "first_running_mean" in said
    assert torch.equal(own(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["student.num_timesteps=1"], "student.first_statistics: the other timesteps"),
        (["student.model=relu_resnet18"], "relu_resnet18 has no such choice, only"),
    ],
)
def test_a_network_without_later_timesteps_is_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        create_student(load_config("imagenet_sew34", [*settings, "student.first_statistics=true"]).student)
