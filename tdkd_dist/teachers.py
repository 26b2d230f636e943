"""The frozen teacher: any timm model, fed with the student's crops in its own normalisation.

Shapes: B batch, C channels, H and W pixels, K classes.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from tdkd_dist.config import DataConfig, TeacherConfig
from tdkd_dist.data.normalise import as_input
from tdkd_dist.mistakes import Mistake
from tdkd_dist.weights import load_weights, read_metadata, read_tensors

IMAGENET_CLASSES = 1000


class Teacher(nn.Module):
    """A frozen classifier in eval mode, behind the change from the student's normalisation to its own.

    Crops keep their size unless the model's is fixed, or another is wanted (`input_size`): then they are resized to it.
    """

    scale_C: Tensor
    shift_C: Tensor
    classes_K: Tensor | None
    """Which of the model's logits are the data's classes; None: all."""

    def __init__(
        self,
        model: nn.Module,
        *,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.notes: list[str] = []
        self.register_buffer("classes_K", None if classes is None else torch.tensor(classes), persistent=False)
        self.input_size = input_size
        self._folded = False
        own_std = torch.tensor(std, dtype=torch.float64)
        scale = torch.tensor(student_std, dtype=torch.float64) / own_std
        shift = (torch.tensor(student_mean, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)) / own_std
        self.renormalise = not (bool((scale == 1).all()) and bool((shift == 0).all()))
        self.register_buffer("scale_C", scale.float(), persistent=False)
        self.register_buffer("shift_C", shift.float(), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher never leaves eval mode."""
        return super().train(False)

    def compile_folded(self) -> None:
        """Compile the network; in fp32 with its batch norms folded into its convolutions and, on a CPU, weights packed.

        The weights are then held twice. What is compiled must not change any more. Under autocast nothing is folded:
        rounded to bf16 after folding, weights err more than outputs that are normalised in fp32 do, and on a GPU the
        norm is a part of the activation's kernel anyway.
        """
        self.model.compile()
        self._folded = True

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits `[B, K]` of images normalised for the student, `[B, C, H, W]`, or of the mean of `[B, T, C, H, W]`."""
        x_BCHW = as_input(images_BCHW, None)
        if self.renormalise:
            x_BCHW = x_BCHW * self.scale_C[:, None, None] + self.shift_C[:, None, None]
        if self.input_size is not None and tuple(x_BCHW.shape[-2:]) != self.input_size:
            x_BCHW = F.interpolate(x_BCHW, self.input_size, mode="bilinear", antialias=True)
        # At the first call, Dynamo and Inductor both ask for it, and only where gradients are off.
        fold = self._folded and not torch.is_autocast_enabled(x_BCHW.device.type)
        with torch._inductor.config.patch(freezing=fold):
            logits_BK: Tensor = self.model(x_BCHW)
        return logits_BK if self.classes_K is None else logits_BK[:, self.classes_K]


def create_teacher(
    config: TeacherConfig,
    data: DataConfig,
    *,
    num_classes: int,
    in_chans: int,
    weights_file: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Teacher:
    """The teacher that a recipe describes, on the CPU; its `notes` say what was decided.

    One of ImageNet-1k's 1,000 classes serves data of fewer, where `class_names` are their synsets. It is fed in its own
    normalisation: `teacher.mean` and `teacher.std`, else what its file says, else timm's configuration of the named
    model and tag; a random one in the data's. `weights_file` holds timm's weights, fetched beforehand by
    `fetch_weights`. Raises `Mistake` naming `teacher.name` or `teacher.checkpoint` for an unknown model, an unreadable
    file, or other classes than the data's.
    """
    assert config.name is not None
    own = _own_classes(config, num_classes)
    chosen = None if own == num_classes else choose_classes(config, own, num_classes, class_names)
    classes = num_classes if chosen is None else own
    if config.checkpoint is None and config.pretrained:
        overlay = {"file": weights_file} if weights_file else {}
        model = timm.create_model(
            config.name, pretrained=True, num_classes=classes, in_chans=in_chans, pretrained_cfg_overlay=overlay
        )
    else:
        model = _create(config.name, classes, in_chans)
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint, "teacher.checkpoint")
    known: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    size = known["input_size"][-2:] if known.get("fixed_input_size", False) else None
    size = size if config.image_size is None else (config.image_size, config.image_size)
    student_mean, student_std = data.normalisation(in_chans)
    mean, std, note = _own_normalisation(config, data, model, (student_mean, student_std))
    teacher = Teacher(
        model, student_mean=student_mean, student_std=student_std, mean=mean, std=std, input_size=size, classes=chosen
    )
    teacher.notes = [note] if chosen is None else [note, f"{num_classes} of its {own} classes serve, by synset"]
    return teacher


def _own_classes(config: TeacherConfig, num_classes: int) -> int:
    """How many classes the weights know."""
    assert config.name is not None
    if config.checkpoint is not None:
        layer = _default_cfg(config.name).get("classifier")
        layer = layer[0] if isinstance(layer, tuple) else layer  # the others are auxiliary, of the same classes
        weight = read_tensors(config.checkpoint, "teacher.checkpoint").get(f"{layer}.weight")
        return num_classes if weight is None else weight.shape[0]
    if config.pretrained:
        cfg = timm.get_pretrained_cfg(config.name)
        return num_classes if cfg is None else int(cfg.num_classes)
    return num_classes


def choose_classes(config: TeacherConfig, own: int, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Which of its 1,000 logits the data's classes are, in the order of their labels.

    Raises `Mistake`, with the mend, if the teacher's classes are not ImageNet-1k's or the names don't tell.
    """
    where = (
        f"teacher.checkpoint={config.checkpoint}" if config.checkpoint is not None else f"teacher.name={config.name}"
    )
    wrong = f"{where}: has {own} classes, {num_classes} wanted"
    if own != IMAGENET_CLASSES or class_names is None:
        raise Mistake(f"{wrong}; train a teacher on your data and set teacher.checkpoint")
    from timm.data import ImageNetInfo

    order = {name: k for k, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    unknown = [name for name in class_names if name not in order]
    if unknown:
        raise Mistake(
            f"{wrong}; {unknown[0]} is none of ImageNet-1k's synsets, by which the data's could be found among them:"
            " name the class folders so (n01440764, ...), or train a teacher on your data"
        )
    if len(class_names) != num_classes:
        raise Mistake(f"{wrong}; the data has {len(class_names)}: set student.num_classes={len(class_names)}")
    return [order[name] for name in class_names]


def _own_normalisation(
    config: TeacherConfig, data: DataConfig, model: nn.Module, students: tuple[Sequence[float], Sequence[float]]
) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean and standard deviation of what the teacher reads, and who says so."""
    said = (read_metadata(config.checkpoint) or {}).get("student", {}) if config.checkpoint is not None else {}
    counts = data.frames is not None
    if counts and data.frame_choice == "regroup" and said.get("frames", data.frames) != data.frames:
        # A group's frame is a sum: the fewer there are, the more is in each, and in their mean.
        times = said["frames"] / data.frames
        note = f"a frame has {times:g} times the events of those it was trained on, and is divided by that"
        return students[0], tuple(times * s for s in students[1]), note
    cfg = timm.get_pretrained_cfg(config.name)
    timms: dict[str, Any] = vars(cfg) if cfg is not None else getattr(model, "default_cfg", {})
    timms = {} if config.is_random else timms
    for source, found in (
        ("teacher.mean and teacher.std", {"mean": config.mean, "std": config.std}),
        ("its file's", said),
        (f"timm's of {config.name}", timms),
    ):
        mean, std = found.get("mean"), found.get("std")
        if mean is not None and std is not None and len(mean) == len(students[0]):  # timm's are of three channels
            return mean, std, f"normalised with {source}: mean {list(mean)}, std {list(std)}"
    return *students, "normalised as the data is"


def check_name(config: TeacherConfig) -> None:
    """Raise `Mistake` naming `teacher.name` unless timm knows the model and, where wanted, has weights for it."""
    assert config.name is not None
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('.')[0][:6]}*")[:3]
        raise Mistake(f"teacher.name={config.name}: timm has no such model; near it: {', '.join(near) or 'nothing'}")
    if config.checkpoint is None and config.pretrained:
        architecture, _, tag = config.name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if not tags or (tag and tag not in tags):
            raise Mistake(
                f"teacher.name={config.name}: timm has no weights of that tag, only {', '.join(tags) or 'none at all'};"
                " or set teacher.checkpoint=FILE"
            )


def check_pretrained_classes(config: TeacherConfig, num_classes: int, class_names: Sequence[str] | None = None) -> None:
    """Raise `Mistake` unless timm's weights know the data's classes, see `choose_classes`."""
    own = _own_classes(config, num_classes)
    if own != num_classes:
        choose_classes(config, own, num_classes, class_names)


def fetch_weights(name: str) -> str:
    """The local path of timm's weights of `name`, downloaded to the hub's cache if need be.

    Called at submission, on a machine that has a network; jobs get the path. Raises `Mistake` when it can't.
    """
    from timm.models._hub import download_cached_file, hf_split

    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    try:
        if cfg.hf_hub_id:
            return _fetch_from_hub(*hf_split(cfg.hf_hub_id))
        if cfg.url:
            return str(download_cached_file(cfg.url))
    except Exception as error:
        raise Mistake(
            f"teacher.name={name}: its weights are not in the cache and could not be fetched"
            f" ({type(error).__name__}); run once where there is a network, or set teacher.checkpoint=FILE"
        ) from error
    raise Mistake(f"teacher.name={name}: timm does not say where its weights are; set teacher.checkpoint=FILE")


def _fetch_from_hub(repo: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return hf_hub_download(repo, "model.safetensors", revision=revision)
    except LocalEntryNotFoundError:  # no network: another name will not be found either
        raise
    except EntryNotFoundError:
        return hf_hub_download(repo, "pytorch_model.bin", revision=revision)


def _create(name: str, num_classes: int, in_chans: int) -> nn.Module:
    # "resnet34.tv_in1k" is an architecture and a tag of weights; without the weights only the architecture counts.
    model: nn.Module = timm.create_model(name.split(".")[0], num_classes=num_classes, in_chans=in_chans)
    return model


def _default_cfg(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        found: dict[str, Any] = timm.create_model(name.split(".")[0]).default_cfg
    return found
