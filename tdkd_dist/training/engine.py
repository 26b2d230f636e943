"""DeepSpeed data parallelism for one student: backward, all-reduce, optimiser step, schedule, EMA and their state.

The only file that knows DeepSpeed. Its launcher is not used: the process group exists already (`distributed.start`).

Shapes: B images, C channels, H and W pixels.
"""

import inspect
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import timm.optim
import timm.utils
import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from tdkd_dist import distributed
from tdkd_dist.batch_norm import synchronise
from tdkd_dist.config import Config
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.state import require_optimizer_state, require_same_form

REDUCE_BUCKET = 10_000_000
"""Gradients that a ZeRO stage sends at a time: 40 MB."""


class Engine:
    """A student in training on this rank, replicated over all ranks.

    Args:
        student: on its device, not yet wrapped; float32.
        config: the run's; it must have passed `Config.check`.
        device: of this rank; it computes in bf16 if the configuration asks for it and it can.
        steps_per_epoch: optimiser steps, for the schedule.
        compiled: whether to compile the student.
    """

    def __init__(
        self, student: nn.Module, config: Config, *, device: torch.device, steps_per_epoch: int, compiled: bool
    ) -> None:
        if device.type != "cuda":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        # Its shared-memory all-reduce would be compiled at first use, a minute on two cores; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if config.train.sync_bn and distributed.world_size() > 1:
            synchronise(student)
        if compiled:
            compile_training(student, config.train.activation_budget)
        self.student = student
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        optim = config.optim
        self._optimizer = timm.optim.create_optimizer_v2(
            student,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=not optim.decay_all,
            **_fused(optim.name),
        )
        self.partitioned = config.train.zero_stage > 0
        """Whether each rank has but a part of the optimiser's state."""
        self._by_step = optim.schedule_on == "step"
        self._schedule, _ = create_scheduler_v2(
            self._optimizer,
            sched="cosine",
            num_epochs=max(config.train.epochs - optim.warmup_epochs, 1),
            min_lr=0.0,
            warmup_epochs=optim.warmup_epochs,
            warmup_lr=optim.lr / 10,
            warmup_prefix=True,
            step_on_epochs=not self._by_step,
            updates_per_epoch=steps_per_epoch,
        )
        decay = config.train.ema_decay
        self.ema = timm.utils.ModelEmaV3(student, decay=decay) if decay else None
        self._deepspeed, *_ = deepspeed.initialize(
            model=student,
            optimizer=self._optimizer,
            config=_deepspeed_config(config, autocast=use_bf16(config, device)),
            dist_init_required=False,
        )
        if config.train.zero_stage == 0 and distributed.world_size() == 1:
            # It would copy all gradients into a flat buffer and back, a tenth of a step on a CPU, to add up nothing.
            self._deepspeed.enable_backward_allreduce = False
        if config.train.zero_stage == 0:
            # Not before: DeepSpeed's broadcast can't view channels_last weights as bytes. And not under ZeRO, whose
            # weights are views into flat buffers.
            for network in (student, self.deployed):
                network.to(memory_format=torch.channels_last)
        self.global_step = 0
        self._remembered: list[Tensor] | None = None
        self._set_rate()

    @property
    def learning_rate(self) -> float:
        """The rate of the step to come."""
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    @property
    def deployed(self) -> nn.Module:
        """The network that is validated and saved: the moving average if there is one, else the student."""
        return self.ema.module if self.ema is not None else self.student

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The student's logits, under this run's precision."""
        logits: Tensor = self._deepspeed(images_BCHW)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss; the sum over an optimiser step is their mean.

        After the last micro-batch of an optimiser step they are those of all ranks, and `update` must follow.
        """
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # counts the micro-batch, no more

    def update(self, *, skip: bool = False) -> None:
        """Take the optimiser step; with `skip`, drop its gradients and count it all the same."""
        if skip:
            # DeepSpeed has no way to drop a step; an optimiser that does nothing is the same.
            step, self._optimizer.step = self._optimizer.step, lambda *_, **__: None
            try:
                self._deepspeed.step()
            finally:
                self._optimizer.step = step
        else:
            self._deepspeed.step()
        self.global_step += 1
        if self.ema is not None and not skip:
            self.ema.update(self.student, step=self.global_step)
        self._set_rate()

    def remember_buffers(self) -> None:
        """Keep this rank's batch-norm statistics, so that `recall_buffers` can undo a batch that spoilt them."""
        if self._remembered is None:
            self._remembered = [buffer.clone() for buffer in self.student.buffers()]
        else:
            _copy_by_type(self._remembered, self.student.buffers())

    def recall_buffers(self) -> None:
        """Put back what `remember_buffers` kept."""
        assert self._remembered is not None
        _copy_by_type(list(self.student.buffers()), self._remembered)

    def sync_buffers(self) -> None:
        """Average the batch-norm statistics over ranks: DeepSpeed never does, and what is saved must be one network."""
        if distributed.world_size() > 1:
            timm.utils.distribute_bn(self.student, distributed.world_size(), reduce=True)
            if self.ema is not None:
                timm.utils.distribute_bn(self.ema.module, distributed.world_size(), reduce=True)

    def rank_buffers(self) -> dict[str, Tensor]:
        """The buffers that differ between ranks until `sync_buffers`; tensors shared with the networks."""
        networks = {"student": self.student} | ({"ema": self.ema.module} if self.ema is not None else {})
        return {f"{key}.{name}": buffer for key, net in networks.items() for name, buffer in net.named_buffers()}

    def state(self) -> dict[str, Any]:
        """What all ranks have alike: tensors, numbers and plain containers, on this rank's device."""
        return {
            "global_step": self.global_step,
            "student": self.student.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": None if self.partitioned else self._optimizer.state_dict(),
        }

    def rank_state(self) -> dict[str, Any]:
        """What this rank alone has: its batch-norm statistics, and under ZeRO its part of the optimiser's state."""
        return {
            "buffers": self.rank_buffers(),
            "optimizer": self._optimizer.state_dict() if self.partitioned else None,
        }

    def load(self, state: dict[str, Any], own: dict[str, Any] | None, parts: Sequence[dict[str, Any]] = ()) -> None:
        """Take up a `state`, and this rank's `rank_state`; None on another number of ranks than saved it.

        `parts`, every rank's that saved one, are then needed if the optimiser is partitioned. Raises `Mistake` if
        they are of another run, or of none, before anything is changed.
        """
        optimizer = state["optimizer"]
        if self.partitioned:
            optimizer = own["optimizer"] if own is not None else self._cut_anew([part["optimizer"] for part in parts])
        require_same_form(state["student"], self.student.state_dict(), "student")
        if self.ema is not None:
            require_same_form(state["ema"], self.ema.module.state_dict(), "ema")
        if own is not None:
            require_same_form(own["buffers"], self.rank_buffers(), "batch norms")
        require_optimizer_state(optimizer, self._optimizer)
        step = int(state["global_step"])
        self.student.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(optimizer)
        if self.partitioned:
            self._deepspeed.optimizer.refresh_fp32_params()
        if own is not None:
            for name, buffer in self.rank_buffers().items():
                buffer.copy_(own["buffers"][name])
        # Else of other shares of the data: rank 0's statistics, which came with the student, are as good for everyone.
        self.global_step = step
        self._set_rate()

    def _cut_anew(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """This rank's part of the optimiser's state, cut from the parts of all ranks that saved theirs.

        Under ZeRO a parameter group is one flat tensor, padded and cut into a part for each rank.
        """
        state: dict[int, dict[str, Any]] = {}
        for group, flat in enumerate(self._deepspeed.optimizer.single_partition_of_fp32_groups):
            size, start = flat.numel(), flat.numel() * distributed.rank()
            wanted = sum(p.numel() for p in self._deepspeed.optimizer.bit16_groups[group])
            for key, value in parts[0]["state"].get(group, {}).items():
                if torch.is_tensor(value) and value.ndim > 0:
                    whole = torch.cat([part["state"][group][key] for part in parts])[:wanted]
                    value = torch.nn.functional.pad(whole[start : start + size], (0, size))[:size]
                state.setdefault(group, {})[key] = value
        return {"state": state, "param_groups": parts[0]["param_groups"]}

    def _set_rate(self) -> None:
        # timm's schedules are functions of the step alone, so that resuming needs no state of theirs.
        if self._by_step:
            self._schedule.step_update(self.global_step)
        else:
            self._schedule.step(self.global_step // self.steps_per_epoch)


def wants_bf16(config: Config, device: torch.device) -> bool:
    """Whether the configuration asks for bf16 on this device."""
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: a GPU from Ampere on, an x86 CPU with AVX-512, an ARM one with bf16.

    Elsewhere torch computes it in software: on a CPU with AVX2 alone a student's step takes 8 times as long as in fp32,
    and the forward pass of `tf_efficientnet_lite0` 18 times.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_bf16(config: Config, device: torch.device) -> bool:
    """Whether forward passes run under bf16 autocast."""
    return wants_bf16(config, device) and has_bf16(device)


def _fused(name: str) -> dict[str, bool]:
    """torch's one-kernel step where the optimiser has it: 4 % faster on two cores, bit for bit the plain one there."""
    optimiser = timm.optim.get_optimizer_class(name, bind_defaults=False)
    return {"fused": True} if "fused" in inspect.signature(optimiser).parameters else {}


def _deepspeed_config(config: Config, *, autocast: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        # DeepSpeed clips to 1.0 unless told otherwise.
        "gradient_clipping": config.optim.clip_grad,
        # A ZeRO stage allocates a whole bucket at every step, and the default is 2 GB.
        "zero_optimization": {"stage": config.train.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "zero_allow_untested_optimizer": True,
        # ZeRO stages would send the gradients of the modules listed here, by default all convolutions, in bf16.
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        # It waits for the device in a forward hook, which Dynamo traces, and dies of.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**9,
    }


def _copy_by_type(destinations: list[Tensor], sources: Iterable[Tensor]) -> None:
    """One kernel for each type: of mixed types (counts beside statistics) torch makes one a tensor."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for destination, source in zip(destinations, sources, strict=True):
        pair = by_type.setdefault(destination.dtype, ([], []))
        pair[0].append(destination)
        pair[1].append(source)
    for pair in by_type.values():
        torch._foreach_copy_(*pair)
