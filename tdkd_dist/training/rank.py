"""What a run has to work with on one rank, whether it trains or only evaluates, and what it leaves behind.

Shapes: T timesteps.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tdkd_dist.anytime import ExitRule
from tdkd_dist.config import Config
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.loaders import ValLoader
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.files import write_json
from tdkd_dist.run.figures import draw_accuracy_against_timestep
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Heartbeat
from tdkd_dist.run.log import Log
from tdkd_dist.run.progress import Progress
from tdkd_dist.run.record import Record, format_table
from tdkd_dist.training.engine import use_bf16
from tdkd_dist.validate import validate
from tdkd_dist.weights import save_student


@dataclass
class Place:
    """What this rank has to work with."""

    device: torch.device
    rank: int
    world_size: int
    workers: int
    teacher_weights: str | None = None
    """timm's weights of the teacher, fetched at submission."""


@dataclass
class Run:
    """What training and mere evaluation have in common, on one rank."""

    config: Config
    folder: RunFolder
    place: Place
    log: Log
    heartbeat: Heartbeat
    normalise: Normalise
    validation: ValLoader

    def validate(self, model: nn.Module, num_timesteps: int, exit: ExitRule | None = None) -> dict[str, Any]:
        """Metrics of `model` on the whole validation set, the same on every rank."""
        return validate(
            model,
            self._batches(),
            self.normalise,
            num_timesteps=num_timesteps,
            device=self.place.device,
            autocast=use_bf16(self.config, self.place.device),
            activity_images=-(-self.config.eval.activity_images // self.place.world_size),
            exit=exit,
        )

    def _batches(self) -> Iterator[Batch]:
        for k, batch in enumerate(self.validation):
            self.heartbeat.beat("validating", k)
            yield batch

    def validate_student(self, model: nn.Module) -> dict[str, Any]:
        """The same of the student; all of it, layers and early exits too, goes to `validation.json`."""
        rule = None if self.config.eval.exit is None else ExitRule.load(self.config.eval.exit)
        found = self.validate(model, self.config.eval_timesteps, rule)
        if self.place.rank == 0:
            with suppress(OSError):  # a full disk
                write_json(self.folder.validation_file, found)
        return found

    def finish(self, record: Record, progress: Progress, found: dict[str, Any]) -> None:
        """Table, figure and summary: the outcome."""
        top1 = found["top1"]
        record.write_curve(top1)
        table = format_table(found)
        self.log.say(table)
        if self.place.rank == 0:
            figure = draw_accuracy_against_timestep(self.folder.figures, {self.config.run.name: top1})
            write_json(
                self.folder.summary_file,
                {
                    "epochs": self.config.train.epochs,
                    "max_steps": self.config.train.max_steps,
                    "epoch": progress.epoch,
                    "global_step": progress.global_step,
                    "top1": top1,
                    "best_top1_mean": max(progress.best, found["top1_mean"]),
                    "table": table,
                    "figure": str(figure),
                },
            )

    def save_student(self, path: Path, model: nn.Module, progress: Progress) -> None:
        """Write `model` as a weights file, on rank 0. A full disk is said, and costs the file."""
        if self.place.rank != 0:
            return
        config = self.config
        mean, std = config.data.normalisation(config.student.in_chans)
        try:
            save_student(
                path,
                model.state_dict(),
                config.student,
                input_size=(config.student.in_chans, config.data.image_size, config.data.image_size),
                mean=mean,
                std=std,
                crop_pct=config.data.crop_pct,
                frames=config.data.frames,
                frame_choice=config.data.frame_choice,
                label_names=self.validation.class_names,
                extra={"run": config.run.name, "global_step": str(progress.global_step)},
            )
        except (OSError, SafetensorError) as error:
            self.log.say(f"{path} could not be written ({error})")
