"""Weights in and out: safetensors that carry the student's configuration, and files that other programs wrote.

A student's file has in its metadata a JSON object, `student`: the `student:` section of its recipe with every default
filled in, `input_size` [C, H, W], the `mean` and `std` its images were normalised with, `crop_pct` and `label_names`.
"""

import argparse
import dataclasses
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdkd_dist.config import DataConfig, StudentConfig
from tdkd_dist.files import whole
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import create_student
from tdkd_dist.students.outside import is_outside
from tdkd_dist.students.resnet import CIFAR10, CIFAR100

WRAPPERS = ("state_dict", "model", "net", "model_state_dict", "network")
"""Keys under which training programs put a network's tensors."""
HARMLESS: list[Any] = [argparse.Namespace]
"""What old checkpoints hold besides tensors, numbers and plain containers: the arguments of their training."""


FIRST_STATISTICS = (".first_running_mean", ".first_running_var")
"""Of a batch norm's buffers, those of the first timestep."""
FURTHER = ("crop_pct", "label_names", "frames", "frame_choice")
"""What a file may say of a student's input and answers besides size, mean and std."""


def save_student(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    student: StudentConfig,
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float | None = None,
    label_names: Sequence[str] | None = None,
    frames: int | None = None,
    frame_choice: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a student (or an ordinary network) so that `load_student` gives it back with nothing else to say.

    The file appears under its name only when it is whole. `crop_pct` is validation's, `label_names` a name for each
    class, `frames` and `frame_choice` say which of a recording it was trained on; `extra` is further metadata, text by
    key.
    """
    neuron = dataclasses.replace(student.neuron, surrogate_alpha=student.neuron.slope)
    description = dataclasses.asdict(dataclasses.replace(student, neuron=neuron))
    del description["checkpoint"]  # where training started is of no use on another machine
    description |= {"input_size": list(input_size), "mean": list(mean), "std": list(std)}
    description |= {"crop_pct": crop_pct} if crop_pct is not None else {}
    description |= {"label_names": list(label_names)} if label_names is not None else {}
    description |= {"frames": frames, "frame_choice": frame_choice or "first"} if frames is not None else {}
    metadata = {**(extra or {}), "format": "pt", "student": json.dumps(description)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with whole(Path(path)) as partial:
        save_file(tensors, partial, metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """A file's metadata, `student` decoded; None if it holds no student's configuration. `Mistake` if unreadable."""
    if not os.path.isfile(path):
        raise Mistake(f"{path}: {_absent(path)}")
    if not _is_safetensors(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise Mistake(f"{path}: not a safetensors file, or cut short ({error})") from error
    if "student" not in metadata:
        return None
    return {**metadata, "student": _read_description(metadata["student"], path)}


def _read_description(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of its student: a mapping, in which what concerns the images is of the right kind."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    wanted = {"input_size": (int, 1, 65536), "mean": (int | float, -100, 100), "std": (int | float, 0.001, 100)}
    good = isinstance(found, dict)
    for key, (kind, least, most) in wanted.items():
        values: Any = found.get(key, [least] * 3) if good else None
        good = isinstance(values, list) and bool(values) and all(type(v) is not bool for v in values)
        good = good and all(isinstance(v, kind) and least <= v <= most for v in values)
    names: Any = found.get("label_names", []) if good else None
    crop_pct: Any = found.get("crop_pct", 1) if good else None
    good = good and isinstance(names, list) and all(isinstance(name, str) for name in names)
    good = good and type(crop_pct) in (int, float) and 0.01 <= crop_pct <= 1
    frames: Any = found.get("frames", 1) if good else None
    good = good and type(frames) is int and 1 <= frames <= 1024
    good = good and found.get("frame_choice", "first") in ("first", "regroup")
    if not good or len(found.get("mean", "")) != len(found.get("std", "")) or len(found.get("input_size", "xyz")) != 3:
        raise Mistake(
            f"{path}: what it says of its student is damaged; bring back the file, or import the weights again"
        )
    return dict(found)


def load_student(path: str | os.PathLike[str], *, allow_import: bool = False) -> nn.Module:
    """The network that `save_student` or `tools/import_weights.py` wrote, in fp32 and eval mode.

    Its `default_cfg` has the file's input size, mean and std, and those of `FURTHER` that the file has.
    Raises `Mistake`, naming the file, if it is no such file or its tensors do not fit its own configuration. A student
    from outside the package needs its module: import it before, or pass `allow_import=True` if you trust the file,
    since importing runs code.
    """
    metadata = read_metadata(path)
    if metadata is None:
        raise Mistake(f"{path}: holds no student's configuration; tools/import_weights.py writes files that do")
    with _understood(path):
        student, shown = _as_saved(metadata["student"])
        model = create_student(student, allow_import=allow_import)
    load_weights(model, path, "student.checkpoint")
    model.default_cfg = model.pretrained_cfg = {  # type: ignore[assignment]
        **getattr(model, "default_cfg", {}),
        **shown,
        "num_classes": student.num_classes,
    }
    return model.eval()


def evaluated(student: StudentConfig) -> tuple[StudentConfig, str | None]:
    """What evaluates `student.checkpoint`, and a line that says what of `student` that is not.

    Much of a student is in no tensor: it is what the file says, at `student`'s number of timesteps. A file that says
    nothing, or is not there, leaves `student` as it is. Raises `Mistake` for an unreadable one, and for one of a
    student from outside the package, unless `student` names it: it would be imported.
    """
    path = student.checkpoint
    metadata = read_metadata(path) if path is not None and os.path.isfile(path) else None
    if path is None or metadata is None:
        return student, None
    with _understood(path):
        saved, _ = _as_saved(metadata["student"])
        if is_outside(saved.model) and saved.model != student.model:
            raise Mistake(f"is of {saved.model}; set student.model={saved.model} to import it")
    kept = {key: getattr(student, key) for key in ("checkpoint", "num_timesteps")}
    found = dataclasses.replace(saved, **kept)
    given, used = _without_defaults(student), _without_defaults(found)
    differ = [f"{key}={used[key]} and not {given[key]}" for key in used if used[key] != given[key]]
    return found, f"student.checkpoint={path} is evaluated as it was trained: {', '.join(differ)}" if differ else None


def _without_defaults(student: StudentConfig) -> dict[str, Any]:
    """What evaluation depends on, by key."""
    neuron = dataclasses.replace(student.neuron, surrogate="sigmoid", surrogate_alpha=None, detach_reset=False)
    found = dataclasses.asdict(dataclasses.replace(student, neuron=neuron, drop_path=0, zero_init_last=None))
    return {k: v for k, v in found.items() if k != "neuron"} | {f"neuron.{k}": v for k, v in found["neuron"].items()}


def _as_saved(description: Mapping[str, Any]) -> tuple[StudentConfig, dict[str, Any]]:
    """A file's student, and what its images and answers are."""
    rest = dict(description)
    shown: dict[str, Any] = {key: tuple(rest.pop(key)) for key in ("input_size", "mean", "std")}
    shown |= {key: rest.pop(key) for key in FURTHER if key in rest}
    return StudentConfig(**rest | {"neuron": NeuronConfig(**rest["neuron"])}), shown


@contextmanager
def _understood(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is wrong with what a file says of its student names the file."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from mistake
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise Mistake(f"{path}: its student's configuration is not this version's: {error}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], key: str) -> None:
    """Load a safetensors file, or one that `torch.save` wrote, into a model that it must fit exactly.

    A `state_dict` or `model` wrapper and a `module.` prefix are taken off. Raises `Mistake`, one line that starts
    with `{key}={path}: ` and names the tensors, for anything that does not fit.
    """
    fit(model, read_tensors(path, key), f"{key}={path}")


def read_tensors(path: str | os.PathLike[str], key: str, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Tensor]:
    """A file's tensors by name, on the CPU, without wrapper and `module.` prefix; nothing in the file is executed."""
    if not os.path.isfile(path):
        raise Mistake(f"{key}={path}: {_absent(path)}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = load_file(path) if _is_safetensors(path) else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Mistake(f"{key}={path}: not a checkpoint of tensors alone, or cut short") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise Mistake(f"{key}={path}: not a checkpoint, or cut short ({cause})") from error
    for wrapper in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise Mistake(f"{key}={path}: not a checkpoint: tensors by name wanted, found {_describe(content)}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def fit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into the model; `Mistake`, starting with `where`, naming what does not fit."""
    own = model.state_dict()
    # A learned leak is a scalar in older files and in spikingjelly's.
    tensors = {n: t.reshape(1) if t.ndim == 0 and n in own and own[n].ndim == 1 else t for n, t in tensors.items()}
    # Files from before batch norm counted its batches lack the count, which only momentum=None reads.
    missing = [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")]
    extra = [n for n in tensors if n not in own]
    shapes = [n for n in own if n in tensors and tensors[n].shape != own[n].shape]
    classifier = [n for n in shapes if n.rpartition(".")[0] in _classifiers(model)]
    faults = []
    if classifier and all(tensors[n].ndim == own[n].ndim for n in classifier):
        found, wanted = (t[classifier[0]].shape[0] for t in (tensors, own))
        if found != wanted:
            shapes = [n for n in shapes if n not in classifier]
            faults.append(f"has {found} classes, {wanted} wanted")
    if missing:
        faults.append(f"lacks {_some(missing)}")
    if extra:
        faults.append(f"has {_some(extra)} that the model lacks")
    if any(n.endswith(".w") for n in extra):
        faults.append("its leaks are learned, which wants student.neuron.kind=plif")
    for own_start in ("v_init", "first_scale"):
        if any(n.endswith(f".{own_start}") for n in extra):
            faults.append(f"its neurons have learned their {own_start}, which wants student.neuron.{own_start}=learned")
    if any(n.endswith(FIRST_STATISTICS) for n in extra):
        faults.append("its first timestep has statistics of its own, which wants student.first_statistics=true")
    if shapes:
        faults.append("has " + _some([f"{n} {list(tensors[n].shape)} instead of {list(own[n].shape)}" for n in shapes]))
    if faults:
        raise Mistake(f"{where}: {'; '.join(faults)}")
    model.load_state_dict(tensors, strict=False)


def convert_released(tensors: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """The tensors of the released code's network (Yu et al. 2025), under this package's names.

    Its preact_resnet34 has them already; its resnet18 and resnet19, spiking or ReLU, are renamed.
    """
    hidden = model.endswith("resnet19")
    rules = {r"^conv0\.0\.": "conv1.", r"^conv0\.1\.": "bn1.", r"\.shortcut\.": ".downsample."}
    rules |= {r"^(classifier|fc)\.0\.": "fc1." if hidden else "fc.", r"^(classifier|fc)\.2\.": "fc."}
    return _rename(tensors, rules)


def convert_spikingjelly(
    tensors: Mapping[str, Tensor], student: StudentConfig, decay_input: bool = False
) -> dict[str, Tensor]:
    """The tensors of spikingjelly's `SEWResNet` or `MSResNet`, under this package's names.

    `decay_input`: the file was trained with spikingjelly's `decay_input=True`, its default, where the neuron's input
    is scaled by 1/tau = 1 - decay. That is the same as scaling the weight and bias of the batch norm before it. Raises
    `Mistake` for a network in which something else than one batch norm feeds a neuron.
    """
    rules = {r"^stem\.0\.": "conv1.", r"^stem\.1\.": "bn1.", r"^head\.": "fc."}
    rules |= {r"^head_lif\.": "sn_head.", r"\bspike(\d)\.": r"sn\1."}
    # The SEW-ResNets of the paper (2021) keep each convolution and its norm in a container.
    rules |= {r"\.conv(\d)\.module\.0\.": r".conv\1.", r"\.conv(\d)\.module\.1\.": r".bn\1."}
    rules |= {r"\.downsample\.0\.module\.": ".downsample."}
    renamed = _rename(tensors, rules)
    if not decay_input:
        return renamed
    if not student.model.startswith("sew_") or student.neuron.kind == "if":
        raise Mistake(f"decay_input=true: for SEW-ResNets with a leak, not {student.model} of {student.neuron.kind}")
    scaled = dict(renamed)
    for name, tensor in renamed.items():
        match = re.fullmatch(r"(.*?)(?:bn(\d)|downsample\.1)\.(?:weight|bias)", name)
        if match:
            w = renamed.get(f"{match[1]}sn{match[2]}.w" if match[2] else f"{match[1]}downsample_sn.w")
            scaled[name] = tensor * (1 - student.neuron.decay if w is None else w.sigmoid())
    return scaled


def start_from_relu(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> str:
    """Start a student from a ReLU network's weights and say what was taken.

    Everything must fit (`Mistake`, as `fit`) but a classifier for other classes and what only the student's
    neurons learn: that stays as initialised.
    """
    own = model.state_dict()
    fresh = (".w", ".v_init", ".first_scale", *FIRST_STATISTICS)
    left = {n: t for n, t in own.items() if n.endswith(fresh) and n not in tensors}
    left |= {n: tensors.get(n.replace(".first_", "."), left[n]) for n in left if n.endswith(FIRST_STATISTICS)}
    for layer in _classifiers(model):
        names = [n for n in own if n.rpartition(".")[0] == layer]
        if any(n not in tensors or tensors[n].shape != own[n].shape for n in names):
            left |= {n: own[n] for n in names}
    fit(model, {**tensors, **left}, where)
    return f"took {len(own) - len(left)} of {len(own)} tensors" + (
        f"; left as initialised: {_some(left)}" if left else ""
    )


def import_student(
    source: str,
    dest: str | os.PathLike[str],
    form: Literal["official", "spikingjelly", "timm"],
    student: StudentConfig,
    *,
    decay_input: bool = False,
    data: DataConfig | None = None,
) -> str:
    """Write at `dest` a student's file from `source`; return a line that says what was taken.

    Its images are `data`'s, or else of the size, mean and std that the model was made for.

    `official`: a checkpoint of the released code (its `best_net`); `spikingjelly`: a state dict of its SEWResNet or
    MSResNet; both must fit exactly. `timm`: a ReLU ResNet, a file or a timm name with pretrained weights, as the
    initialisation of a SEW student. Raises `Mistake`, naming file and tensors, for anything that does not fit.
    """
    if is_outside(student.model):
        raise Mistake(f"model={student.model}: must be a student of the package; files of others fit no other")
    model = create_student(student)
    if form == "timm":
        tensors = read_tensors(source, "source") if os.path.isfile(source) else _pretrained(source)
        taken = start_from_relu(model, tensors, f"source={source}")
    else:
        tensors = read_tensors(source, "source", ("best_net", *WRAPPERS))
        if form == "official":
            tensors = convert_released(tensors, student.model)
        else:
            tensors = convert_spikingjelly(tensors, student, decay_input)
        fit(model, tensors, f"source={source}")
        taken = f"took all {len(tensors)} tensors"
    save_student(dest, model.state_dict(), student, **_images(model, student, data))
    return f"{dest}: {student.model} from {source}: {taken}"


def _images(model: nn.Module, student: StudentConfig, data: DataConfig | None) -> dict[str, Any]:
    """What `save_student` is told of an imported student's images."""
    if data is not None:
        mean, std = data.normalisation(student.in_chans)
        found = {"mean": mean, "std": std, "crop_pct": data.crop_pct}
        found |= {"frames": data.frames, "frame_choice": data.frame_choice}
        return found | {"input_size": (student.in_chans, data.image_size, data.image_size)}
    cfg: Mapping[str, Any] = model.default_cfg  # type: ignore[assignment]
    if student.num_classes == 100 and cfg["mean"] == CIFAR10["mean"]:
        cfg = {**cfg, **CIFAR100}
    size = (student.in_chans, *cfg["input_size"][1:])
    return {"input_size": size, "mean": cfg["mean"], "std": cfg["std"], "crop_pct": cfg.get("crop_pct")}


def _pretrained(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.partition(".")[0]):
        raise Mistake(f"source={name}: neither a file nor a timm model")
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except (OSError, RuntimeError, ValueError) as error:  # no network, or no such tag
        cause = " ".join(str(error).split())
        raise Mistake(f"source={name}: its weights cannot be had here ({cause[:200]}); give a file of them") from error


def _rename(tensors: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _some(names: Iterable[str], shown: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _describe(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a dict with keys {_some(map(str, content))}" if content else "an empty dict"
    return f"a {type(content).__name__}"


def _absent(path: str | os.PathLike[str]) -> str:
    return "a folder; give the file in it" if os.path.isdir(path) else "no such file"


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By content: eight bytes of header length, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"
