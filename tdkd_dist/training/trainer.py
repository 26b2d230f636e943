"""The run on one rank: build the parts, loop over epochs, validate after every timestep, leave the results.

Shapes: T timesteps, B batch, C channels, H and W pixels, K classes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tdkd_dist import distributed
from tdkd_dist.config import Config
from tdkd_dist.curves import flatten_curves, format_curve
from tdkd_dist.data.loaders import TrainLoader, make_train_loader, make_val_loader
from tdkd_dist.data.mixing import Mixer
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import Heartbeat
from tdkd_dist.run.log import Log, format_seconds
from tdkd_dist.run.progress import Progress
from tdkd_dist.run.record import Record
from tdkd_dist.students import choose_recomputed, create_student
from tdkd_dist.teachers import Teacher, create_teacher
from tdkd_dist.training import checkpoint
from tdkd_dist.training.checkpoint import warn_of_short_notice
from tdkd_dist.training.compilation import compiles
from tdkd_dist.training.engine import has_bf16, wants_bf16
from tdkd_dist.training.guard import StepGuard
from tdkd_dist.training.meter import TrainMeter
from tdkd_dist.training.rank import Place, Run
from tdkd_dist.training.step import TrainStep
from tdkd_dist.weights import evaluated, load_weights, read_metadata


def run(config: Config, folder: RunFolder, place: Place, heartbeat: Heartbeat, should_stop: Callable[[], bool]) -> bool:
    """Carry the run in `folder` to its end, from its newest checkpoint if there is one.

    `should_stop` is asked on every rank before each optimiser step; one that answers yes stops them all. Returns False
    if that ended the run early, with a checkpoint to go on from. Raises `Mistake` for a user's mistake that only the
    job can find.
    """
    # Crops keep their size for epochs, so that finding the fastest convolutions pays; a no-op on a CPU.
    torch.backends.cudnn.benchmark = True
    log = Log(folder.log_file, speaks=place.rank == 0)
    log.take_over_logging()
    if config.train.epochs == 0:
        student_section, note = evaluated(config.student)
        config = replace(config, student=student_section)
        if note:
            log.say(note)
    if wants_bf16(config, place.device) and not has_bf16(place.device):
        lacks = "GPU, older than Ampere," if place.device.type == "cuda" else "CPU"
        log.say(f"train.precision={config.train.precision}: fp32, since this {lacks} has no bf16 and would emulate it")
    opening = partial(heartbeat.beat, "opening data", 0)
    opening()
    validation = make_val_loader(
        config.data,
        batch_size=config.eval.batch_size or config.micro_batch,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        workers=place.workers,
        beat=opening,
    )
    try:
        distributed.meet(opening)  # here, where nobody counts as hanging while another copies its data
        normalise = Normalise(*_normalisation(config, log)).to(place.device)
        parts = Run(config, folder, place, log, heartbeat, normalise, validation)
        heartbeat.beat("building networks", 0)
        student = _build_student(config).to(place.device)
        if config.train.epochs == 0:
            return _evaluate(parts, student)
        return Trainer.build(parts, student, should_stop).train()
    finally:
        # Its processes outlive TERM for a while: left to Python's exit, a finished job would wait for them.
        validation.close()


def _normalisation(config: Config, log: Log) -> tuple[Sequence[float], Sequence[float]]:
    """Of the student's input: what is evaluated is fed as it was trained, whatever the recipe says."""
    own = config.data.normalisation(config.student.in_chans)
    path = config.student.checkpoint
    said = (read_metadata(path) or {}).get("student", {}) if path is not None else {}
    found = tuple(said.get("mean", own[0])), tuple(said.get("std", own[1]))
    if found == own or len(found[0]) != len(own[0]):
        return own
    differs = f"student.checkpoint={path} was trained with mean {list(found[0])} and std {list(found[1])}"
    if config.train.epochs == 0:
        log.say(f"{differs}: evaluated so, and not with data.mean and data.std")
        return found
    log.say(f"warning: {differs}, and goes on with data.mean={list(own[0])} and data.std={list(own[1])}")
    return own


def _build_student(config: Config) -> nn.Module:
    torch.manual_seed(config.run.seed)
    student = create_student(config.student)
    if config.student.checkpoint is not None:
        load_weights(student, config.student.checkpoint, "student.checkpoint")
    choose_recomputed(student, config)
    return student


def _evaluate(parts: Run, student: nn.Module) -> bool:
    student.to(memory_format=torch.channels_last)
    record = Record(parts.folder, parts.config, parts.log, wandb_id=None, global_step=-1)
    try:
        found = parts.validate_student(student)
        record.write({"epoch": 0, "global_step": 0, **flatten_curves(found, "val/")})
        parts.finish(record, Progress(), found)
    finally:
        record.close()
    return True


@dataclass
class Trainer:
    """A training in progress, on one rank."""

    parts: Run
    step: TrainStep
    loader: TrainLoader
    mixer: Mixer
    record: Record
    progress: Progress
    guard: StepGuard
    resumed: bool
    _is_best: bool = False
    """Whether the state in hand is that of the best validation so far."""
    _warned: bool = False
    _underway: bool = False

    @classmethod
    def build(cls, parts: Run, student: nn.Module, should_stop: Callable[[], bool]) -> "Trainer":
        """Everything a training needs, in the state of the newest checkpoint if there is one."""
        config, place, log = parts.config, parts.place, parts.log
        opening = partial(parts.heartbeat.beat, "opening data", 0)
        opening()
        loader = make_train_loader(
            config.data,
            batch_size=config.train.batch_size,
            micro_batch=config.micro_batch,
            rank=place.rank,
            world_size=place.world_size,
            seed=config.run.seed,
            device=place.device,
            workers=place.workers,
            beat=opening,
        )
        distributed.meet(opening)
        parts.heartbeat.beat("building networks", 0)
        compiled = compiles(config.train, loader.steps_per_epoch, place.device)
        if config.train.activation_budget < 1 and not compiled:
            log.say("train.activation_budget: ignored, the student is not compiled (train.compile=true compiles it)")
        step = TrainStep(
            config,
            student,
            _build_teacher(parts),
            device=place.device,
            steps_per_epoch=loader.steps_per_epoch,
            compiled=compiled,
        )
        # Initialisation is the same on every rank; what the training itself draws is each rank's own.
        torch.manual_seed(config.run.seed * 100_003 + place.rank)
        parts.heartbeat.beat("restoring", 0)
        restored = checkpoint.restore(parts.folder.checkpoints, step.engine, log.say)
        progress = restored or Progress()
        if restored:
            log.say(f"resumed after epoch {progress.epoch}, at step {progress.global_step}")
        last_step = progress.global_step if restored else -1
        parts.heartbeat.beat("starting W&B", 0)
        record = Record(
            parts.folder,
            config,
            log,
            wandb_id=progress.wandb_id,
            global_step=last_step,
            validates_again=progress.step_in_epoch > 0,
        )
        progress.wandb_id = record.wandb_id
        for note in parts.folder.notes_at(progress.global_step) if restored else []:
            log.say(note)
            record.write({"epoch": progress.epoch, "global_step": progress.global_step, "note": note})
        mixer = Mixer(
            mixup=config.data.mixup,
            cutmix=config.data.cutmix,
            num_classes=config.student.num_classes,
            seed=config.run.seed,
            rank=place.rank,
        )
        return cls(
            parts=parts,
            step=step,
            loader=loader,
            mixer=mixer,
            record=record,
            progress=progress,
            guard=StepGuard(config.train, parts.folder.skipped_file, should_stop),
            resumed=restored is not None,
        )

    def train(self) -> bool:
        """To the end, or until asked to stop (False)."""
        config, progress = self.parts.config, self.progress
        try:
            if self.step.teacher is not None and not self.resumed:
                self._measure_teacher(self.step.teacher)
            found: dict[str, Any] | None = None
            while not self._complete:
                started = time.monotonic()
                stop = self._train_epoch()
                if progress.step_in_epoch == 0 or self._complete:
                    self.step.engine.sync_buffers()
                    if self._complete or progress.epoch % config.eval.every == 0:
                        found = self._validate(time.monotonic() - started)
                saved = self._save()
                if stop and not self._complete:
                    where = "here" if saved else "the last checkpoint"
                    self.parts.log.say(f"stopped at step {progress.global_step}; the same command goes on from {where}")
                    return False
            if found is None:
                found = self.parts.validate_student(self.step.engine.deployed)
            self.parts.save_student(self.parts.folder.student_file, self.step.engine.deployed, progress)
            self.parts.finish(self.record, progress, found)
            return True
        finally:
            self.loader.close()
            self.record.close()

    def _train_epoch(self) -> bool:
        """To the end of the epoch or of the run, or to where it was asked to stop (True)."""
        config, progress, engine = self.parts.config, self.progress, self.step.engine
        engine.student.train()
        meter = TrainMeter(self.parts.log, self.record, config, self.loader.steps_per_epoch)
        batches = self.loader.epoch(progress.epoch, progress.step_in_epoch)
        guard, heartbeat = self.guard, self.parts.heartbeat
        guard.stop = False
        while progress.step_in_epoch < self.loader.steps_per_epoch and not self._complete and not guard.stop:
            self._draw_timesteps()
            engine.remember_buffers()
            measured = []
            for micro_batch in range(config.accumulation):
                heartbeat.beat("waiting for data", progress.global_step)
                images_BCHW, labels_B = meter.wait_for(batches)
                heartbeat.beat("training", progress.global_step)
                x_BCHW, labels = self.mixer(
                    self.parts.normalise(images_BCHW), labels_B, progress.global_step, micro_batch
                )
                terms, logits_TBK = self.step.forward_backward(x_BCHW, labels, guard.watch)
                measured.append(meter.measure(terms, logits_TBK, labels))
            heartbeat.beat("agreeing", progress.global_step)
            samples = partial(self.loader.samples, progress.epoch, progress.step_in_epoch)
            skip = guard.agree(progress.global_step, samples)
            self.step.update(skip=skip)
            if skip:
                engine.recall_buffers()
                self.parts.log.say(
                    f"step {progress.global_step + 1} skipped: its loss is not finite ({guard.skipped} so far)"
                )
            else:
                for values in measured:
                    meter.add(values)
            progress.step_in_epoch += 1
            progress.global_step += 1
            meter.step(progress.epoch, progress.step_in_epoch, progress.global_step, engine.learning_rate)
            if not self._underway:
                self._underway = True
                heartbeat.beat("training", progress.global_step)
                self.parts.log.say(f"first step after {heartbeat.describe_time()}")
            if guard.save and progress.step_in_epoch < self.loader.steps_per_epoch:
                self._save()
        batches.close()
        meter.flush(progress.epoch, progress.global_step, engine.learning_rate)
        # Told to stop, there may be no time to validate: the epoch is ended, and validated, when the run goes on.
        if progress.step_in_epoch == self.loader.steps_per_epoch and not guard.stop:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        return guard.stop

    def _draw_timesteps(self) -> None:
        """With `train.random_timesteps`, how many this optimiser step runs: a function of (seed, step)."""
        config = self.parts.config
        if config.train.random_timesteps:
            generator = np.random.default_rng([config.run.seed, self.progress.global_step])
            T = int(generator.integers(1, config.student.num_timesteps + 1))
            self.step.engine.student.set_num_timesteps(T)  # type: ignore[operator]

    @property
    def _complete(self) -> bool:
        train = self.parts.config.train
        by_steps = train.max_steps is not None and self.progress.global_step >= train.max_steps
        return by_steps or self.progress.epoch >= train.epochs

    def _measure_teacher(self, teacher: Teacher) -> None:
        """Record the teacher's accuracy, cross-entropy and mean top probability; `Mistake` if it is broken."""
        config = self.parts.config.teacher
        found = self.parts.validate(teacher, 1)
        self.parts.log.say(
            f"teacher {config.name}: top-1 {found['top1'][0]:.2f} %, cross-entropy {found['loss'][0]:.4f},"
            f" mean top probability {found['confidence'][0]:.3f} on {int(found['samples'])} images"
        )
        self.record.write(
            {
                "epoch": 0,
                "global_step": 0,
                "teacher/top1": found["top1"][0],
                "teacher/top5": found["top5"][0],
                "teacher/cross_entropy": found["loss"][0],
                "teacher/confidence": found["confidence"][0],
                "teacher/ece": found["ece"][0],
            }
        )
        if found["top1"][0] < config.min_top1:
            raise Mistake(
                f"teacher.min_top1={config.min_top1}: teacher {config.name} reaches {found['top1'][0]:.2f} % on"
                " data.val; check its weights, the order of the classes and data.image_size"
            )

    def _validate(self, seconds: float) -> dict[str, Any]:
        progress, parts = self.progress, self.parts
        found = parts.validate_student(self.step.engine.deployed)
        at = {"epoch": progress.epoch, "global_step": progress.global_step}
        self.record.write(at | flatten_curves(found, "val/"))
        parts.log.say(
            f"epoch {progress.epoch}/{parts.config.train.epochs}, step {progress.global_step}:"
            f" top-1 after each timestep {format_curve(found['top1'])} % ({format_seconds(seconds)})"
        )
        if found["top1_mean"] > progress.best:
            progress.best = found["top1_mean"]
            self._is_best = True
            parts.save_student(parts.folder.best_student_file, self.step.engine.deployed, progress)
        return found

    def _save(self) -> bool:
        """A checkpoint, on all ranks together; whether it stands."""
        folder, keep = self.parts.folder.checkpoints, self.parts.config.train.keep_checkpoints
        self.parts.heartbeat.beat("saving", self.progress.global_step)
        say, started = self.parts.log.say, time.monotonic()
        saved = checkpoint.save(folder, self.step.engine, self.progress, keep=keep, best=self._is_best, say=say)
        notice_s = self.parts.config.launcher.signal_delay_s
        if not self._warned and (warning := warn_of_short_notice(time.monotonic() - started, notice_s)):
            self._warned = True
            say(warning)
        self._is_best = False
        self.guard.saved()
        return saved


def _build_teacher(parts: Run) -> Teacher | None:
    config, place = parts.config, parts.place
    if not config.needs_teacher:
        return None
    if config.teacher.is_random:
        parts.log.say(f"warning: teacher {config.teacher.name} has random weights (teacher.pretrained=false)")
    teacher = create_teacher(
        config.teacher,
        config.data,
        num_classes=config.student.num_classes,
        in_chans=config.student.in_chans,
        weights_file=place.teacher_weights,
        class_names=parts.validation.class_names,
    )
    for note in teacher.notes:
        parts.log.say(f"teacher {config.teacher.name}: {note}")
    return teacher.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
