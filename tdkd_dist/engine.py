"""DeepSpeed data parallelism for one student: backward, all-reduce, optimiser step, schedule, EMA and their state.

The only file that knows DeepSpeed. Its launcher is not used: the process group exists already (`distributed.start`).
"""

import logging
import os
from pathlib import Path
from typing import Any

import timm.optim
import timm.utils
import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from tdkd_dist import distributed
from tdkd_dist.config import Config

STATE_TAG = "engine"


class Engine:
    """A student in training on this rank, replicated over all ranks.

    Args:
        student: on its device, not yet wrapped; float32.
        config: the run's; it must have passed `Config.check`.
        device: of this rank; CUDA brings bf16 and SyncBatchNorm if the configuration asks for them.
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
        if config.train.sync_bn and device.type == "cuda" and distributed.world_size() > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        if compiled:
            student.compile()
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
        )
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
        if config.train.zero_stage == 0:
            # Not before: DeepSpeed's broadcast can't view channels_last weights as bytes. And not under ZeRO, whose
            # weights are views into flat buffers.
            for network in (student, self.deployed):
                network.to(memory_format=torch.channels_last)
        self.global_step = 0
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
        """Add the gradients of one micro-batch's mean loss; the sum over an optimiser step is their mean."""
        self._deepspeed.backward(loss)
        # DeepSpeed counts micro-batches in step(), which updates only on the last one of an optimiser step.
        at_boundary = self._deepspeed.is_gradient_accumulation_boundary()
        self._deepspeed.step()
        if at_boundary:
            self._after_update()

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

    def save(self, folder: Path) -> None:
        """Write the whole state into `folder`; every rank must call it."""
        state = {
            "global_step": self.global_step,
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
        }
        self._deepspeed.save_checkpoint(str(folder), tag=STATE_TAG, client_state=state, save_latest=False)

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote in `folder`."""
        path, state = self._deepspeed.load_checkpoint(str(folder), tag=STATE_TAG, load_lr_scheduler_states=False)
        assert path is not None, f"DeepSpeed found no state in {folder}"
        self.global_step = state["global_step"]
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._set_rate()

    def _after_update(self) -> None:
        self.global_step += 1
        if self.ema is not None:
            self.ema.update(self.student, step=self.global_step)
        self._set_rate()

    def _set_rate(self) -> None:
        # timm's schedules are functions of the step alone, so that resuming needs no state of theirs.
        if self._by_step:
            self._schedule.step_update(self.global_step)
        else:
            self._schedule.step(self.global_step // self.steps_per_epoch)


def use_bf16(config: Config, device: torch.device) -> bool:
    """Whether forward passes run under bf16 autocast."""
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")


def _deepspeed_config(config: Config, *, autocast: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        # DeepSpeed clips to 1.0 unless told otherwise.
        "gradient_clipping": config.optim.clip_grad,
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }
