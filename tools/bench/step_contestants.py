"""The five training steps that `step.py` compares. Each is a function of images and labels, and does one step.

full          ours: student, teacher, all three losses, backward, optimiser, by the run's own engine; without the ranks'
              agreement and the record, which cost a CPU nothing
student       our student alone: forward, cross-entropy of the mean logits, backward
resnet        the limit: timm's plain ResNet of the same depth on T*B images, forward, cross-entropy, backward
spikingjelly  its SEW-ResNet of the same depth, forward, cross-entropy of the mean logits, backward
loop          as research code often has it: a Python loop over T in every neuron, eager, fp32, the input repeated T
              times; student, teacher, all three losses, backward, optimiser

Shapes: T timesteps, B batch, C channels, H and W pixels, K classes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdkd_dist import distributed
from tdkd_dist.config import Config
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.recipe import load_config
from tdkd_dist.students import choose_recomputed, create_student
from tdkd_dist.students.resnet import SpikingResNetBase
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.step import build_untrained

Step = Callable[[Tensor, Tensor], Tensor | None]
"""One step on images and labels; some give the loss."""
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def make_config(options: argparse.Namespace) -> Config:
    """The run whose step is measured: the ImageNet recipe with this student, batch, precision and T."""
    settings = {
        "student.model": options.student,
        "student.num_timesteps": options.timesteps,
        "teacher.name": options.teacher,
        "teacher.pretrained": "false",
        "data.image_size": options.size,
        "train.batch_size": options.batch,
        "train.micro_batch": options.batch,
        "train.precision": options.precision,
        "launcher.gpus_per_node": int(options.device == "cuda"),
        "launcher.tasks_per_node": 1,
    }
    return load_config("imagenet_sew34", [f"{key}={value}" for key, value in settings.items()] + options.set)


def full(options: argparse.Namespace) -> Step:
    """Our whole step."""
    device, layout, config = torch.device(options.device), LAYOUTS[options.layout], make_config(options)
    distributed.start_here(0, 1, distributed.free_port(), device)
    step = build_untrained(config, device, compiled=options.compile)
    if layout is not torch.channels_last:  # the engine's choice, except under ZeRO
        for net in (step.engine.student, step.teacher):
            net.to(memory_format=layout)  # type: ignore[union-attr]
    return lambda images_BCHW, labels_B: step([(images_BCHW, labels_B)] * config.accumulation)


def student(options: argparse.Namespace) -> Step:
    """Our student alone."""
    config = make_config(options)
    net = create_student(config.student).train()
    choose_recomputed(net, config)
    budget = config.train.activation_budget
    mean = partial(torch.mean, dim=0)
    return _plain_step(options, net, mean, compiled=options.compile, activation_budget=budget)


def resnet(options: argparse.Namespace) -> Step:
    """The limit."""
    net = timm.create_model(options.student.removeprefix("sew_"), num_classes=1000).train()
    return _plain_step(options, net, lambda logits_BK: logits_BK, compiled=options.compile)


def spikingjelly(options: argparse.Namespace) -> Step:
    """Its network in multi-step mode, in the layout and the mode that `options.variant` names."""
    from spikingjelly.activation_based import functional, neuron  # type: ignore[import-untyped]
    from spikingjelly.activation_based.model import sew_resnet  # type: ignore[import-untyped]

    neurons = make_config(options).student.neuron
    lif = {"spiking_neuron": neuron.LIFNode, "v_reset": neurons.v_reset, "decay_input": False}
    lif |= {"v_threshold": neurons.threshold, "tau": 1 / (1 - neurons.decay)}
    net = getattr(sew_resnet, options.student)(num_classes=1000, cnf="ADD", **lif).train()
    functional.set_step_mode(net, "m")
    T = options.timesteps

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x_BCHW: Tensor) -> Tensor:
            logits_TBK: Tensor = self.net(x_BCHW.unsqueeze(0).repeat(T, 1, 1, 1, 1))
            return logits_TBK

    step = _plain_step(
        options,
        Repeated(),
        lambda logits_TBK: logits_TBK.mean(0),
        compiled="compiled" in options.variant,
        channels_last="channels_last" in options.variant,
    )

    def reset_and_step(images_BCHW: Tensor, labels_B: Tensor) -> None:
        functional.reset_net(net)
        step(images_BCHW, labels_B)

    return reset_and_step


class LoopedNeuron(nn.Module):
    """A leaky integrate-and-fire layer over `[B*T, ...]`, samples first, one timestep after the other in autograd."""

    def __init__(self, config: NeuronConfig, num_timesteps: int) -> None:
        super().__init__()
        self.config, self.num_timesteps = config, num_timesteps

    def forward(self, x: Tensor) -> Tensor:
        """Spikes, of the shape of `x`."""
        config, spikes = self.config, []
        x_BT = x.view(-1, self.num_timesteps, *x.shape[1:])
        v_r = config.v_reset or 0.0
        v: Tensor | float = v_r
        for t in range(self.num_timesteps):
            v = v_r + config.decay * (v - v_r) + x_BT[:, t]
            s = _LoopedSpike.apply(v - config.threshold, config.slope)
            v = v - config.threshold * s if config.v_reset is None else (1 - s) * v + s * v_r
            spikes.append(s)
        return torch.stack(spikes, dim=1).flatten(0, 1)

    def add_spikes(self, x: Tensor, shortcut: Tensor, *, identity: bool) -> Tensor:
        """The sum that ends a block."""
        joined: Tensor = shortcut + self(x)
        return joined


class LoopedNet(nn.Module):
    """Our student's layers around looped neurons: every layer sees B*T images, the first one too."""

    def __init__(self, net: SpikingResNetBase) -> None:
        super().__init__()
        self.net, self.num_timesteps = net, net.num_timesteps
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, SpikingNeuron):
                    setattr(module, name, LoopedNeuron(child.config, net.num_timesteps))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits `[T, B, K]`."""
        net = self.net
        x = images_BCHW.unsqueeze(1).repeat(1, self.num_timesteps, 1, 1, 1).flatten(0, 1)
        x = net.bn1(net.conv1(x))
        x = net.maxpool(x if net.sn1 is None else net.sn1(x))
        for stage in net.stages:
            x = stage(x)
        logits: Tensor = net.fc(x.mean((2, 3)))
        return logits.view(-1, self.num_timesteps, logits.shape[-1]).transpose(0, 1)


class _LoopedSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.alpha = alpha
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        y = (ctx.alpha * u).sigmoid()
        return grad * y * (1 - y) * ctx.alpha, None


def loop(options: argparse.Namespace) -> Step:
    """As research code often has it."""
    config, device, T = make_config(options), torch.device(options.device), options.timesteps
    student = create_student(config.student)
    assert isinstance(student, SpikingResNetBase)
    net = LoopedNet(student).to(device).train()
    teacher = timm.create_model(options.teacher, num_classes=1000).to(device).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=2e-5)
    alpha, beta, tau = config.loss.alpha, config.loss.beta, config.loss.temperature

    def divergence(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        scaled_BK, target_BK = F.log_softmax(logits_BK / tau, 1), F.softmax(target_BK / tau, 1)
        return tau**2 * F.kl_div(scaled_BK, target_BK, reduction="batchmean")

    def step(images_BCHW: Tensor, labels_B: Tensor) -> None:
        with torch.no_grad():
            teacher_logits_BK = teacher(images_BCHW)
        logits_TBK = net(images_BCHW)
        mean_BK = logits_TBK.mean(0).detach()
        loss = torch.zeros((), device=device)
        for logits_BK in logits_TBK:
            loss = loss + F.cross_entropy(logits_BK, labels_B)
            loss = loss + alpha * divergence(logits_BK, teacher_logits_BK) + beta * divergence(logits_BK, mean_BK)
        optimizer.zero_grad()
        (loss / T).backward()
        optimizer.step()

    return step


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "full": full,
    "student": student,
    "resnet": resnet,
    "spikingjelly": spikingjelly,
    "loop": loop,
}


def inputs(name: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images and labels on the device; for `resnet` as many as the others' T*B."""
    device, n = torch.device(options.device), options.batch * (options.timesteps if name == "resnet" else 1)
    images_BCHW = torch.randn(n, 3, options.size, options.size, device=device)
    plain = name == "loop" or (name == "spikingjelly" and "channels_last" not in options.variant)
    layout = LAYOUTS[options.layout] if name == "full" else LAYOUTS["contiguous" if plain else "channels_last"]
    return images_BCHW.to(memory_format=layout), torch.randint(1000, (n,), device=device)


def _plain_step(
    options: argparse.Namespace,
    net: nn.Module,
    reduce: Callable[[Tensor], Tensor],
    *,
    compiled: bool,
    channels_last: bool = True,
    activation_budget: float = 1.0,
) -> Step:
    """Forward, cross-entropy of the reduced logits, backward; no optimiser."""
    net.to(options.device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if compiled:
        compile_training(net, activation_budget)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")

    def step(x: Tensor, labels: Tensor) -> None:
        net.zero_grad()
        with autocast:
            logits = reduce(net(x))
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]

    return step
