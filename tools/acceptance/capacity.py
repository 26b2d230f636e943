"""Capacity: whether every recipe's micro-batch fits, and how many images a second are validated.

Shapes: B images, C channels, H and W pixels.
"""

import gc
import time

import torch

from acceptance.found import Found
from acceptance.scale import Scale
from tdkd_dist.config import Config
from tdkd_dist.data.batch import Batch
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.recipe import list_recipes, load_config
from tdkd_dist.students import create_student
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.engine import use_bf16
from tdkd_dist.training.step import build_untrained
from tdkd_dist.validate import validate


def recipes(scale: Scale) -> Found:
    """Peak memory of a step of every recipe's micro-batch: eager, which takes the most, and compiled where that is too
    much.
    """
    scale.spare_code_generation()
    found = Found()
    scale.start_group()
    for name in scale.recipes or [name for name in list_recipes() if load_config(name, []).launcher.gpus_per_node]:
        config = _micro_batch_of(scale, name)
        figure = f"{name} ({config.micro_batch} images): MiB"
        for compiled in (False, True):
            peak = _peak_mib(scale, config, compiled=compiled)
            found.figures[figure] = "does not fit" if peak is None else peak
            if peak is not None and peak <= scale.memory_mib:
                break
            figure = f"{name} ({config.micro_batch} images), compiled: MiB"
        if scale.on_gpu:
            found.at_most(figure, scale.memory_mib)
        found.tell()
    return found


def _micro_batch_of(scale: Scale, name: str) -> Config:
    """The recipe on one rank that takes one micro-batch a step; a small one on a processor."""
    recipe = load_config(name, [])
    small = scale.small
    settings = {
        "train.batch_size": recipe.micro_batch,
        "launcher.gpus_per_node": 1,
        "launcher.tasks_per_node": 1,
        "launcher.nodes": 1,
    }
    if not scale.on_gpu:
        settings |= {"train.batch_size": small.micro_batch, "launcher.gpus_per_node": 0}
        settings |= {"data.image_size": small.image_size, "student.num_timesteps": small.timesteps}
    return load_config(name, [f"{key}={value}" for key, value in settings.items()])


def _peak_mib(scale: Scale, config: Config, *, compiled: bool) -> float | None:
    """Of a second step; None if it does not fit."""
    size, channels, n = config.data.image_size, config.student.in_chans, config.micro_batch
    try:
        step = build_untrained(config, scale.device, compiled=compiled)
        x_BCHW = torch.randn(n, channels, size, size, device=scale.device).to(memory_format=torch.channels_last)
        labels_B = torch.randint(config.student.num_classes, (n,), device=scale.device)
        batches = [(x_BCHW, labels_B)] * config.accumulation
        step(batches)
        return scale.peak_mib(lambda: step(batches))
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
        if scale.on_gpu:
            torch.cuda.empty_cache()


def validation(scale: Scale) -> Found:
    """Images a second of the pass that measures every timestep, compiled as after a training epoch, and eager."""
    scale.spare_code_generation()
    found, size = Found(), scale.whole
    config = scale.config(size)
    normalise = Normalise(config.data.mean, config.data.std).to(scale.device)
    images_BCHW, labels_B = scale.batch(size)
    batch = Batch(images_BCHW.mul(50).add(128).clamp(0, 255).to(torch.uint8), labels_B)
    batches, autocast = [batch] * scale.validation_batches, use_bf16(config, scale.device)
    images = scale.validation_batches * size.micro_batch
    for title in ("eager", "compiled"):
        student = create_student(config.student).train().to(scale.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if title == "compiled":
            compile_training(student, config.train.activation_budget)
        for measured in (False, True):
            started = time.perf_counter()
            row = validate(
                student,
                batches if measured else batches[:2],
                normalise,
                num_timesteps=size.timesteps,
                device=scale.device,
                autocast=autocast,
                activity_images=0,
            )
            seconds = time.perf_counter() - started
        found.figures[f"{title}: images/s"] = images / seconds
        found.holds(f"{title}: all images counted", row["samples"] == images)
    return found
