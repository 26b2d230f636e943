"""Firing rates and operations against sums made by hand from what each layer reads."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tdkd_dist.activity import ActivityMeter
from tdkd_dist.curves import flatten_curves
from tdkd_dist.neurons import SpikingNeuron

CPU = torch.device("cpu")
AC_J, MAC_J = 0.9e-12, 4.6e-12
"""A fp32 addition, and a multiplication with one, in 45 nm (Horowitz 2014)."""
T, B = 3, 4


def make(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, num_timesteps=T, width=8, **kwargs)
    model.train()
    with torch.no_grad():
        for _ in range(5):  # batch-norm statistics that let spikes through
            model(torch.randn(8, 3, 32, 32) * 2)
    return model.eval()


def measure(model: nn.Module, batches: list[torch.Tensor], max_images: int = 10**6) -> dict:
    meter = ActivityMeter(model, max_images, CPU)
    with torch.no_grad():
        for images in batches:
            expected = model(images)
            torch.testing.assert_close(meter.forward(images), expected, rtol=0, atol=0)
    row = meter.summary()
    assert row is not None
    return row | flatten_curves(row)


def inputs_of(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every convolution and linear layer reads."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def products(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Sum over outputs of the inputs that each one reads, one image at a time: values x fan-out, brute force."""
    if isinstance(layer, nn.Linear):
        return x.double().sum(-1) * layer.out_features
    ones = torch.ones_like(layer.weight, dtype=torch.float64)
    return F.conv2d(x.double(), ones, None, layer.stride, layer.padding).flatten(1).sum(1)


def test_operations_of_a_sew_resnet_are_its_spikes_times_their_fan_out():
    model, images = make("sew_resnet18"), torch.randn(B, 3, 32, 32)
    row, inputs = measure(model, [images]), inputs_of(model, images)
    accumulates = torch.zeros(T, dtype=torch.float64)
    dense = 0.0
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        if name == "conv1":
            macs = products(layer, torch.ones(1, *x.shape[1:])).item()
            dense += macs
        elif name == "fc":
            features = model.forward_features(images)
            accumulates += features.double().sum((1, 2, 3, 4)) * layer.out_features
            dense += layer.in_features * layer.out_features
        else:
            assert set(x.unique().tolist()) <= set(range(20))
            accumulates += products(layer, x).view(T, B).sum(1)
            dense += products(layer, torch.ones(1, *x.shape[1:])).item()
    assert inputs["layer3.0.conv1"].max() > 1, "no sum of spikes in this draw"
    assert accumulates.min() > 1e4
    for t in range(1, T + 1):
        synops = (accumulates[:t].sum() / B).item()
        assert row[f"synops_t{t}"] == pytest.approx(synops, rel=1e-12)
        assert row[f"macs_t{t}"] == pytest.approx(macs, rel=1e-12)  # the stem, once an image
        assert row[f"energy_mj_t{t}"] == pytest.approx(1e3 * (AC_J * synops + MAC_J * macs), rel=1e-12)
    assert row["macs_relu"] == pytest.approx(dense, rel=1e-12)
    assert row["energy_mj_relu"] == pytest.approx(1e3 * MAC_J * dense, rel=1e-12)


def test_frames_pass_the_stem_at_every_timestep():
    model = make("sew_resnet18")
    frames = torch.randn(B, 3, 32, 32).expand(T, -1, -1, -1, -1)
    row = measure(model, [frames])
    assert row["macs_t3"] == pytest.approx(3 * row["macs_t1"], rel=1e-12)
    counts = measure(model, [torch.randint(0, 3, frames.shape).float()])  # whole numbers, but no spikes
    assert [counts[f"macs_t{t}"] for t in (1, 2, 3)] == [row[f"macs_t{t}"] for t in (1, 2, 3)]


def test_real_values_are_multiplied_in_the_paper_s_backbone():
    """preact_resnet34: the stem, three downsample convolutions and the classifier read real values."""
    model, images = make("preact_resnet34"), torch.randn(B, 3, 64, 64)
    row, inputs = measure(model, [images]), inputs_of(model, images)
    real = {name for name, x in inputs.items() if not torch.equal(x, x.round())}
    assert real == {"conv1", "fc", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    at_each_step = model.fc.in_features * model.fc.out_features
    for name in real - {"conv1", "fc"}:
        x = inputs[name]
        at_each_step += products(model.get_submodule(name), torch.ones(1, *x.shape[1:])).item()
    stem = products(model.conv1, torch.ones(1, 3, 64, 64)).item()
    for t in (1, 2, 3):
        assert row[f"macs_t{t}"] == pytest.approx(stem + t * at_each_step, rel=1e-12)


def test_firing_rates_and_block_outputs():
    model, images = make("sew_resnet18"), torch.randn(B, 3, 32, 32)
    spikes: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SpikingNeuron) or name == "layer2.1":
            module.register_forward_hook(lambda _, args, y, name=name: spikes.update({name: y.view(T, -1)}))
    row = measure(model, [images])
    block = spikes.pop("layer2.1").double()
    for name, s in spikes.items():
        assert set(s.unique().tolist()) <= {0, 1}
        assert row["firing_rates"][name] == pytest.approx(s.double().mean(1).tolist(), rel=1e-12)
    assert row["firing_rates"].keys() == spikes.keys()
    for t in range(T):
        whole = torch.cat([s[t] for s in spikes.values()]).double().mean().item()
        assert row[f"firing_rate_t{t + 1}"] == pytest.approx(whole, rel=1e-12)
    assert row["block_outputs"]["layer2.1"] == pytest.approx(block.mean(1).tolist(), rel=1e-12)
    assert row["block_nonzero"]["layer2.1"] == pytest.approx((block != 0).double().mean(1).tolist(), rel=1e-12)


def test_only_the_first_images_count_and_batches_do_not_matter():
    model, images = make("spiking_resnet19"), torch.randn(6, 3, 32, 32)
    whole = measure(model, [images])
    parts = measure(model, [images[:1], images[1:], torch.randn(2, 3, 32, 32)], max_images=6)
    assert parts["activity_images"] == 6
    assert parts["synops_t2"] == pytest.approx(whole["synops_t2"], rel=1e-12)
    assert measure(model, [images], max_images=2)["synops_t3"] == pytest.approx(
        measure(model, [images[:2]])["synops_t3"], rel=1e-12
    )


def test_nothing_counted_is_nothing_said():
    assert ActivityMeter(make("sew_resnet18"), 0, CPU).summary() is None
