"""The students against a recursion written by hand, and the properties that full range rests on."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from networks import B, K, T, assert_close, everything, images, student
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from tdkd_dist import neurons
from tdkd_dist.batch_norm import batch_norm_repeated
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import resnet, spiking_names
from tdkd_dist.students.resnet import TemporalDropPath

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_OF_EACH = ["sew_resnet8", "sew_resnet18", "sew_resnet50", "ms_resnet18", "preact_resnet34", "spiking_resnet18"]
ONE_OF_EACH += ["spiking_resnet19"]
PARAMETERS = {
    "sew_resnet8": 270_304,
    "sew_resnet18": 11_689_512,
    "sew_resnet34": 21_797_672,
    "sew_resnet50": 25_557_032,
    "sew_resnet101": 44_549_160,
    "sew_resnet152": 60_192_808,
    "ms_resnet18": 11_693_736,
    "ms_resnet34": 21_801_896,
    "preact_resnet34": 21_806_184,
    "spiking_resnet18": 11_681_832,
    "spiking_resnet19": 12_952_424,
}


class ByHand:
    """The networks as the reference describes them, one timestep after the other, from a state dict (eval mode).

    The spike is a step function plus the surrogate's primitive minus its value, so that plain autograd is the BPTT.
    """

    def __init__(self, state: dict[str, torch.Tensor], config: NeuronConfig) -> None:
        self.state, self.config, self.membranes = state, config, {}

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def bn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def fire(self, name: str, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        v_r = c.v_reset or 0.0
        v = self.membranes.get(name, torch.full_like(x, v_r))
        h = v_r + c.decay * (v - v_r) + x
        smooth = torch.sigmoid(4 * (h - c.threshold))
        spike = (h >= c.threshold).to(x.dtype) + (smooth - smooth.detach())  # exactly 0 or 1: max-pooling meets ties
        reset = spike.detach() if c.detach_reset else spike
        self.membranes[name] = h - c.threshold * reset if c.v_reset is None else (1 - reset) * h + reset * v_r
        return spike

    def blocks(self):
        """Names of the blocks in order, each with its stride."""
        found = sorted({tuple(int(p) for p in n[5:].split(".")[:2]) for n in self.state if n.startswith("layer")})
        first = 2 if any(n.startswith("conv1") and self.family == "ms" for n in self.state) else 1
        return [(f"layer{i}.{j}", 1 if j else (first if i == 1 else 2)) for i, j in found]

    def shortcut(self, block: str, x: torch.Tensor, stride: int) -> torch.Tensor | None:
        if f"{block}.downsample.0.weight" not in self.state:
            return None
        return self.bn(f"{block}.downsample.1", self.conv(f"{block}.downsample.0", x, stride))

    def logits(self, name: str, connect: str, x_t: torch.Tensor) -> torch.Tensor:
        self.family = name.split("_")[0]
        cifar = self.family == "spiking"
        small = cifar or name == "sew_resnet8"
        x = self.bn("bn1", self.conv("conv1", x_t, 1 if cifar else 2))
        x = x if self.family in ("ms", "preact") else self.fire("sn1", x)
        x = x if small or self.family == "ms" else F.max_pool2d(x, 3, 2, 1)
        for block, stride in self.blocks():
            x = getattr(self, f"{self.family}_block")(block, stride, connect, x)
        x = self.fire("sn_head", x) if self.family == "ms" else x
        x = x.mean((2, 3))
        x = self.fire("sn_fc1", self.linear("fc1", x)) if "fc1.weight" in self.state else x
        return self.linear("fc", x)

    def sew_block(self, block: str, stride: int, connect: str, x: torch.Tensor) -> torch.Tensor:
        bottleneck = f"{block}.conv3.weight" in self.state
        out = x
        for i in (1, 2, 3) if bottleneck else (1, 2):
            here = stride if i == (2 if bottleneck else 1) else 1
            out = self.fire(f"{block}.sn{i}", self.bn(f"{block}.bn{i}", self.conv(f"{block}.conv{i}", out, here)))
        short = self.shortcut(block, x, stride)
        identity = x if short is None else self.fire(f"{block}.downsample_sn", short)
        if connect == "IAND":
            return out * (1 - identity) if bottleneck else identity * (1 - out)
        return out + identity if connect == "ADD" else out * identity

    def preact_block(self, block: str, stride: int, _connect: str, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(f"{block}.bn1", self.conv(f"{block}.conv1", self.fire(f"{block}.sn1", x), stride))
        out = self.bn(f"{block}.bn2", self.conv(f"{block}.conv2", self.fire(f"{block}.sn2", out)))
        short = self.shortcut(block, x, stride)
        return out + (x if short is None else short)

    ms_block = preact_block

    def spiking_block(self, block: str, stride: int, _connect: str, x: torch.Tensor) -> torch.Tensor:
        out = self.fire(f"{block}.sn1", self.bn(f"{block}.bn1", self.conv(f"{block}.conv1", x, stride)))
        out = self.bn(f"{block}.bn2", self.conv(f"{block}.conv2", out))
        short = self.shortcut(block, x, stride)
        return self.fire(f"{block}.sn2", out + (x if short is None else short))


@pytest.mark.parametrize(
    ("name", "connect", "v_reset", "detach_reset", "event"),
    [
        ("sew_resnet8", "IAND", None, False, True),
        ("sew_resnet18", "ADD", 0.0, False, False),
        ("sew_resnet50", "IAND", None, True, False),
        ("sew_resnet50", "AND", 0.0, False, True),
        ("ms_resnet18", "", None, False, False),
        ("ms_resnet34", "", 0.0, True, True),
        ("preact_resnet34", "", None, False, False),
        ("preact_resnet34", "", 0.0, False, True),
        ("spiking_resnet18", "", 0.0, False, False),
        ("spiking_resnet19", "", 0.0, False, True),
        ("spiking_resnet19", "", None, True, False),
    ],
)
def test_logits_and_bptt_are_those_written_by_hand(name, connect, v_reset, detach_reset, event):
    config = NeuronConfig(decay=0.3, v_reset=v_reset, detach_reset=detach_reset)
    net = student(name, neuron=config, **({"connect": connect} if connect else {}))
    x = images(frames=T if event else None).requires_grad_()
    weights = torch.randn(T, B, K, dtype=x.dtype)
    parameters = dict(net.named_parameters())
    logits = net(x)
    ours = torch.autograd.grad((logits * weights).sum(), [x, *parameters.values()])

    by_hand = ByHand(dict(net.state_dict()) | parameters, config)
    steps = torch.stack([by_hand.logits(name, connect, x_t) for x_t in (x if event else [x] * T)])
    theirs = torch.autograd.grad((steps * weights).sum(), [x, *parameters.values()])
    assert logits.std() > 1e-3
    torch.testing.assert_close(logits, steps, rtol=1e-9, atol=1e-9)
    norm = torch.cat([g.flatten() for g in theirs]).norm()
    assert norm > 0
    for one, other, label in zip(ours, theirs, ["input", *parameters], strict=True):
        assert (one - other).norm() <= 1e-9 * norm, label


@pytest.mark.parametrize("name", ["sew_resnet8", "preact_resnet34", "spiking_resnet19"])
def test_gradcheck_with_the_primitive_in_place_of_the_step(name, monkeypatch):
    monkeypatch.setattr(neurons, "_fire", lambda h, gap, out: out.copy_(torch.sigmoid(4 * (h - gap))))
    net = student(name, width=2, num_timesteps=2, num_classes=2)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    chosen = [p for n, p in net.named_parameters() if n in ("bn1.weight", "layer1.0.bn2.bias", "layer2.0.bn1.weight")]
    assert len(chosen) == 3
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *chosen), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert set(PARAMETERS) == set(spiking_names())


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_first_steps_do_not_depend_on_how_many_follow(name, event):
    """The prefix property, also beyond the T of the training."""
    net, longest = student(name), T + 2
    x = images(frames=longest if event else None)
    net.set_num_timesteps(longest)
    whole = net(x)
    for k in range(1, longest + 1):
        net.set_num_timesteps(k)
        torch.testing.assert_close(net(x[:k] if event else x), whole[:k], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_network_is_its_own_single_steps(name):
    net = student(name)
    x = images(frames=T)
    whole = net(x)
    states = {}

    def stepper(neuron: SpikingNeuron):
        def step(current, constant=False):
            spikes, states[neuron] = neuron.step(current, states.get(neuron))
            return spikes

        return step

    net.set_num_timesteps(1)
    for module in net.modules():
        if isinstance(module, SpikingNeuron):
            module.forward = stepper(module)
    torch.testing.assert_close(torch.cat([net(x_t) for x_t in x]), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_permuting_the_batch_permutes_the_result(name):
    net, x, order = student(name), images(batch=4), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(net(x[order]), net(x)[:, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nothing_stays_behind_and_changing_t_is_creating_with_it(name, train):
    net = student(name).train(train)
    fresh = copy.deepcopy(net)
    statistics = copy.deepcopy(net.state_dict())
    net.set_num_timesteps(T + 1)
    everything(net, images(seed=3))
    net.set_num_timesteps(T)
    net.load_state_dict(statistics)
    assert_close(everything(net, images()), everything(fresh, images()), 0)

    created = timm.create_model(name, num_classes=K, num_timesteps=T + 2, width=8).double().train(train)
    created.load_state_dict(statistics)
    net.load_state_dict(statistics)
    net.set_num_timesteps(T + 2)
    assert_close(everything(net, images()), everything(created, images()), 0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_stem_once_is_the_stem_at_every_step(name):
    """Logits, gradients, running mean and running variance of a static image, against its T copies as frames."""
    once = student(name).train()
    copies = copy.deepcopy(once)
    x = images()
    for _ in range(2):
        results = everything(once, x), everything(copies, x.expand(T, *x.shape))
        results[1][1] = results[1][1].sum(0)  # the frames' gradients
        assert_close(*results)
    for one, other in zip(once.buffers(), copies.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_variance_of_repeated_batches(momentum):
    bn = nn.BatchNorm2d(3, momentum=momentum).double()
    uncorrected, whole = copy.deepcopy(bn), copy.deepcopy(bn)
    for seed in range(3):
        x = images(seed=seed)[:, :, :2, :2]
        once = batch_norm_repeated(bn, x, T)
        uncorrected(x)
        assert torch.allclose(once, whole(torch.cat([x] * T))[:B], rtol=1e-12)
    torch.testing.assert_close(bn.running_var, whole.running_var, rtol=1e-13, atol=0)
    torch.testing.assert_close(bn.running_mean, whole.running_mean, rtol=1e-12, atol=1e-14)
    assert bn.num_batches_tracked == whole.num_batches_tracked
    assert not torch.allclose(uncorrected.running_var, whole.running_var, rtol=1e-3)


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_channels_last_stays_channels_last(name, event):
    net = timm.create_model(name, num_classes=K, num_timesteps=T, width=8).to(memory_format=torch.channels_last)
    x = images(batch=T * B).float().to(memory_format=torch.channels_last)
    flipped = []
    for label, module in net.named_modules():
        module.register_forward_hook(
            lambda _m, _i, y, label=label: (
                flipped.append(label)
                if y.ndim == 4 and not y.is_contiguous(memory_format=torch.channels_last)
                else None
            )
        )
    net(x.view(T, B, 3, 32, 32) if event else x[:B]).sum().backward()
    assert flipped == []


def test_one_mask_a_sample_for_all_timesteps():
    drop = TemporalDropPath(0.5, T).train()
    torch.manual_seed(0)
    kept = drop(torch.ones(T * 200, 2, 3, 3)).view(T, 200, -1)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept, kept[:1, :, :1].expand_as(kept))
    assert 0.35 < (kept > 0).float().mean() < 0.65
    assert torch.equal(drop.eval()(kept), kept)


def test_drop_path_grows_linearly_and_follows_t():
    net = timm.create_model("sew_resnet18", width=8, drop_path_rate=0.7)
    drops = [m for m in net.modules() if isinstance(m, TemporalDropPath)]
    torch.testing.assert_close(torch.tensor([d.rate for d in drops]), torch.linspace(0, 0.7, 8))
    net.set_num_timesteps(7)
    assert {d.num_timesteps for d in drops} == {7}
    assert net.train()(images().float()).shape == (7, B, 1000)
    with pytest.raises(ValueError, match=r"student\.drop_path=0\.1 needs student\.connect=ADD"):
        timm.create_model("sew_resnet18", connect="IAND", drop_path_rate=0.1)


@pytest.mark.parametrize("name", ["sew_resnet18", "sew_resnet50", "ms_resnet18", "preact_resnet34"])
def test_zero_init_last_starts_blocks_as_their_shortcuts(name):
    net = timm.create_model(name, num_timesteps=T, width=8, zero_init_last=True).eval()
    block = net.layer1[-1]
    x = (torch.rand(T * B, block.out_channels, 4, 4) > 0.5).float()
    zero = bool((block.last_bn.weight == 0).all())
    assert zero
    if name != "preact_resnet34" or not block.bn2.bias.any():
        assert torch.equal(block(x), x)
    assert not (timm.create_model(name, width=8, zero_init_last=False).layer1[-1].last_bn.weight == 0).any()


def test_initialisation():
    he = timm.create_model("sew_resnet18").layer2[0].conv1.weight
    assert he.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    he = timm.create_model("preact_resnet34").layer2[0].conv2
    assert he.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert he.bias.abs().max() > 0
    default = timm.create_model("spiking_resnet18").layer2[0].conv1.weight
    assert default.abs().max().item() == pytest.approx((1 / (64 * 9)) ** 0.5, rel=0.01)
    ms = timm.create_model("ms_resnet18", neuron=NeuronConfig(threshold=0.5))
    assert {ms.bn1.weight.unique().item(), ms.layer1[0].bn1.weight.unique().item()} == {0.5}
    assert not ms.layer1[0].bn2.weight.any()


@pytest.mark.parametrize("in_chans", [1, 2])
@pytest.mark.parametrize("name", ["sew_resnet8", "spiking_resnet19", "ms_resnet18"])
def test_other_numbers_of_channels(name, in_chans):
    net = student(name, in_chans=in_chans)
    assert net(images(in_chans, frames=T)).shape == (T, B, K)


def test_wrong_inputs_are_named():
    net = student("sew_resnet8")
    with pytest.raises(ValueError, match=r"4 frames, but num_timesteps=3: call set_num_timesteps\(4\)"):
        net(images(frames=4))
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\] or \[T, B, C, H, W\]"):
        net(images()[0])
    with pytest.raises(ValueError, match="num_timesteps=0: must be at least 1"):
        net.set_num_timesteps(0)


@pytest.mark.parametrize("name", spiking_names())
def test_timm_citizenship(name, tmp_path):
    assert name in timm.list_models(name.split("_")[0] + "_*")
    net = timm.create_model(name, num_classes=K, num_timesteps=T, width=8).eval()
    x = images().float()
    logits = net(x)
    assert logits.shape == (T, B, K)
    assert len(net.default_cfg["mean"]) == len(net.default_cfg["std"]) == net.default_cfg["input_size"][0] == 3
    assert net.default_cfg["classifier"] == "fc"

    features = net.forward_features(x)
    assert features.shape[:3] == (T, B, net.num_features)
    torch.testing.assert_close(net.forward_head(features), logits)
    pre_logits = net.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (T, B, net.head_hidden_size)
    torch.testing.assert_close(net.get_classifier()(pre_logits), logits)

    torch.save(net.state_dict(), tmp_path / "student.pth")
    again = timm.create_model(
        name, num_classes=K, num_timesteps=T, width=8, checkpoint_path=str(tmp_path / "student.pth")
    )
    assert torch.equal(again.eval()(x), logits)
    ema = ModelEmaV3(net, decay=0.5)
    ema.update(net)
    assert torch.equal(ema.module(x), logits)

    net.reset_classifier(7)
    assert net(x).shape == (T, B, 7)
    net.reset_classifier(0)
    assert torch.equal(net(x), pre_logits)
    headless = timm.create_model(name, num_classes=0, num_timesteps=T, width=8)
    assert headless(x).shape == pre_logits.shape


@pytest.mark.parametrize("width", [4, 8])
def test_a_narrow_student_of_large_pictures_does_not_die_on_a_cpu(width):
    """torch's own backward pass of such a shortcut writes past its memory, which kills the process."""
    code = f"""
import timm, torch, tdkd_dist.students
student = timm.create_model("sew_resnet18", width={width}, num_classes=2, num_timesteps=1)
student.to(memory_format=torch.channels_last)
for _ in range(3):
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    student(images).square().sum().backward()
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_narrow_shortcut_is_the_convolution_it_stands_for():
    torch.manual_seed(0)
    ours = resnet.downsample(8, 16, 2, bias=True)[0].double()
    x, gradients = torch.randn(2, 8, 7, 10, dtype=torch.float64, requires_grad=True), []
    for y in (ours(x), F.conv2d(x, ours.weight, ours.bias, 2)):
        gradients.append((y, *torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])))
    assert_close(*gradients)


def test_there_are_no_pretrained_weights():
    with pytest.raises(RuntimeError):
        timm.create_model("sew_resnet18", pretrained=True)


def test_learned_leaks_are_not_decayed():
    net = timm.create_model("sew_resnet8", neuron=NeuronConfig(kind="plif"))
    leaks = {n for n, p in net.named_parameters() if n.endswith(".w")}
    assert net.no_weight_decay() == leaks
    assert len(leaks) == 1 + 3 * 2 + 2
    without, _ = param_groups_weight_decay(net, 0.1, net.no_weight_decay())
    assert without["weight_decay"] == 0
    assert leaks <= {n for n, p in net.named_parameters() if any(p is q for q in without["params"])}
