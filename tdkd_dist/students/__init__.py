"""The students, registered with timm, and `create_student`, which builds one as a recipe describes it."""

import difflib
from typing import Any

import timm
from torch import nn

from tdkd_dist.config import Config, StudentConfig
from tdkd_dist.mistakes import Mistake
from tdkd_dist.students import ms_resnet, outside, relu_resnet, sew_resnet, spiking_resnet
from tdkd_dist.students.base import DECLARED, SpikingNet

__all__ = [
    "SpikingNet",
    "choose_recomputed",
    "create_student",
    "is_spiking",
    "ms_resnet",
    "relu_resnet",
    "sew_resnet",
    "spiking_names",
    "spiking_resnet",
]


def spiking_names() -> tuple[str, ...]:
    """Every spiking student of the package, by the name that `timm.create_model` takes."""
    return tuple(name for name, declared in DECLARED.items() if declared.spiking)


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


def create_student(cfg: StudentConfig, *, allow_import: bool = True) -> nn.Module:
    """The network of a recipe's `student:` section, with fresh weights (`cfg.checkpoint` is not read).

    It gets what it declares to take: a spiking student timesteps and neuron, any other timm model classes and channels
    alone. A student from outside the package is imported, unless `allow_import` is false. Raises `Mistake`, naming the
    key, for an unknown model or an option that the model does not take.
    """
    options = _chosen_options(cfg)
    if outside.is_outside(cfg.model):
        return outside.create(cfg.model, _spiking_arguments(cfg), _as_arguments(options), allow_import=allow_import)
    declared = DECLARED.get(cfg.model)
    if declared is None and not timm.is_model(cfg.model.partition(".")[0]):
        near = difflib.get_close_matches(cfg.model, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the students are {', '.join(spiking_names())}"
        raise Mistake(f"student.model={cfg.model}: no such model; {hint}")
    for key, value in options.items():
        if declared is None or key not in declared.options:
            able = sorted({d.family for d in DECLARED.values() if key in d.options})
            raise Mistake(f"student.{key}={value}: {cfg.model} has no such choice, only {', '.join(able)} have")
    spiking = declared is not None and declared.spiking
    arguments = _spiking_arguments(cfg) if spiking else {"num_classes": cfg.num_classes, "in_chans": cfg.in_chans}
    try:
        model: nn.Module = timm.create_model(cfg.model, **arguments, **_as_arguments(options))
    except RuntimeError as error:
        raise Mistake(f"student.model={cfg.model}: {error}") from error
    return model


def _chosen_options(cfg: StudentConfig) -> dict[str, Any]:
    """What the section sets of the options that only some networks take, by key."""
    options = {
        "connect": cfg.connect,
        "width": cfg.width,
        "drop_path": cfg.drop_path or None,
        "zero_init_last": cfg.zero_init_last,
        "first_statistics": cfg.first_statistics or None,
    }
    return {key: value for key, value in options.items() if value is not None}


def _spiking_arguments(cfg: StudentConfig) -> dict[str, Any]:
    return {
        "num_classes": cfg.num_classes,
        "in_chans": cfg.in_chans,
        "num_timesteps": cfg.num_timesteps,
        "neuron": cfg.neuron,
    }


def _as_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Under timm's names."""
    return {"drop_path_rate" if key == "drop_path" else key: value for key, value in options.items()}
