"""Students against spikingjelly 2.0 in float64: logits, running statistics and every gradient.

Not the full product of the issue's choices, which would take an hour, but a set in which every value of every choice
meets every connection and both kinds of block; the deep nets run once for each connection. Batch norm is drawn so
that every stage fires, which is asserted: two silent networks agree too easily.
"""

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

from tdkd_dist.config import StudentConfig
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.weights import convert_spikingjelly, fit

sj = pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import functional, neuron, surrogate  # noqa: E402
from spikingjelly.activation_based.model import ms_resnet, sew_resnet  # noqa: E402

T, B, K = 3, 2, 7
SURROGATES = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan, "rectangle": surrogate.Rect}
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    depth: int
    connect: str
    v_reset: float | None = None
    detach_reset: bool = False
    surrogate: str = "sigmoid"
    decay_input: bool = False
    event: bool = False
    kind: str = "lif"
    decay: float = 0.5
    size: int = 32

    def __str__(self) -> str:
        marks = {"detach": self.detach_reset, "decay_input": self.decay_input, "event": self.event}
        words = [str(self.depth), self.connect, "soft" if self.v_reset is None else f"hard{self.v_reset:g}"]
        return "-".join([*words, self.surrogate, self.kind, *(word for word, on in marks.items() if on)])

    @property
    def neuron(self) -> NeuronConfig:
        return NeuronConfig(
            kind=self.kind,
            decay=self.decay,
            v_reset=self.v_reset,
            surrogate=self.surrogate,
            detach_reset=self.detach_reset,
        )

    def peer_neuron(self) -> dict:
        """spikingjelly's arguments for the same neuron."""
        shared = {
            "v_reset": self.v_reset,
            "detach_reset": self.detach_reset,
            "surrogate_function": SURROGATES[self.surrogate](),
        }
        tau = 1 / (1 - self.decay)
        return (
            shared
            | {
                "if": {"spiking_neuron": neuron.IFNode},
                "lif": {"spiking_neuron": neuron.LIFNode, "tau": tau, "decay_input": self.decay_input},
                "plif": {"spiking_neuron": neuron.ParametricLIFNode, "init_tau": tau, "decay_input": self.decay_input},
            }[self.kind]
        )


def draw_batch_norm(net: nn.Module, seed: int, scale: float, shift: float) -> None:
    """Weights around `scale`, biases around `shift`, running statistics near those of a unit-variance input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(scale * (0.8 + 0.4 * torch.rand(module.weight.shape, generator=generator)))
                module.bias.copy_(shift + 0.2 * torch.randn(module.bias.shape, generator=generator))


def calibrate(net: nn.Module, x: torch.Tensor) -> None:
    """Running statistics of the batch itself, so that eval mode fires as train mode does."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()


def run(net: nn.Module, x: torch.Tensor, train: bool, of_peer: bool) -> dict:
    """Logits `[T, B, K]`, and gradients of input and parameters of a loss that weighs every logit differently."""
    net.train(train)
    net.zero_grad()
    x = x.clone().requires_grad_()
    if of_peer:
        functional.reset_net(net)
        logits = net(x if x.ndim == 5 else x.expand(T, *x.shape))
    else:
        logits = net(x)
    weights = torch.randn(T, B, K, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {"logits": logits.detach(), "input": x.grad, "gradients": gradients}


def firing_rates(net: nn.Module, x: torch.Tensor) -> dict[str, float]:
    rates = {}
    hooks = [
        m.register_forward_hook(lambda _m, _i, s, name=name: rates.__setitem__(name, s.mean().item()))
        for name, m in net.named_modules()
        if isinstance(m, SpikingNeuron)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return rates


def pull_back(ours: dict, peer: nn.Module, convert) -> dict:
    """Our gradients as those of the peer's parameters, through the conversion of weights."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in peer.named_parameters()}
    converted = convert(parameters)
    assert converted.keys() == ours.keys()
    total = sum((converted[name] * gradient).sum() for name, gradient in ours.items())
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def assert_same(ours: dict, peer: dict) -> None:
    """Logits to 1e-9 relative, gradients to 1e-9 of the norm of the whole."""
    assert (ours["logits"] - peer["logits"]).norm() <= 1e-9 * peer["logits"].norm()
    norm = torch.cat([g.flatten() for g in peer["gradients"].values()]).norm()
    assert norm > 0
    for name, gradient in peer["gradients"].items():
        assert (ours["gradients"][name] - gradient).norm() <= 1e-9 * norm, name
    assert (ours["input"] - peer["input"]).norm() <= 1e-9 * peer["input"].norm()


def compare(ours: nn.Module, peer: nn.Module, x: torch.Tensor, convert) -> None:
    for train in (False, True):
        a, b = run(ours, x, train, of_peer=False), run(peer, x, train, of_peer=True)
        a["gradients"] = pull_back(a["gradients"], peer, convert)
        assert_same(a, b)
        statistics = convert({n: t for n, t in peer.named_buffers() if "running" in n or "num_batches" in n})
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, statistics[name], rtol=1e-9, atol=1e-12)
    rates = firing_rates(ours, x)
    assert min(rates.values()) > 0.01, rates
    assert max(rates.values()) < 0.99, rates


CASES = [
    Case(18, "ADD"),
    Case(18, "ADD", 0.0, True, "atan", True),
    Case(18, "ADD", None, True, "atan", False, True),
    Case(18, "AND", 0.0, False, "sigmoid", False, True),
    Case(18, "AND", None, True, "atan", True),
    Case(18, "IAND", None, False, "atan", True, True),
    Case(18, "IAND", 0.0, True, "sigmoid"),
    Case(18, "ADD", -0.2, False, "rectangle", kind="if", event=True),
    Case(18, "ADD", None, False, "sigmoid", False, kind="plif", decay=0.3),
    Case(18, "IAND", 0.0, False, "sigmoid", True, kind="plif", decay=0.3),
    Case(34, "ADD", 0.0, False, "sigmoid", False, decay=0.2),
    Case(34, "IAND", None, True, "atan", True, True),
    Case(34, "AND", 0.0, True, "sigmoid", True),
    Case(50, "ADD", None, False, "sigmoid", True, True),
    Case(50, "AND", 0.0, True, "atan", False),
    Case(50, "IAND", 0.0, False, "sigmoid", False, True),
    Case(50, "IAND", None, True, "atan", True),
    Case(101, "ADD", None, True, "atan", False),
    Case(101, "IAND", 0.0, False, "sigmoid", True),
    Case(101, "AND", None, False, "sigmoid", False, True),
    Case(152, "ADD", 0.0, False, "sigmoid", True, True),
    Case(152, "IAND", None, True, "atan", False),
    Case(152, "AND", None, False, "sigmoid", False),
]
MARKED = [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.depth > 50 else []) for c in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_sew_resnet_is_spikingjellys(case):
    torch.manual_seed(case.depth)
    peer = getattr(sew_resnet, f"sew_resnet{case.depth}")(num_classes=K, cnf=case.connect, **case.peer_neuron())
    functional.set_step_mode(peer.double(), "m")
    shape = (T, B, 3, case.size, case.size) if case.event else (B, 3, case.size, case.size)
    x = torch.randn(shape, dtype=torch.float64)
    draw_batch_norm(peer, 1, 2.0 if case.decay_input else 1.2, 1.0 if case.connect == "AND" else 0.3)
    repeated = x if case.event else x.expand(T, *x.shape)
    functional.reset_net(peer)
    calibrate(peer, repeated)

    name = f"sew_resnet{case.depth}"
    ours = timm.create_model(name, num_classes=K, num_timesteps=T, connect=case.connect, neuron=case.neuron).double()
    student = StudentConfig(model=name, num_classes=K, neuron=case.neuron)

    def convert(tensors: dict) -> dict:
        return convert_spikingjelly(tensors, student, case.decay_input)

    fit(ours, convert(peer.state_dict()), "peer")
    compare(ours, peer, x, convert)


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("depth", [18, 34])
def test_ms_resnet_is_spikingjellys(depth, event):
    """With spikingjelly's constants: threshold 0.5, decay 1/4, hard reset, detached, rectangle of slope 2."""
    torch.manual_seed(depth)
    peer = getattr(ms_resnet, f"ms_resnet{depth}")(T=T, num_classes=K).double()
    x = torch.randn((T, B, 3, 64, 64) if event else (B, 3, 64, 64), dtype=torch.float64)
    config = NeuronConfig(
        decay=0.25, threshold=0.5, v_reset=0.0, surrogate="rectangle", surrogate_alpha=2.0, detach_reset=True
    )
    ours = timm.create_model(f"ms_resnet{depth}", num_classes=K, num_timesteps=T, neuron=config).double()
    student = StudentConfig(model=f"ms_resnet{depth}", num_classes=K, neuron=config)

    def convert(tensors: dict) -> dict:
        return convert_spikingjelly(tensors, student)

    fresh = {name: p.detach().clone() for name, p in convert(dict(peer.named_parameters())).items()}
    for name, parameter in ours.named_parameters():
        if "bn" in name or "downsample.1" in name:
            assert torch.equal(parameter, fresh[name]), f"{name} starts elsewhere"
    draw_batch_norm(peer, 1, 0.8, 0.1)
    functional.reset_net(peer)
    calibrate(peer, x)
    fit(ours, convert(peer.state_dict()), "peer")
    # spikingjelly's network averages over time itself: hand the mean's gradient to each of our timesteps.
    for train in (False, True):
        ours.train(train)
        peer.train(train)
        functional.reset_net(peer)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        weights = torch.randn(B, K, dtype=x.dtype)
        results = []
        for net, value in zip((ours, peer), inputs, strict=True):
            net.zero_grad()
            logits = net(value)
            logits = logits.mean(0) if net is ours else logits
            (logits * weights).sum().backward()
            gradients = {name: p.grad for name, p in net.named_parameters()}
            results.append({"logits": logits.detach(), "input": value.grad, "gradients": gradients})
        results[0]["gradients"] = pull_back(results[0]["gradients"], peer, convert)
        assert_same(*results)
        statistics = convert({n: t for n, t in peer.named_buffers() if "running" in n or "num_batches" in n})
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, statistics[name], rtol=1e-9, atol=1e-12)
    rates = firing_rates(ours, x)
    assert min(rates.values()) > 0.01, rates
