"""All that can be checked before a job is submitted and a GPU touched."""

import os
from dataclasses import dataclass

import timm.optim
import torch

from tdkd_dist.config import Config, require
from tdkd_dist.data.beton import check_beton
from tdkd_dist.data.loaders import open_folder
from tdkd_dist.students import create_student, is_spiking
from tdkd_dist.teachers import check_name, check_pretrained_classes, create_teacher, fetch_weights
from tdkd_dist.weights import load_weights


@dataclass
class Findings:
    """What the checks learned; None where the recipe does not say yet (a dry run)."""

    train_samples: int | None
    val_samples: int | None
    teacher_weights: str | None

    def steps_per_epoch(self, config: Config) -> int | None:
        """Optimiser steps an epoch; the tail that fills no batch is dropped."""
        return None if self.train_samples is None else self.train_samples // config.train.batch_size


def check(config: Config, *, cluster: str, dry_run: bool = False) -> Findings:
    """Check files, names, classes and the machine against each other.

    Raises `ValueError` with one line that names the key or file. A dry run lets data paths be absent and fetches no
    weights; what is given is checked all the same.
    """
    _check_machine(config, cluster)
    train_samples = val_samples = None
    if config.train.epochs > 0:
        train_samples = _check_data(config, "train", dry_run)
    val_samples = _check_data(config, "val", dry_run)
    if train_samples is not None:
        require(
            train_samples >= config.train.batch_size,
            f"train.batch_size={config.train.batch_size}: data.train={config.data.train} has only {train_samples}"
            " images",
        )
    names = timm.optim.list_optimizers()
    require(config.optim.name in names, f"optim.name={config.optim.name}: timm knows {', '.join(names[:12])}, ...")
    _check_student(config)
    teacher_weights = None
    if config.loss.alpha > 0 and config.train.epochs > 0:
        teacher_weights = _check_teacher(config, dry_run)
    return Findings(train_samples, val_samples, teacher_weights)


def _check_machine(config: Config, cluster: str) -> None:
    launcher, data = config.launcher, config.data
    if cluster == "slurm":
        return
    require(
        launcher.nodes == 1, f"launcher.nodes={launcher.nodes}: this machine is one node; use launcher.cluster=slurm"
    )
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    require(
        launcher.gpus_per_node <= gpus,
        f"launcher.gpus_per_node={launcher.gpus_per_node}: this machine has {gpus};"
        " launcher.gpus_per_node=0 trains on the CPU",
    )
    require(
        data.workers is None or data.workers <= cores, f"data.workers={data.workers}: this machine has {cores} cores"
    )


def _check_data(config: Config, split: str, dry_run: bool) -> int | None:
    path, key = getattr(config.data, split), f"data.{split}"
    if path is None:
        what = "a beton (see tools/write_beton.py)" if config.data.format == "ffcv" else "an ImageFolder tree"
        require(dry_run, f"{key} is not set: give the path of {what}")
        return None
    if config.data.format == "imagefolder":
        source = open_folder(path, key)
        samples, classes = len(source.labels), len(source.class_names)
    else:
        info = check_beton(path, key)
        samples, classes = info.num_samples, info.num_classes or 0
    require(
        classes <= config.student.num_classes,
        f"{key}={path} has {classes} classes and student.num_classes is {config.student.num_classes}",
    )
    return samples


def _check_student(config: Config) -> None:
    student = create_student(config.student)
    require(
        is_spiking(student) or (config.student.num_timesteps == 1 and config.eval_timesteps == 1),
        f"student.model={config.student.model} is no spiking network: set student.num_timesteps=1",
    )
    if config.student.checkpoint is not None:
        load_weights(student, config.student.checkpoint, "student.checkpoint")


def _check_teacher(config: Config, dry_run: bool) -> str | None:
    teacher, student = config.teacher, config.student
    check_name(teacher)
    if teacher.checkpoint is not None:
        create_teacher(teacher, config.data, num_classes=student.num_classes, in_chans=student.in_chans)
    elif teacher.pretrained:
        assert teacher.name is not None
        check_pretrained_classes(teacher.name, student.num_classes)
        return None if dry_run else fetch_weights(teacher.name)
    return None
