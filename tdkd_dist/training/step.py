"""One training step on this rank: what the trainer, the planner and the benchmarks share.

Shapes: T timesteps, B images, C channels, H and W pixels, K classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tdkd_dist.config import Config
from tdkd_dist.data.normalise import as_input
from tdkd_dist.losses import LossTerms, TemporalDistillationLoss
from tdkd_dist.students import choose_recomputed, create_student
from tdkd_dist.teachers import Teacher, create_teacher
from tdkd_dist.training.engine import Engine, use_bf16
from tdkd_dist.validate import as_timesteps


class TrainStep:
    """Teacher, student, losses and backward pass of one micro-batch after the other, then the optimiser's step.

    Args:
        config: the run's; it must have passed `Config.check`.
        student: on its device; the engine wraps and, with `compiled`, compiles it.
        teacher: on its device, None if the run needs none; compiled with `compiled`.
        steps_per_epoch: optimiser steps, for the schedule.
    """

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        teacher: Teacher | None,
        *,
        device: torch.device,
        steps_per_epoch: int,
        compiled: bool,
    ) -> None:
        if teacher is not None and compiled:
            teacher.compile_folded()
        self.teacher = teacher
        self.engine = Engine(student, config, device=device, steps_per_epoch=steps_per_epoch, compiled=compiled)
        self.loss = TemporalDistillationLoss(**asdict(config.loss))
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(config, device))

    def forward_backward(
        self, x_BCHW: Tensor, labels: Tensor, watch: Callable[[Tensor], None] = lambda loss: None
    ) -> tuple[LossTerms, Tensor]:
        """Add a micro-batch's gradients; its loss terms and the student's logits `[T, B, K]`.

        `x_BCHW` is normalised for the student, or frames `[B, T, C, H, W]`; `labels` are classes `[B]` or probabilities
        `[B, K]`. `watch` is given the loss before the backward pass.
        """
        with record_function("teacher"), self._autocast:
            teacher_logits_BK = self.teacher(x_BCHW) if self.teacher is not None else None
        with record_function("student"):
            T = getattr(self.engine.student, "num_timesteps", None)
            logits_TBK = as_timesteps(self.engine.forward(as_input(x_BCHW, T)))
        with record_function("loss"):
            terms: LossTerms = self.loss(logits_TBK, teacher_logits_BK, labels)
        watch(terms.total)
        self.engine.backward(terms.total)
        return terms, logits_TBK

    def update(self, *, skip: bool = False) -> None:
        """The optimiser's step after the last micro-batch; with `skip`, count it and drop its gradients."""
        with record_function("optimiser"):
            self.engine.update(skip=skip)

    def __call__(self, micro_batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """A whole step on the run's number of micro-batches (images and labels); the last one's loss, on the device."""
        for x_BCHW, labels in micro_batches:
            terms, _ = self.forward_backward(x_BCHW, labels)
        self.update()
        return terms.total.detach()


def build_untrained(config: Config, device: torch.device, *, compiled: bool) -> TrainStep:
    """A run's step in training mode, its student and teacher with random weights: to measure what it takes.

    The process group must exist.
    """
    torch.manual_seed(0)
    student = create_student(config.student).to(device)
    choose_recomputed(student, config)
    teacher: Teacher | None = None
    if config.needs_teacher:
        plain = replace(config.teacher, checkpoint=None, pretrained=False)
        classes, channels = config.student.num_classes, config.student.in_chans
        teacher = create_teacher(plain, config.data, num_classes=classes, in_chans=channels)
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainStep(config, student, teacher, device=device, steps_per_epoch=1000, compiled=compiled)
    student.train()
    return step
