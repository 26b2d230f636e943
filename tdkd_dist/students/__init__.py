"""The students, registered with timm, and `create_student`, which builds one as a recipe describes it."""

import difflib
from typing import Any

import timm
from torch import nn

from tdkd_dist.config import Config, StudentConfig
from tdkd_dist.mistakes import Mistake
from tdkd_dist.students import ms_resnet, relu_resnet, sew_resnet, spiking_resnet
from tdkd_dist.students.base import SpikingNet

__all__ = ["SpikingNet", "choose_recomputed", "create_student", "is_spiking", "relu_resnet", "spiking_names"]

_SEW = tuple(sew_resnet.default_cfgs)


def spiking_names() -> tuple[str, ...]:
    """Every spiking student, by the name that `timm.create_model` takes."""
    return (*_SEW, *ms_resnet.default_cfgs, *spiking_resnet.default_cfgs)


def is_spiking(model: nn.Module) -> bool:
    """Whether the model gives logits `[T, B, K]`; one wrapped by torch.compile or DistributedDataParallel counts."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    return isinstance(model, SpikingNet)


def choose_recomputed(model: nn.Module, config: Config) -> None:
    """Set up `train.recompute_stages`. Raises `Mistake`, naming the key, where the model has no such stages."""
    stages = config.train.recompute_stages
    if not stages:
        return
    if not isinstance(model, SpikingNet):
        raise Mistake(f"train.recompute_stages={stages}: student.model={config.student.model} is no spiking network")
    try:
        model.recompute(stages)
    except ValueError as error:
        raise Mistake(f"train.recompute_stages={stages}: {config.student.model} has {error}") from error


def create_student(cfg: StudentConfig) -> nn.Module:
    """The network of a recipe's `student:` section, with fresh weights (`cfg.checkpoint` is not read).

    A spiking student gets everything; any other timm model is an ordinary network and gets classes and channels.
    Raises `Mistake`, naming the key, for an unknown model or an argument the model does not take.
    """
    spiking = cfg.model in spiking_names()
    if not spiking and not timm.is_model(cfg.model.partition(".")[0]):
        near = difflib.get_close_matches(cfg.model, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the students are {', '.join(spiking_names())}"
        raise Mistake(f"student.model={cfg.model}: no such model; {hint}")
    if cfg.connect is not None and cfg.model not in _SEW:
        raise Mistake(f"student.connect={cfg.connect}: {cfg.model} has no such choice, only SEW-ResNets do")
    only_spiking = {"width": cfg.width, "drop_path": cfg.drop_path or None, "zero_init_last": cfg.zero_init_last}
    arguments: dict[str, Any] = {"num_classes": cfg.num_classes, "in_chans": cfg.in_chans}
    if cfg.model in relu_resnet.default_cfgs:
        arguments["width"] = only_spiking.pop("width")
    for key, value in only_spiking.items():
        if value is not None and not spiking:
            raise Mistake(f"student.{key}={value}: {cfg.model} has no such choice, only spiking students do")
    if spiking:
        arguments |= {
            "num_timesteps": cfg.num_timesteps,
            "neuron": cfg.neuron,
            "connect": cfg.connect,
            "width": cfg.width,
            "drop_path_rate": cfg.drop_path,
            "zero_init_last": cfg.zero_init_last,
        }
    try:
        model: nn.Module = timm.create_model(cfg.model, **arguments)  # which drops arguments that are None
    except RuntimeError as error:
        raise Mistake(f"student.model={cfg.model}: {error}") from error
    return model
