"""The ways of answering that `bench_anytime.py` compares. Each is a function of uint8 images on the student's device.

exit            ours: who is sure leaves the batch, and a step costs what its survivors cost
step by step    ours without a rule: T steps, one after the other
folded, t       the fast path, all timesteps in one batch, and the mean of the logits of t = 1..T
masked          all T steps for everybody, folded; the rule only chooses which answer counts
one by one      early exit as SEENN and DT-SNN have it: each image in a batch of its own
ReLU            an ordinary network of the same shape, which has one pass; its weights mean nothing

Shapes: T timesteps, B images, C channels, H and W pixels, K classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from tdkd_dist.anytime import AnytimeStudent, ExitRule
from tdkd_dist.losses import ensembles
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.students.base import SpikingNet

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of images `[B, C, H, W]` the classes `[B]` and how many timesteps were run for each, `[B]`."""


@dataclass(frozen=True)
class Contestant:
    """A way of answering."""

    title: str
    answer: Answer
    is_fixed: bool = False
    """Whether all T timesteps are run and used: what early exit is compared with."""
    is_trained: bool = True
    """Whether its answers mean anything."""


class Relu(nn.Module):
    """In the place of a layer of spiking neurons."""

    def forward(self, x: Tensor, constant: bool = False) -> Tensor:
        """Of the shape of `x`."""
        return relu(x)

    def add_spikes(self, x: Tensor, shortcut: Tensor, *, identity: bool) -> Tensor:
        """The sum that ends a block."""
        return shortcut + relu(x)


def with_relu(student: SpikingNet) -> SpikingNet:
    """A copy that is the ordinary network of the student's shape: ReLUs for neurons, one timestep."""
    net = copy.deepcopy(student)
    net.set_num_timesteps(1)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SpikingNeuron):
                setattr(module, name, Relu())
    return net


def contestants(model: SpikingNet, rule: ExitRule, T: int, device: torch.device, *, compiled: bool) -> list[Contestant]:
    """All of them, `compiled` also those that gain by it; each has a copy of the model."""

    def student(
        net: SpikingNet = model, t: int = T, *, exit: ExitRule | None = None, steps: bool = False
    ) -> AnytimeStudent:
        return AnytimeStudent(copy.deepcopy(net), exit, num_timesteps=t, device=device, compiled=steps)

    ordinary = with_relu(model)
    found = [
        Contestant("exit", decided(student(exit=rule))),
        Contestant(f"step by step, t = {T}", decided(student()), is_fixed=True),
        Contestant(f"folded, t = {T}", folded(student()), is_fixed=True),
        *(Contestant(f"folded, t = {t}", folded(student(t=t))) for t in range(T - 1, 0, -1)),
        Contestant("masked", masked(student(), rule)),
        Contestant("one by one", one_by_one(student(exit=rule))),
        Contestant("ReLU", folded(student(ordinary, 1)), is_trained=False),
    ]
    if compiled:
        found += [
            Contestant("exit, compiled", decided(student(exit=rule, steps=True))),
            Contestant(f"folded, t = {T}, compiled", folded(whole(student())), is_fixed=True),
            Contestant("ReLU, compiled", folded(whole(student(ordinary, 1))), is_trained=False),
        ]
    return found


def whole(student: AnytimeStudent) -> AnytimeStudent:
    """The same with its whole pass compiled."""
    student.model.compile(dynamic=False)
    return student


def decided(student: AnytimeStudent) -> Answer:
    """As a user calls it."""

    def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        decision = student(images_BCHW)
        return decision.classes, decision.timesteps

    return answer


def folded(student: AnytimeStudent) -> Answer:
    """One pass of all timesteps."""

    def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        classes_B = student.all_logits(images_BCHW).mean(0).argmax(-1)
        return classes_B, torch.full_like(classes_B, student.num_timesteps)

    return answer


def masked(student: AnytimeStudent, rule: ExitRule) -> Answer:
    """The same, and of each image the answer at which the rule stops."""

    def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        logits_TBK = student.all_logits(images_BCHW)
        classes_TB = ensembles(logits_TBK).argmax(-1)
        classes_B = classes_TB.gather(0, rule.decide(logits_TBK).unsqueeze(0) - 1).squeeze(0)
        return classes_B, torch.full_like(classes_B, student.num_timesteps)

    return answer


def one_by_one(student: AnytimeStudent) -> Answer:
    """A batch of one for each image."""

    def answer(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        decisions = [student(image_1CHW) for image_1CHW in torch.split(images_BCHW, 1)]
        return torch.cat([d.classes for d in decisions]), torch.cat([d.timesteps for d in decisions])

    return answer
