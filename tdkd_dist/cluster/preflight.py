"""All that can be checked before a job is submitted and a GPU touched."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import timm.optim
import torch

from tdkd_dist.anytime import ExitRule
from tdkd_dist.batch_norm import synchronise
from tdkd_dist.cluster import slurm
from tdkd_dist.config import Config, flatten
from tdkd_dist.data.beton.manifest import check_beton
from tdkd_dist.data.checks import check_frames, compare_classes
from tdkd_dist.data.loaders import count_classes, open_pictures, signature_of
from tdkd_dist.data.sources.source import one_line
from tdkd_dist.mistakes import Mistake, Mistakes, require
from tdkd_dist.students import choose_recomputed, create_student, is_spiking
from tdkd_dist.students.outside import is_outside
from tdkd_dist.teachers import check_name, check_pretrained_classes, create_teacher, fetch_weights
from tdkd_dist.weights import evaluated, load_weights, read_tensors


@dataclass
class Findings:
    """What the checks learned."""

    train_samples: int | None = None
    val_samples: int | None = None
    teacher_weights: str | None = None
    """timm's weights of the teacher on this machine."""
    class_names: Sequence[str] | None = None
    """Of the data, where it has them."""
    data: dict[str, str] = field(default_factory=dict)
    """The signature of each split that is here."""
    absent: list[str] = field(default_factory=list)
    """Dry run: what is not here yet, a line each."""
    advice: list[str] = field(default_factory=list)
    """What had better be set, a line each."""

    def steps_per_epoch(self, config: Config) -> int | None:
        """Optimiser steps an epoch; the tail that fills no batch is dropped. None: the data is not here yet."""
        return None if self.train_samples is None else self.train_samples // config.train.batch_size


def check(config: Config, *, cluster: str, dry_run: bool = False) -> Findings:
    """Check files, names, classes and the machine against each other.

    Raises `Mistake`, a line for each thing that is wrong, which names the key or file. A dry run fetches no weights,
    and lists what is merely absent (files, GPUs) instead of raising; what is here is checked all the same.
    """
    found, mistakes = Findings(), Mistakes()
    with mistakes.gathered():
        if config.train.epochs == 0:
            config = replace(config, student=evaluated(config.student)[0])
    with mistakes.gathered():
        _check_machine(config, cluster, found, dry_run)
    if config.train.epochs > 0:
        with mistakes.gathered():
            found.train_samples = _check_data(config, "train", found, dry_run)
    with mistakes.gathered():
        found.val_samples = _check_data(config, "val", found, dry_run)
    mistakes.require(
        found.train_samples is None or found.train_samples >= config.train.batch_size,
        f"train.batch_size={config.train.batch_size}: data.train={config.data.train} has only {found.train_samples}"
        " images",
    )
    with mistakes.gathered():
        _check_optimizer(config, found)
    with mistakes.gathered():
        _check_student(config, found, dry_run)
    if config.needs_teacher:
        with mistakes.gathered():
            _check_teacher(config, found, dry_run)
    if config.eval.exit is not None:
        with mistakes.gathered():
            _check_exit(config, config.eval.exit, found, dry_run)
    mistakes.tell()
    return found


def check_all(configs: list[Config], *, cluster: str) -> list[Findings]:
    """What `check` finds of each member of a sweep; those that differ in nothing but seed and name are checked once.

    Raises `Mistake` with the lines of all of them.
    """
    alike = [repr({k: v for k, v in flatten(config).items() if not k.startswith("run.")}) for config in configs]
    found, mistakes = {}, Mistakes()
    for key, config in dict(zip(alike, configs, strict=True)).items():
        with mistakes.gathered():
            found[key] = check(config, cluster=cluster)
    mistakes.tell()
    return [found[key] for key in alike]


def _is_here(path: str, key: str, found: Findings, dry_run: bool) -> bool:
    if dry_run and not Path(path).exists():
        found.absent.append(f"{key}={path}: no such file")
        return False
    return True


def _check_machine(config: Config, cluster: str, found: Findings, dry_run: bool) -> None:
    launcher, data = config.launcher, config.data
    if cluster == "slurm":
        partitions = slurm.partitions(launcher)
        reason = slurm.never_starts(launcher, partitions)
        require(reason is None or dry_run, f"{reason}; Slurm could never start this job")
        found.advice += [f"Slurm could never start this job: {reason}"] if reason else []
        found.advice += slurm.advice(launcher, partitions)
        return
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = f"this machine has {gpus}" if chosen is None else f"CUDA_VISIBLE_DEVICES={chosen} shows {gpus}"
    interfaces = [name for _, name in socket.if_nameindex()]
    mistakes = Mistakes()
    for fits, message in (
        (launcher.nodes == 1, f"launcher.nodes={launcher.nodes}: this machine is one; use launcher.cluster=slurm"),
        (
            launcher.gpus_per_node <= gpus,
            f"launcher.gpus_per_node={launcher.gpus_per_node}: {here}; launcher.gpus_per_node=0 trains on the CPU",
        ),
        (data.workers is None or data.workers <= cores, f"data.workers={data.workers}: only {cores} cores here"),
        (
            launcher.network_interface is None or launcher.network_interface in interfaces,
            f"launcher.network_interface={launcher.network_interface}: this machine has {', '.join(interfaces)}",
        ),
    ):
        if dry_run and not fits:
            found.absent.append(message)
        else:
            mistakes.require(fits, message)
    mistakes.tell()


def _check_data(config: Config, split: str, found: Findings, dry_run: bool) -> int | None:
    path, key = getattr(config.data, split), f"data.{split}"
    if path is None:
        what = "a beton (see tools/write_beton.py)" if config.data.format == "ffcv" else "an ImageFolder tree"
        message = f"{key} is not set: give the path of {what}"
        require(dry_run, message)
        found.absent.append(message)
        return None
    if not _is_here(path, key, found, dry_run):
        return None
    if config.data.format == "imagefolder":
        source = open_pictures(path, key)
        compare_classes(config.data, key, source)
        samples, classes, found.class_names = len(source.labels), count_classes(source), source.class_names
        found.data[split] = signature_of(source)
    else:
        info = check_beton(path, key)
        check_frames(config.data, key, info, config.student.in_chans)
        compare_classes(config.data, key, info)
        found.class_names = info.class_names
        samples, classes = info.num_samples, max(info.num_classes or 0, info.largest_label + 1)
        found.data[split] = info.signature
    require(
        config.data.frames is not None or config.student.in_chans == 3,
        f"student.in_chans={config.student.in_chans}: pictures are read in colour, grey ones too; make it 3",
    )
    require(
        classes <= config.student.num_classes,
        f"{key}={path} has {classes} classes and student.num_classes is {config.student.num_classes}",
    )
    return samples


def _check_student(config: Config, found: Findings, dry_run: bool) -> None:
    student = create_student(config.student)
    subclass = "make it a tdkd_dist.students.SpikingNet, or " if is_outside(config.student.model) else ""
    require(
        is_spiking(student) or (config.student.num_timesteps == 1 and config.eval_timesteps == 1),
        f"student.model={config.student.model} is no spiking network: {subclass}set student.num_timesteps=1",
    )
    frames = config.data.frames
    require(
        frames is None or not is_spiking(student) or config.student.num_timesteps == frames,
        f"student.num_timesteps={config.student.num_timesteps}: data.frames={frames} are one a timestep; make it that",
    )
    require(
        is_spiking(student) or not config.train.random_timesteps,
        f"train.random_timesteps: student.model={config.student.model} is no spiking network",
    )
    choose_recomputed(student, config)
    checkpoint = config.student.checkpoint
    if checkpoint is not None and _is_here(checkpoint, "student.checkpoint", found, dry_run):
        load_weights(student, checkpoint, "student.checkpoint")
    if config.train.epochs > 0 and config.train.sync_bn and config.launcher.world_size > 1:
        synchronise(student)


def _check_exit(config: Config, path: str, found: Findings, dry_run: bool) -> None:
    """A rule of as many timesteps, which was not chosen on the pictures that are reported."""
    if not _is_here(path, "eval.exit", found, dry_run):
        return
    rule = ExitRule.load(path)
    T = config.eval_timesteps
    require(
        rule.num_timesteps in (None, T),
        f"eval.exit={path}: a rule for {rule.num_timesteps} timesteps; set eval.num_timesteps={rule.num_timesteps},"
        f" not {T}",
    )
    require(
        "val" not in found.data or rule.calibration.get("signature") != found.data["val"],
        f"eval.exit={path}: was chosen on data.val={config.data.val} itself, so that nothing could be reported;"
        " calibrate it on pictures set apart (tools/write_beton.py --holdout)",
    )


def _check_optimizer(config: Config, found: Findings) -> None:
    """Build it and take a step of a small network: some need what is not here, or gradients of gradients."""
    optim, names = config.optim, timm.optim.list_optimizers()
    known = optim.name in names
    require(known, f"optim.name={optim.name}: timm knows {', '.join(names[:12])}, ...")
    linear = torch.nn.Linear(2, 2)
    torch.autograd.backward(linear(torch.ones(1, 2)).square().mean())
    try:
        optimizer = timm.optim.create_optimizer_v2(
            linear, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        optimizer.step()
    except Exception as error:  # whatever an optimiser of another package raises
        if "CUDA required" in str(error) and config.launcher.gpus_per_node > 0 and not torch.cuda.is_available():
            found.advice.append(f"optim.name={optim.name}: could not be tried here, it needs a GPU")
            return
        raise Mistake(f"optim.name={optim.name}: cannot be used here: {one_line(error)}; choose another") from error


def _check_teacher(config: Config, found: Findings, dry_run: bool) -> None:
    teacher, student = config.teacher, config.student
    check_name(teacher)
    here = teacher.checkpoint is not None and _is_here(teacher.checkpoint, "teacher.checkpoint", found, dry_run)
    if not found.data:  # which of its classes are the data's, that must say
        if here and teacher.checkpoint is not None:
            read_tensors(teacher.checkpoint, "teacher.checkpoint")
        return
    if teacher.checkpoint is not None:
        if here:
            classes, channels, names = student.num_classes, student.in_chans, found.class_names
            create_teacher(teacher, config.data, num_classes=classes, in_chans=channels, class_names=names)
    elif teacher.pretrained:
        assert teacher.name is not None
        check_pretrained_classes(teacher, student.num_classes, found.class_names)
        if not dry_run:
            found.teacher_weights = fetch_weights(teacher.name)
